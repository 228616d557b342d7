"""A drop-in for ``model.generate``: a transformers model generates on the native kernels within a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pareto_cpu_runtime.runtime import Runtime


@contextlib.contextmanager
def accelerate_generate(model: Any, runtime: Runtime | None = None, **settings: Any) -> Iterator[Runtime]:
    """Let ``model.generate`` run on ``runtime``, or on one made of the model by :meth:`Runtime.from_pretrained`.

    A context manager: ``with accelerate_generate(model) as runtime: model.generate(...)``. Within the block
    ``generate`` takes ``(inputs, generation_config)`` by place as transformers' does, and all else by name;
    ``token_type_ids``, which tokenizers add and decoders do not read, are left aside.

    The runtime has a copy of the weights as they are now (INT4 unless ``precision`` says otherwise): training goes on
    outside the block. The model's own ``generate`` is back when the block ends, whatever happens in it.
    """
    made = Runtime.from_pretrained(model, **settings) if runtime is None else runtime
    had = "generate" in vars(model)
    before = vars(model).get("generate")

    def generate(inputs: Any = None, generation_config: Any = None, **options: Any) -> Any:
        options.pop("token_type_ids", None)
        return made.generate(options.pop("input_ids", inputs), generation_config=generation_config, **options)

    model.generate = generate
    try:
        yield made
    finally:
        if had:
            model.generate = before
        else:
            del model.generate
