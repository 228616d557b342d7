"""Runs a packed model here and answers the requests that llama_worker.py answers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pareto_cpu_runtime.batching import Engine, Request
from pareto_cpu_runtime.runtime import Runtime


class Stopwatch:
    """A streamer that notes when each token was known; the prompt, which comes first, is not one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, _tokens: Any) -> None:
        """Called with the prompt and then with each token."""
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Called when generation ends."""


def together(runtime: Runtime, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    """Serve all prompts at once: the times at the start, when all had their first token, and at the end."""
    times = [time.perf_counter()]
    engine = Engine(runtime)
    handles = [engine.submit(Request(tokens=prompt, max_new_tokens=new)) for prompt in prompts]
    while not all(handle.tokens for handle in handles):
        engine.step()
    times.append(time.perf_counter())
    engine.run()
    times.append(time.perf_counter())
    return {"times": times, "tokens": [handle.tokens for handle in handles]}


def main() -> None:
    """Serve until the input ends."""
    import torch

    path, threads, length, slots = sys.argv[1], *map(int, sys.argv[2:5])
    runtime = Runtime.from_pretrained(path, threads=threads, max_length=length, slots=slots)
    print(json.dumps({"ready": str(runtime.kernels())}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompts" in request:
            print(json.dumps(together(runtime, request["prompts"], request["new"])), flush=True)
            continue
        prompt = torch.tensor([request["prompt"]])
        if "logits" in request:
            np.save(request["logits"], runtime(input_ids=prompt).logits[0, -1].float().numpy())
            answer: dict[str, Any] = {"saved": request["logits"]}
        else:
            watch, new = Stopwatch(), request["new"]
            start = time.perf_counter()
            runtime.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=watch)
            answer = {"times": [start, *watch.times]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
