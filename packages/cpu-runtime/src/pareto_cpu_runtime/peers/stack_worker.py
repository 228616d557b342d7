"""The linear layers of a decoder as one chain, run by OpenVINO, by torch's INT4 operator, or here; timed on request.

One JSON object per line in, one out. Run by path under any interpreter that has numpy and the runtime in question. A
layer is: x += O(QKV(norm(x))[: width]); h = norm(x); x += Down(silu(Gate(h)) * Up(h)); the head follows, on the last
row. There is no attention: what is compared is the weights' part alone.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from geometry import Geometry, random_blocks

Run = Callable[[np.ndarray], np.ndarray]
Matrix = tuple[np.ndarray, np.ndarray]


def fused(geometry: Geometry, group: int) -> Iterator[tuple[Matrix, Matrix, Matrix, Matrix, Matrix]]:
    """Yield QKV, O, Gate, Up and Down of each layer: codes (n, k) and scales (n, k / group)."""
    parts = {name: (n, k) for name, n, k in geometry.matrices()}

    def matrix(*names: str) -> Matrix:
        found = [random_blocks(name, *parts[name], group) for name in names]
        codes = np.concatenate([codes for codes, _ in found])
        scales = np.concatenate([scales[:, :: group // 32] for _, scales in found])
        return codes, np.ascontiguousarray(scales)

    for layer in range(geometry.layers):
        at = f"model.layers.{layer}"
        qkv = matrix(*(f"{at}.self_attn.{part}_proj" for part in "qkv"))
        others = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        yield (qkv, *(matrix(f"{at}.{name}") for name in others))


def head(geometry: Geometry, group: int) -> Matrix:
    """Codes and scales of the output layer."""
    codes, scales = random_blocks("lm_head", geometry.vocabulary, geometry.width, group)
    return codes, np.ascontiguousarray(scales[:, :: group // 32])


def with_openvino(geometry: Geometry, group: int, threads: int, rows: int) -> Run:
    """Compressed weights as OpenVINO's own tools write them, activations quantised per group as it runs."""
    import openvino as ov
    from openvino import opset13 as op

    kept = []

    def linear(x: ov.Node, matrix: Matrix) -> ov.Node:
        codes, scales = matrix
        n, k = codes.shape
        # Two's complement nibbles, even inputs low.
        signed = codes ^ 8
        packed = np.ascontiguousarray(signed[:, ::2] | (signed[:, 1::2] << 4))
        kept.append(packed)  # the tensor borrows its memory
        weights = op.constant(ov.Tensor(packed, ov.Shape([n, k // group, group]), ov.Type.i4))
        scaled = op.multiply(op.convert(weights, np.float16), op.constant(scales[..., None]))
        flat = op.reshape(scaled, op.constant(np.array([n, k])), special_zero=False)
        return op.matmul(x, op.convert(flat, np.float32), transpose_a=False, transpose_b=True)

    def norm(x: ov.Node) -> ov.Node:
        mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), op.constant(np.array([-1])), keep_dims=True)
        return op.divide(x, op.sqrt(op.add(mean, op.constant(np.float32(geometry.epsilon)))))

    x = start = op.parameter([rows, geometry.width], np.float32)
    zero, one, width = (op.constant(np.array([value])) for value in (0, 1, geometry.width))
    for qkv, output, gate, up, down in fused(geometry, group):
        context = op.slice(linear(norm(x), qkv), zero, width, one, one)
        x = op.add(x, linear(context, output))
        h = norm(x)
        x = op.add(x, linear(op.multiply(op.swish(linear(h, gate)), linear(h, up)), down))
    last = op.slice(norm(x), op.constant(np.array([rows - 1])), op.constant(np.array([rows])), one, zero)
    model = ov.Model([linear(last, head(geometry, group))], [start])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    kept.clear()

    def run(values: np.ndarray) -> np.ndarray:
        return next(iter(request.infer({0: values}).values()))

    return run


def with_torch(geometry: Geometry, group: int, threads: int, rows: int) -> Run:
    """torch's INT4 weights with bf16 activations, its fastest INT4 path on x86 without further packages."""
    import torch

    torch.set_num_threads(threads)

    def pack(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = (torch.from_numpy(part) for part in matrix)
        # (k / group, n, 2): scale, and what code 8 stands for.
        pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).to(torch.bfloat16).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1), pairs

    layers = [tuple(pack(matrix) for matrix in layer) for layer in fused(geometry, group)]
    last = pack(head(geometry, group))

    def linear(x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], group, packed[1])

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (geometry.width,), eps=geometry.epsilon)

    def run(values: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(values).to(torch.bfloat16)
            for qkv, output, gate, up, down in layers:
                x = x + linear(linear(norm(x), qkv)[:, : geometry.width].contiguous(), output)
                h = norm(x)
                x = x + linear(torch.nn.functional.silu(linear(h, gate)) * linear(h, up), down)
            return linear(norm(x)[-1:], last).float().numpy()

    return run


def with_pareto(geometry: Geometry, group: int, threads: int, rows: int) -> Run:
    """The runtime of this package; what goes in is looked up in a table of the rows."""
    from pareto_cpu_runtime import _native

    pool = _native.Pool(threads, sorted(os.sched_getaffinity(0))[:threads])
    program = _native.Program(pool, rows)
    table = np.zeros((rows, geometry.width), np.float32)
    ones = np.ones(geometry.width, np.float32)
    kept = []

    def weight(*matrices: Matrix) -> Any:
        codes, scales = (np.concatenate(parts) for parts in zip(*matrices, strict=True))
        if len(matrices) == 2:  # gate and up, in blocks of 16
            codes, scales = (
                part.reshape(2, -1, 16, part.shape[1]).swapaxes(0, 1).reshape(part.shape) for part in (codes, scales)
            )
        n, k = codes.shape
        block = _native.Block(_native.packed_bytes(n, k, group))
        kept.append(block)
        codes, scales = np.ascontiguousarray(codes), np.ascontiguousarray(scales)
        _native.pack(codes, scales.view(np.uint16), None, 4, block.array())
        return _native.Weight.of(block.array(), n, k, group)

    x, hidden = program.buffer(geometry.width), program.buffer(geometry.inner)
    normed = {"norm": "rms", "norm_weight": ones, "epsilon": geometry.epsilon}
    program.embed(table, x)
    for qkv, output, gate, up, down in fused(geometry, group):
        wide = program.buffer(len(qkv[0]))
        program.linear(weight(qkv), x, wide, **normed)
        program.linear(weight(output), wide, x, residual=x)
        program.linear(weight(gate, up), x, hidden, activation="silu", gated=True, **normed)
        program.linear(weight(down), hidden, x, residual=x)
    program.linear(weight(head(geometry, group)), x, **normed)
    program.finish()
    numbers, slots = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32)
    logits, last = np.empty((1, geometry.vocabulary), np.float32), np.array([rows - 1], np.int32)

    def run(values: np.ndarray) -> np.ndarray:
        table[:] = values
        program.run(numbers, slots, numbers, last, logits)
        return logits

    return run


RUNTIMES = {"openvino": with_openvino, "torch": with_torch, "pareto": with_pareto}


def main() -> None:
    """Serve until the input ends."""
    asked = json.loads(sys.argv[1])
    geometry = Geometry(**asked["geometry"])
    runs: dict[int, Run] = {}
    print(json.dumps({"ready": asked["runtime"]}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rows = request["rows"]
        if rows not in runs:
            runs.clear()
            runs[rows] = RUNTIMES[asked["runtime"]](geometry, asked["group"], asked["threads"], rows)
        x = np.random.default_rng(rows).standard_normal((rows, geometry.width), dtype=np.float32)
        times = []
        answer = runs[rows](x)
        for _ in range(request["times"]):
            start = time.perf_counter()
            answer = runs[rows](x)
            times.append(time.perf_counter() - start)
        if "save" in request:
            np.save(request["save"], answer)
        print(json.dumps({"times": times}), flush=True)


if __name__ == "__main__":
    main()
