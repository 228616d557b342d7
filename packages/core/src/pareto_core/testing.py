"""The conformance suite that every method passes; the tiny task that it runs on is here by name too.

A package tests all of its entry points with a few lines::

    @pytest.mark.parametrize("name", ["krona", "lora"])
    def test_conformance(name):
        check_method(load_entry_point(name)())
"""

from __future__ import annotations

import copy
import json
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core.edit import LocalEdit
from pareto_core.errors import ConfigError
from pareto_core.method import Method
from pareto_core.task import Task
from pareto_core.tiny import TinyTask
from pareto_core.weights import freeze, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn


def entry_point_methods(package: str) -> list[str]:
    """Names of the ``pareto.methods`` entry points that the import package ``package`` provides."""
    return sorted(e.name for e in entry_points(group="pareto.methods") if e.value.split(".")[0] == package)


def load_method(name: str) -> type[Method]:
    """Return the class behind the ``pareto.methods`` entry point ``name``."""
    (entry,) = entry_points(group="pareto.methods", name=name)
    loaded = entry.load()
    assert isinstance(loaded, type), f"entry point {name} is not a class"
    assert issubclass(loaded, Method), f"entry point {name} is not a Method"
    return loaded


def check_method(method: Method, task: Task | None = None, steps: int = 3, tolerance: float = 1e-5) -> None:
    """Assert what every method promises, by training it for ``steps`` steps on ``task`` (default: a tiny BERT).

    The configuration round-trips through JSON; bad fields are refused by name; ``build`` trains something and leaves
    the rest as it was; ``finish`` keeps the outputs within ``tolerance`` where the method says so; what is saved
    and loaded gives equal outputs, and generates the same where the task generates.
    """
    task = TinyTask() if task is None else task
    check_config(method)
    method.prepare(task)
    model = method.build(task, task.frozen_backbone())
    trainable = [p for p in model.parameters() if p.requires_grad]
    if trainable:
        _check_training(method, task, model, trainable, steps)
    model.eval()
    probe = _inputs(task)
    before = _logits(model, probe)
    deployed = method.finish(model, task)
    after = _logits(deployed, probe)
    if method.finishes_exactly:
        _assert_close(before, after, tolerance, f"{type(method).__name__}.finish changed the outputs")
    assert weight_bytes(deployed) > 0, "what is deployed has no weights"
    with tempfile.TemporaryDirectory() as directory:
        method.save(deployed, Path(directory))
        _check_files(Path(directory))
        loaded = method.load(Path(directory))
        _assert_close(after, _logits(loaded, probe), 1e-6, "save and load changed the outputs")
        _check_generation(task, deployed, loaded)


def check_config(method: Method) -> None:
    """Assert the JSON round trip, the paper, and that bad fields are refused by name."""
    cls = type(method)
    assert method.paper is not None, f"{cls.__name__} names no paper"
    assert method.paper.url.startswith("https://"), f"{cls.__name__}.paper has no URL"
    assert cls.from_json(json.loads(json.dumps(method.to_json()))) == method, "JSON round trip changes the config"
    for field in [*cls.field_names(), "no_such_field"]:
        refused = None
        try:
            cls.from_json({**method.to_json(), field: object()})
        except ConfigError as error:
            refused = error.field.split("[")[0]
        assert refused is not None, f"{cls.__name__} accepts any value for the field {field}"
        assert refused == field, f"{cls.__name__}: {field} refused as {refused}"


def _check_training(
    method: Method, task: Task, model: nn.Module, trainable: list[torch.nn.Parameter], steps: int
) -> None:
    import torch

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = [p.detach().clone() for p in trainable]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    edit = LocalEdit(optimizer)
    model.train()
    batch_size = min(16, task.size("train"))
    done = 0
    while done < steps:
        for batch in task.batches("train", batch_size, seed=done):
            loss = model(**batch).loss
            assert bool(torch.isfinite(loss)), "the loss is not finite"
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            method.after_step(model, done / steps, edit)
            if done == steps:
                break
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"training changed the frozen weight {name}"
    assert any(not torch.equal(a, b) for a, b in zip(start, trainable, strict=True)), "training changed nothing"
    parameters = dict(model.named_parameters())
    for head in task.spec.head:
        mine = [p for name, p in parameters.items() if head in name.split(".")]
        assert any(p.requires_grad for p in mine), f"the task's head {head} is not trained"
    freeze(model)


def _inputs(task: Task) -> dict[str, Any]:
    batch = next(iter(task.batches("test", 4, 0)))
    return copy.deepcopy(dict(batch))


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits = model(**inputs).logits
    assert isinstance(logits, torch.Tensor)
    return logits.float()


def _check_generation(task: Task, deployed: Any, loaded: Any) -> None:
    import torch

    for request in task.requests().values():
        if request.kind == "generate":
            fixed = {"max_new_tokens": request.new_tokens, "min_new_tokens": request.new_tokens, "do_sample": False}
            first, second = (model.generate(**request.inputs, **fixed) for model in (deployed, loaded))
            assert torch.equal(first, second), "save and load changed what is generated"


def _assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    assert a.shape == b.shape, f"{what}: the shape {tuple(a.shape)} became {tuple(b.shape)}"
    difference = float((a - b).abs().max())
    assert difference <= tolerance, f"{what} by {difference:.2e} (allowed: {tolerance:.0e})"


def _check_files(directory: Path) -> None:
    written = {path.suffix for path in directory.rglob("*") if path.is_file()}
    assert written, "save wrote nothing"
    assert written <= {".json", ".safetensors"}, f"save wrote {sorted(written)}; only safetensors and JSON are allowed"
