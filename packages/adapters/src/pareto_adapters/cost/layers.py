"""One frozen linear layer, forward and backward, alone and with an adapter beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from pareto_adapters._kron import multiplications
from pareto_adapters.cost.timing import (
    Estimate,
    Times,
    estimate,
    extra_ratio,
    median,
    ratio,
    rounds_within,
    take_turns,
)
from pareto_adapters.krona import KronAConfig
from pareto_core import ModelError

TOKENS = 512
RANKS = (1, 2, 4, 8)
FROZEN, KRON, MATERIALISED, MERGED = "frozen layer", "Kronecker", "kron formed, then linear", "merged"


@dataclasses.dataclass(frozen=True)
class Row:
    """A case at one width: its trained parameters and multiplications per token above the frozen layer's, its time.

    ``ratio`` is its time to the frozen layer's.
    """

    width: int
    case: str
    parameters: int
    multiplications: int
    milliseconds: Estimate
    ratio: Estimate


@dataclasses.dataclass(frozen=True)
class Width:
    """All cases at one width, and how many times as much as the factorised product the formed one costs.

    LoRA of rank ``equal_rank`` multiplies as often as the factorised product.
    """

    width: int
    a_shape: tuple[int, int]
    equal_rank: int
    rows: tuple[Row, ...]
    speedup: Estimate


class Formed(nn.Module):
    """The Kronecker product, formed in each forward pass, as a second linear layer beside the frozen one."""

    def __init__(self, base: nn.Linear, a_shape: tuple[int, int]) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(a_shape))
        self.B = nn.Parameter(torch.empty(base.in_features // a_shape[0], base.out_features // a_shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y = XW + X(A⊗B)."""
        return self.base(x) + x @ torch.kron(self.A, self.B)


def balanced_shape(width: int) -> tuple[int, int]:
    """The shape of A with the fewest parameters, the wider one where there are two: (m1, n1), m1 ≤ n1."""
    m1 = max(d for d in range(1, math.isqrt(width) + 1) if width % d == 0)
    return m1, width // m1


def kron_multiplications(width: int) -> int:
    """Of the factorised product per token, at the balanced shape and in the cheaper order."""
    m1, n1 = balanced_shape(width)
    return min(multiplications(m1, n1, width // m1, width // n1))


def equal_rank(width: int) -> int:
    """The rank at which LoRA multiplies as often as the factorised product: m1 of the balanced shape, at most √d."""
    return kron_multiplications(width) // (2 * width)


def cases(width: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """Every case by name, the frozen weight shared by all but the merged one; adapters hold random weights.

    The random weights of the factorised and of the formed product are the same, and those that were merged.
    """
    torch.manual_seed(0)
    shape = balanced_shape(width)
    weight = nn.Parameter(torch.randn(width, width, device=device, dtype=dtype) / math.sqrt(width), requires_grad=False)
    found: dict[str, nn.Module] = {FROZEN: _linear(weight)}
    for rank in sorted({*RANKS, equal_rank(width)}):
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
        found[f"LoRA r={rank}"] = _randomised(inject_adapter_in_model(lora, nn.Sequential(_linear(weight))))
    config = KronAConfig(a_shape=shape, target_modules=["0"])
    found[KRON] = _randomised(inject_adapter_in_model(config, nn.Sequential(_linear(weight))))
    (cell,) = found[KRON][0].cells.values()
    formed = Formed(_linear(weight), shape).to(device=device, dtype=dtype)
    formed.A.data, formed.B.data = cell.A.data, cell.B.data
    found[MATERIALISED] = formed
    merged = weight.detach() + cell.delta().detach()
    found[MERGED] = _linear(nn.Parameter(merged, requires_grad=False))
    return found


def check(found: dict[str, nn.Module], x: torch.Tensor, g: torch.Tensor) -> None:
    """Raise :class:`ModelError` unless outputs and gradients are those of the formed product in double precision."""
    formed = found[MATERIALISED]
    reference = Formed(_linear(found[FROZEN].weight.double()), formed.A.shape)
    reference.A.data, reference.B.data = formed.A.data.double(), formed.B.data.double()
    exact = _answers(reference, x.double(), g.double())
    for name in (KRON, MATERIALISED, MERGED):
        for mine, true in zip(_answers(found[name], x, g), exact, strict=False):
            error = float((mine.double() - true).norm() / true.norm())
            if not error < 10 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]):
                raise ModelError(f"{name} at width {x.shape[-1]} is off by {error:.1e}: not timed")


def measure(
    width: int,
    seconds: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    done: Callable[[float], None] | None = None,
) -> Width:
    """Check all cases at ``width``, then time them in turns for about ``seconds``."""
    found = cases(width, device, dtype)
    x = torch.randn(TOKENS, width, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(TOKENS, width, device=device, dtype=dtype)
    check(found, x, g)
    calls = {name: _pass(module, x, g) for name, module in found.items()}
    times = take_turns(calls, rounds_within(calls, seconds, device), device, done)
    return Width(
        width=width,
        a_shape=balanced_shape(width),
        equal_rank=equal_rank(width),
        rows=tuple(_row(width, name, module, times) for name, module in found.items()),
        speedup=estimate(extra_ratio, times[MATERIALISED], times[KRON], times[FROZEN]),
    )


def _row(width: int, name: str, module: nn.Module, times: Times) -> Row:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    # LoRA multiplies with each weight once; a formed product takes as much as the layer, beside what forms it.
    products = {KRON: kron_multiplications(width), MATERIALISED: width * width}.get(name, trained)
    return Row(
        width=width,
        case=name,
        parameters=trained,
        multiplications=products,
        milliseconds=estimate(median, 1000 * times[name]),
        ratio=estimate(ratio, times[name], times[FROZEN]),
    )


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear layer without bias that holds ``weight`` itself."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return linear


@torch.no_grad()
def _randomised(model: nn.Module) -> nn.Module:
    """``model`` with random trained weights: some start at zero, and zeros hide errors."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def _answers(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Sequence[torch.Tensor]:
    """The output, and the gradients of the input and of the trained weights."""
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, [x, *_trained(module)], g)


def _pass(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], object]:
    wanted = [x, *_trained(module)]
    return lambda: torch.autograd.grad(module(x), wanted, g)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
