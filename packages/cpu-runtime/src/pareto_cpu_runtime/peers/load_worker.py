"""Loads a packed model and generates with it in a process of its own: prints the seconds, and the peaks of memory.

Called as ``python -m pareto_cpu_runtime.peers.load_worker``: folder, threads, "read" or "map", context, prompt, new.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def status(field: str) -> int:
    """Bytes by ``field`` of the kernel's account of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Let VmHWM begin again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def warm_up() -> None:
    """Import and call everything once, by a tiny model: libraries are not what is measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pareto_cpu_runtime.runtime import Runtime

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    Runtime.from_pretrained(tiny, max_length=32).generate(torch.tensor([[1, 2]]), max_new_tokens=2)


def main() -> None:
    """Measure once."""
    folder, threads, memory, context, prompt, new = sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:7])
    warm_up()
    import torch

    from pareto_cpu_runtime.runtime import Runtime

    reset_peak()
    before, start = status("VmRSS"), time.perf_counter()
    runtime = Runtime.from_pretrained(folder, threads=threads, max_length=context, memory=memory)
    seconds = time.perf_counter() - start
    loading = status("VmHWM") - before
    reset_peak()
    tokens = torch.randint(0, runtime.vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    runtime.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    plan = runtime.memory_plan()
    found = {"weights": plan.weights, "cache": plan.cache, "loading": loading, "generating": status("VmHWM") - before}
    print(json.dumps({"seconds": seconds, **found}), flush=True)


if __name__ == "__main__":
    main()
