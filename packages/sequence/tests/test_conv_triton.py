"""The Triton kernels, run on the CPU by Triton's interpreter, and compiled for a GPU without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from pareto_core.errors import UnsupportedError
from pareto_sequence.conv import depthwise_conv

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# The interpreter must be on before a kernel is defined, hence another process.
INTERPRETED = """
import torch
from pareto_sequence import conv_triton
from pareto_sequence.conv import depthwise_conv, reference_conv

# Lengths of one and more blocks of either kernel, taps of one and more groups, a span beyond the length, and programs
# that sum one block and several.
CASES = [((1, 1, 1), 3, 1, 2048), ((3, 2, 7), 1, 1, 2048), ((2, 3, 65), 5, 16, 2048), ((1, 2, 600), 4, 2, 1),
         ((1, 2, 130), 17, 3, 2048), ((1, 1, 70), 20, 64, 2048), ((5, 1, 300), 2, 3, 4)]
torch.manual_seed(0)
for padding in ("causal", "circular"):
    for (batch, width, length), taps, dilation, conv_triton.WEIGHT_PROGRAMS in CASES:
        single = [torch.randn(s, requires_grad=True) for s in ((batch, width, length), (width, taps), (width,))]
        double = [v.detach().double().requires_grad_() for v in single]
        y = depthwise_conv(*single, dilation=dilation, padding=padding, implementation="triton")
        wanted = reference_conv(*double, dilation, padding)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(y)
        y.backward(grad)
        wanted.backward(grad.double())
        for got, right in zip(single, double):
            torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-5, atol=5e-5)
seconds = []
for implementation in ("triton", "reference"):
    torch.manual_seed(1)
    x, weight = (torch.randn(s, requires_grad=True) for s in ((1, 2, 20), (2, 3)))
    y = depthwise_conv(x * x, weight, dilation=2, implementation=implementation)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    seconds.append(torch.autograd.grad(slope.square().sum(), (x, weight)))
for got, right in zip(*seconds):
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
for dtype in (torch.bfloat16, torch.float16):
    x, weight = (torch.randn(s).to(dtype).requires_grad_() for s in ((2, 3, 90), (3, 5)))
    y = depthwise_conv(x, weight, dilation=2, implementation="triton")
    wanted = reference_conv(x.double(), weight.double(), None, 2, "causal")
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == y.dtype == dtype
print("agreed")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from pareto_sequence.conv_triton import _conv_kernel, _weight_kernel

CHOICES = [
    (_conv_kernel, "fp32", {"HAS_BIAS": True, "TAPS": 11, "CIRCULAR": False, "BLOCK": 512}),
    (_conv_kernel, "bf16", {"HAS_BIAS": False, "TAPS": 3, "CIRCULAR": True, "BLOCK": 512}),
    (_weight_kernel, "fp32", {"GROUP": 16, "CIRCULAR": False, "BLOCK": 128}),
    (_weight_kernel, "bf16", {"GROUP": 1, "CIRCULAR": True, "BLOCK": 128}),
]
TYPES = {"offsets": "*i32", "partial": "*fp32"}
for kernel, element, constants in CHOICES:
    types = TYPES | {name: "*" + element for name in ("x", "weight", "bias", "y", "grad")}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert made.asm["ptx"].count(".entry") == 1
print("compiled")
"""


def run(code: str, tmp_path, **environment: str) -> str:
    own = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_kernels_agree_with_the_reference_when_interpreted(tmp_path):
    assert "agreed" in run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path):
    assert "compiled" in run(COMPILED, tmp_path, TRITON_INTERPRET="0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("padding", ["causal", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(padding, dtype):
    for length, taps, dilation in [(1, 1, 1), (7, 3, 4), (1000, 11, 64), (4096, 17, 1), (5000, 40, 3)]:
        made = torch.Generator().manual_seed(0)
        shapes = [(2, 5, length), (5, taps), (5,)]
        single = [torch.randn(s, generator=made).to("cuda", dtype).requires_grad_() for s in shapes]
        double = [v.detach().double().requires_grad_() for v in single]
        y = depthwise_conv(*single, dilation=dilation, padding=padding, implementation="triton")
        wanted = depthwise_conv(*double, dilation=dilation, padding=padding, implementation="reference")
        grad = torch.randn(y.shape, generator=made).to(y)
        y.backward(grad)
        wanted.backward(grad.double())
        step = max(torch.finfo(dtype).eps, 1e-5)
        for got, right in zip((y, *(v.grad for v in single)), (wanted, *(v.grad for v in double)), strict=True):
            torch.testing.assert_close(got.double(), right.double(), rtol=step, atol=step * length**0.5)


def test_not_on_a_cpu():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter is on")
    with pytest.raises(UnsupportedError, match=r"runs on a GPU; x is on cpu|needs Triton"):
        depthwise_conv(torch.zeros(1, 2, 6), torch.zeros(2, 3), implementation="triton")
