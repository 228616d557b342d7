"""The native convolution itself: instruction sets, threads, memory that it may touch, and what it refuses."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pareto_sequence.conv import reference_conv
from pareto_sequence.conv_native import convolve, native_or_none, threads_for, weight_gradient

_native = native_or_none()
pytestmark = pytest.mark.skipif(_native is None, reason="the native module is not built")

PACKAGE = Path(__file__).resolve().parents[1]
BUILDS = [
    *PACKAGE.glob("build/*/CMakeFiles/_native.dir"),
    *PACKAGE.parents[1].glob("build/seq*/CMakeFiles/_native.dir"),
]
# As the Linux kernel calls them in /proc/cpuinfo.
NEEDED = {"avx2": {"avx2", "fma"}, "avx512f": {"avx2", "fma", "avx512f"}}
HERE = [] if _native is None else _native.available()

every_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in HERE, reason=f"this processor lacks {name}"))
        for name in ("baseline", *NEEDED)
    ],
)
both_paddings = pytest.mark.parametrize("padding", ["causal", "circular"])


def example(batch, width, length, taps, seed=0):
    made = torch.Generator().manual_seed(seed)
    shapes = [(batch, width, length), (width, taps), (width,), (batch, width, length)]
    return [torch.randn(shape, generator=made) for shape in shapes]


def gradients(x, weight, bias, grad, dilation, padding):
    """Of the reference in float64: y, and the gradients of x, weight and bias."""
    double = [v.double().requires_grad_() for v in (x, weight, bias)]
    y = reference_conv(*double, dilation, padding)
    return y.detach(), *torch.autograd.grad(y, double, grad.double())


def close(got, wanted, size, parts=1e-6):
    """Within so many parts of the sum of the sizes of what was added."""
    assert ((got.double() - wanted).abs() <= parts * size + 1e-30).all()


@every_isa
@both_paddings
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
def test_every_instruction_set(isa, padding, length):
    circular = padding == "circular"
    for taps, dilation in [(k, 1 + k % 5) for k in range(1, 18)] + [(31, 3), (31, 64), (11, 16), (80, 1)]:
        x, weight, bias, grad = example(3, 3, length, taps)
        y, *grads = gradients(x, weight, bias, grad, dilation, padding)
        _, x_size, weight_size, bias_size = gradients(x.abs(), weight.abs(), bias.abs(), grad.abs(), dilation, padding)
        sizes = reference_conv(x.abs(), weight.abs(), bias.abs(), dilation, padding)
        options = {"dilation": dilation, "circular": circular, "isa": isa}
        close(convolve(x, weight, bias, **options), y, sizes, (taps + 1) * 2.0**-23)
        close(convolve(grad, weight, None, mirrored=True, **options), grads[0], x_size, (taps + 1) * 2.0**-23)
        weight_grad, bias_grad = weight_gradient(x, grad, taps, with_bias=True, **options)
        close(weight_grad, grads[1], weight_size)
        close(bias_grad, grads[2], bias_size)


@every_isa
def test_the_error_of_weight_gradients_does_not_grow_with_length(isa):
    # All products have one sign, so that partial sums grow and each addition rounds a large number.
    x, _, _, grad = (v.abs() for v in example(2, 1, 2**17 + 5, 3))
    _, _, wanted, bias_wanted = gradients(x, torch.ones(1, 3), torch.ones(1), grad, 2, "causal")
    weight_grad, bias_grad = weight_gradient(x, grad, 3, dilation=2, circular=False, with_bias=True, isa=isa)
    close(weight_grad, wanted, wanted, 2e-6)
    close(bias_grad, bias_wanted, bias_wanted, 2e-6)


@every_isa
@both_paddings
def test_threads_do_not_change_a_bit(isa, padding):
    x, weight, bias, grad = example(3, 7, 1000, 11)
    options = {"dilation": 16, "circular": padding == "circular", "isa": isa}
    results = []
    for threads in (1, 2, 3, 8):
        y = convolve(x, weight, bias, threads=threads, **options)
        mirrored = convolve(grad, weight, None, mirrored=True, threads=threads, **options)
        results.append((y, mirrored, *weight_gradient(x, grad, 11, with_bias=True, threads=threads, **options)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_callers_side_by_side():
    x, weight, bias, grad = example(4, 6, 700, 5)
    options = {"dilation": 3, "circular": False, "threads": 2}
    wanted = convolve(x, weight, bias, **options)
    wanted_grad, _ = weight_gradient(x, grad, 5, with_bias=False, **options)
    wrong = []

    def work():
        for _ in range(50):
            same = torch.equal(convolve(x, weight, bias, **options), wanted)
            if not same or not torch.equal(weight_gradient(x, grad, 5, with_bias=False, **options)[0], wanted_grad):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_child_process_has_threads_of_its_own():
    x, weight, bias, _ = (v.numpy() for v in example(4, 6, 700, 5))
    wanted, got = np.empty_like(x), np.zeros_like(x)
    _native.convolve(x, weight, bias, wanted, 3, False, threads=2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _native.convolve(x, weight, bias, got, 3, False, threads=2)
            status = 0 if np.array_equal(got, wanted) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_are_those_of_torch_where_there_is_work():
    assert threads_for(1000) == 1
    assert 1 <= threads_for(2**40) <= min(torch.get_num_threads(), len(os.sched_getaffinity(0)))


class Guarded:
    """Arrays that lie against a page which may not be touched: the one after them, or the one before."""

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self.kept: list[mmap.mmap] = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def copy(self, values: torch.Tensor) -> np.ndarray:
        size, page = values.numel() * 4, mmap.PAGESIZE
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        self.kept.append(memory)
        first = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        for guard in (first, first + page + inner):
            if self.libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        out = np.frombuffer(memory, np.float32, values.numel(), page + (inner - size if self.at_end else 0))
        out = out.reshape(values.shape)
        out[:] = values.numpy()
        return out


@every_isa
@both_paddings
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_no_access_outside_the_arrays(isa, padding, at_end):
    circular = padding == "circular"
    for length, taps, dilation in [
        (1, 1, 1),
        (5, 3, 4),
        (63, 11, 64),
        (64, 5, 7),
        (65, 2, 1),
        (333, 17, 9),
        (128, 40, 1),
    ]:
        guarded = Guarded(at_end)
        x, weight, bias, grad = example(1, 2, length, taps)
        y, x_grad, weight_wanted, bias_wanted = gradients(x, weight, bias, grad, dilation, padding)
        placed = [guarded.copy(v) for v in (x, weight, bias, grad)]
        out, weight_out, bias_out = (guarded.copy(torch.full_like(v, float("nan"))) for v in (x, weight, bias))
        _native.convolve(*placed[:3], out, dilation, circular, isa=isa)
        np.testing.assert_allclose(out, y.numpy(), rtol=1e-4, atol=1e-4)
        _native.convolve(placed[3], placed[1], None, out, dilation, circular, mirrored=True, isa=isa)
        np.testing.assert_allclose(out, x_grad.numpy(), rtol=1e-4, atol=1e-4)
        _native.weight_gradient(placed[0], placed[3], weight_out, bias_out, dilation, circular, isa=isa)
        np.testing.assert_allclose(weight_out, weight_wanted.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(bias_out, bias_wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_an_output_of_the_caller_is_filled():
    x, weight, bias, _ = example(2, 3, 100, 5)
    out = torch.full_like(x, float("nan"))
    assert convolve(x, weight, bias, dilation=2, circular=False, out=out) is out
    torch.testing.assert_close(out.double(), gradients(x, weight, bias, x, 2, "causal")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(3, 4)}, "weight must have a row for every channel"),
        ({"bias": torch.zeros(3)}, "bias must have a value for every channel"),
        ({"out": torch.zeros(1, 2, 7)}, "out must have the shape of x"),
        ({"weight": torch.zeros(2, 0)}, r"1 to 2\^31 - 1 taps"),
        ({"dilation": 0}, r"dilation must be 1"),
        ({"dilation": 2**30}, r"\(taps - 1\) \* dilation must be below 2\^31"),
        ({"threads": 0}, "threads must be 1 to 1024"),
        ({"isa": "sse9"}, r"isa must be one of available\(\)"),
    ],
)
def test_refused(changes, message):
    arguments = {"x": torch.zeros(1, 2, 6), "weight": torch.zeros(2, 4), "bias": None, "out": torch.zeros(1, 2, 6)}
    with pytest.raises(ValueError, match=message):
        _native.convolve(**arguments | {"dilation": 1, "circular": False} | changes)


def test_refused_memory():
    x, weight = torch.zeros(1, 2, 6), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="out must not overlap x"):
        _native.convolve(x, weight, None, x, 1, False)
    with pytest.raises(TypeError):  # a copy would be written to, and lost
        _native.convolve(x, weight, None, torch.zeros(1, 2, 6, dtype=torch.float64), 1, False)
    with pytest.raises(TypeError):
        _native.convolve(x, weight, None, torch.zeros(1, 2, 12)[..., ::2], 1, False)
    with pytest.raises(ValueError, match="grad must have the shape of x"):
        _native.weight_gradient(x, torch.zeros(1, 2, 5), weight, None, 1, False)
    with pytest.raises(ValueError, match="at least one position"):
        _native.convolve(x[..., :0].contiguous(), weight, None, x[..., :0].contiguous(), 1, False)


def test_instruction_sets_are_those_that_the_system_reports():
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    assert ["baseline", *(name for name, needed in NEEDED.items() if needed <= flags)] == HERE


def test_kernel_files_share_no_function():
    """A weak symbol of a file for AVX could be linked in place of another file's, and run where there is no AVX."""
    objects = [path for folder in BUILDS for path in folder.glob("native/kernels/*.o")]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no build folder with object files, or no nm")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r"\s[WVuw]\s", line) and "asan" not in line]
        assert not weak, path.name
