import math

import pytest
import torch

from pareto_core.errors import ModelError
from pareto_sequence.norms import EPSILON, NORMS, make_norm


def by_hand(name: str, row: list[float], weight: list[float], bias: list[float]) -> list[float]:
    mean = sum(row) / len(row) if name == "layer" else 0.0
    size = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + EPSILON)
    weight = weight * len(row) if len(weight) == 1 else weight
    return [(v - mean) / size * w + b for v, w, b in zip(row, weight, bias, strict=True)]


@pytest.mark.parametrize("name", ["layer", "scale", "rms"])
def test_a_position_is_normalised_as_by_hand(name: str) -> None:
    torch.manual_seed(0)
    norm = make_norm(name, 5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 5) * 4 + 1
    bias = norm.bias.tolist() if name == "layer" else [0.0] * 5
    expected = torch.tensor([[by_hand(name, row, norm.weight.tolist(), bias) for row in t] for t in x.tolist()])
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x[:, 1]), expected[:, 1], rtol=1e-5, atol=1e-5)


def test_batch_norm_counts_valid_positions_only_as_torchs_does_on_them() -> None:
    torch.manual_seed(0)
    norm, peer = make_norm("batch", 4), torch.nn.BatchNorm1d(4)
    x, mask = torch.randn(3, 6, 4) * 3 + 2, torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:], mask[2, 1:] = 0, 0
    for _ in range(3):
        y, expected = norm(x, mask), peer(x[mask.bool()])
        torch.testing.assert_close(y[mask.bool()], expected)
    torch.testing.assert_close(norm.running_mean, peer.running_mean)
    torch.testing.assert_close(norm.running_var, peer.running_var)
    norm.eval(), peer.eval()
    torch.testing.assert_close(norm(x), peer(x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("name", NORMS)
def test_gradients_agree_with_differences(name: str) -> None:
    torch.manual_seed(0)
    norm = make_norm(name, 3).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x), (x,))


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_is_normalised_in_single_precision(name: str) -> None:
    norm = make_norm(name, 64)
    x = torch.randn(2, 8, 64) * 100
    y = norm.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), make_norm(name, 64)(x), rtol=2e-2, atol=2e-2)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'group': expected one of layer, scale, rms, batch"):
        make_norm("group", 4)
    with pytest.raises(ModelError, match="width = 0"):
        make_norm("rms", 0)
    with pytest.raises(ModelError, match="at least 2 valid positions, here are 1"):
        make_norm("batch", 4)(torch.randn(1, 1, 4))
