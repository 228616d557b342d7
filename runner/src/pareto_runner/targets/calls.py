"""Turns a model and a request into the call that is timed, on any PyTorch device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pareto_core import Request, UnsupportedError


def make_call(model: Any, request: Request, device: str) -> Callable[[], Any]:
    """Return a function of no arguments that runs ``request`` once in inference mode and returns the model's answer.

    A generation makes exactly ``request.new_tokens`` tokens, greedily; the call takes a streamer that is told of each.
    """
    import torch

    if isinstance(model, torch.nn.Module):
        model = model.to(device).eval()
    inputs = {key: value.to(device) for key, value in request.inputs.items()}
    if request.kind == "generate" and not hasattr(model, "generate"):
        raise UnsupportedError(f"{type(model).__name__} cannot generate")

    def forward() -> Any:
        with torch.inference_mode():
            return model(**inputs)

    def generate(streamer: Any = None) -> Any:
        tokens = request.new_tokens
        with torch.inference_mode():
            return model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1, streamer=streamer
            )

    return forward if request.kind == "forward" else generate
