"""Runs a GGUF file with llama.cpp and answers timing requests: one JSON object per line in, one out.

Run by path under any interpreter that has ``llama-cpp-python`` and numpy; it imports nothing of Pareto.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


class Llama:
    """A loaded model with one context, driven by llama.cpp's C interface."""

    def __init__(self, path: str, threads: int, context: int, batch: int, slots: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_seq_max, parameters.kv_unified = slots, True
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        """Empty the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def step(self, tokens: list[int]) -> np.ndarray:
        """Append ``tokens``; return the logits after the last."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        return self.logits(-1)

    def step_of_all(self, tokens: list[list[int]], position: int) -> list[np.ndarray]:
        """Append a row of ``tokens`` to each sequence, all from ``position`` on; return the logits after each row."""
        rows = [
            (s, position + i, token, i + 1 == len(row)) for s, row in enumerate(tokens) for i, token in enumerate(row)
        ]
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (sequence, place, token, last) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_batch_free(batch)
        return [self.logits(i) for i, (_, _, _, last) in enumerate(rows) if last]

    def logits(self, row: int) -> np.ndarray:
        """What the last step answered for one of its rows."""
        address = ctypes.cast(llama_cpp.llama_get_logits_ith(self.context, row), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (self.vocabulary,))


def generate(model: Llama, prompt: list[int], new: int) -> list[float]:
    """Generate greedily; return the time at which each token was known, the start first."""
    model.forget()
    times = [time.perf_counter()]
    token = int(model.step(prompt).argmax())
    times.append(time.perf_counter())
    for _ in range(new - 1):
        token = int(model.step([token]).argmax())
        times.append(time.perf_counter())
    return times


def together(model: Llama, prompts: list[list[int]], new: int) -> list[float]:
    """Serve prompts of one length at once: the times at the start, when all had their first token, and at the end."""
    model.forget()
    times = [time.perf_counter()]
    tokens = [int(logits.argmax()) for logits in model.step_of_all(prompts, 0)]
    times.append(time.perf_counter())
    for i in range(new - 1):
        tokens = [int(logits.argmax()) for logits in model.step_of_all([[t] for t in tokens], len(prompts[0]) + i)]
    times.append(time.perf_counter())
    return times


def main() -> None:
    """Serve until the input ends."""
    path, threads, context, batch, slots = sys.argv[1], *map(int, sys.argv[2:6])
    model = Llama(path, threads, context, batch, slots)
    print(json.dumps({"ready": llama_cpp.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompts" in request:
            print(json.dumps({"times": together(model, request["prompts"], request["new"])}), flush=True)
        elif "logits" in request:
            model.forget()
            answer = [model.step([token]).tolist() for token in request["prompt"]][-1]
            np.save(request["logits"], np.asarray(answer, np.float32))
            print(json.dumps({"saved": request["logits"]}), flush=True)
        else:
            times = generate(model, request["prompt"], request["new"])
            print(json.dumps({"times": times}), flush=True)


if __name__ == "__main__":
    main()
