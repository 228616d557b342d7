from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.attention import (
    ChunkedGatedSingleHeadAttention,
    ChunkedMultiHeadAttention,
    MovingAverageGatedAttention,
    RotaryBias,
    SimpleBias,
    attend,
    join_chunks,
    split_chunks,
)
from pareto_sequence.chunks import ChunkAttention, chunk_mask, laplace
from pareto_sequence.ema import DampedEMA

BLOCKS = ["ema", "trivial", "heads", "gated"]
D = 6


class Doubling(nn.Module):
    """The simplest mixer: a token's own value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def step(self, x: torch.Tensor, state: None) -> tuple[torch.Tensor, None]:
        return 2 * x, None


def make(name: str, chunk_size: int | None = 4, **options) -> nn.Module:
    """A block whose weights are large enough to matter: at MEGA's start, attention is nearly uniform."""
    torch.manual_seed(0)
    if name == "heads":
        block: nn.Module = ChunkedMultiHeadAttention(D, 3, chunk_size, **options)
    elif name == "gated":
        block = ChunkedGatedSingleHeadAttention(D, chunk_size, **options)
    else:
        both = not options.get("causal", True)
        mixer = DampedEMA(D, 2, bidirectional=both) if name == "ema" else Doubling()
        options = {"norm": nn.LayerNorm(D), **options}
        block = MovingAverageGatedAttention(D, 8, 4, mixer=mixer, chunk_size=chunk_size, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.7)
    return block.eval()


def block_mask(length: int, chunk_size: int | None, causal: bool) -> torch.Tensor:
    """(L, L): who may see whom, from the definition."""
    n = chunk_size or length
    return torch.tensor([[i // n == j // n and (j <= i or not causal) for j in range(length)] for i in range(length)])


def dense_bias(module: nn.Module | None, length: int, chunk_size: int | None) -> torch.Tensor | None:
    """(H, L, L): each pair's bias, looked up by its offset within a chunk."""
    if module is None:
        return None
    n = min(chunk_size or length, length)
    offsets = module.between(1 - n, n - 1)
    index = torch.tensor([[min(max(j - i, 1 - n), n - 1) + n - 1 for j in range(length)] for i in range(length)])
    return offsets[:, index]


def naive_laplace(q, k, v, bias, visible):
    """Weight by weight, for (L, S) and (L, E)."""
    out = torch.zeros(len(q), v.shape[1], dtype=v.dtype)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if visible[i, j]]
        for j in seen:
            x = q[i] @ k[j] / len(seen) + (0 if bias is None else bias[i, j])
            sigma = math.sqrt(1 / (4 * math.pi))
            out[i] += 0.5 * (1 + torch.erf((x - math.sqrt(0.5)) / (sigma * math.sqrt(2)))) * v[j]
    return out


def dense(core: ChunkAttention, q, k, v, mask=None):
    """One dense attention per head with a block mask: torch's own for softmax, loops for Laplace."""
    length = q.shape[1]
    visible = block_mask(length, core.chunk_size, core.causal)
    bias = dense_bias(core.bias, length, core.chunk_size)
    outputs = []
    for h, (qh, kh, vh) in enumerate(zip(*(x.chunk(core.heads, -1) for x in (q, k, v)), strict=True)):
        rows = []
        for b in range(len(q)):
            seen = visible if mask is None else visible & mask[b].bool()
            mine = None if bias is None else bias[h]
            if core.kind == "laplace":
                rows.append(naive_laplace(qh[b], kh[b], vh[b], mine, seen))
                continue
            penalty = torch.zeros(length, length, dtype=q.dtype) if mine is None else mine
            penalty = penalty.masked_fill(~seen, -math.inf)
            row = nn.functional.scaled_dot_product_attention(qh[b][None], kh[b][None], vh[b][None], penalty)[0]
            rows.append(torch.where(seen.any(-1, keepdim=True), row, 0.0))
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1)


def by_steps(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    state, outputs = None, []
    for token in x.unbind(1):
        y, state = block.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def padding(lengths: list[int], length: int) -> torch.Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def test_attend_by_hand():
    q = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0]])
    k = torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]])
    v = torch.tensor([[1.0], [0.0]])
    # scores of the second query: 2·1/2 and 2·3/2
    expected = math.exp(1) / (math.exp(1) + math.exp(3))
    torch.testing.assert_close(attend(q, k, v, causal=True), torch.tensor([[1.0], [expected]]))
    # Laplace: the first query sees one key, the second two: 1·1/1 and 2·1/2
    assert laplace(torch.tensor(math.sqrt(0.5))).item() == pytest.approx(0.5)
    value = 0.5 * (1 + math.erf((1 - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))
    torch.testing.assert_close(attend(q, k, v, None, "laplace", True), torch.tensor([[value], [value]]))


@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("bias", ["simple", "rotary", "none"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (3, 4), (4, 4), (8, 4), (11, 4), (5, 1), (7, None)])
def test_chunks_equal_dense_attention_with_a_block_mask(kind, bias, causal, length, chunk_size):
    torch.manual_seed(0)
    core = ChunkAttention(8, chunk_size, heads=2, kind=kind, bias=bias, causal=causal, max_length=16).double()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.normal_()
    q, k, v = torch.randn(3, 2, length, 8, dtype=torch.float64).requires_grad_()
    for mask in (None, padding([length, (length + 1) // 2], length)):
        y, expected = core(q, k, v, mask), dense(core, q, k, v, mask)
        rows = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(y[rows], expected[rows])
        leaves = [q, k, v, *core.parameters()] if mask is None else []
        mine = torch.autograd.grad(y.square().sum(), leaves) if leaves else ()
        for one, other in zip(
            mine, torch.autograd.grad(expected.square().sum(), leaves) if leaves else (), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_anywhere_can_be_hidden_and_blind_queries_give_nought(kind, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    core = ChunkAttention(4, 3, kind=kind, bias="none", causal=causal)
    y = core(q, k, v, mask)
    torch.testing.assert_close(y, dense(core, q, k, v, mask))
    assert (y[1] == 0).all()
    gradient = torch.autograd.grad(y.sum(), q)[0]
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


def test_rotary_bias_equals_rotated_vectors():
    torch.manual_seed(0)
    bias = RotaryBias(8, 6, heads=2).double()
    with torch.no_grad():
        bias.alpha.normal_()
        bias.beta.normal_()

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        angles = [position * 10000 ** (-s / 3) for s in range(3)]
        first = [vector[s] * math.cos(a) - vector[s + 3] * math.sin(a) for s, a in enumerate(angles)]
        second = [vector[s + 3] * math.cos(a) + vector[s] * math.sin(a) for s, a in enumerate(angles)]
        return torch.stack([*first, *second])

    for length in (1, 5, 20):  # beyond the 8 tokens that it is trained on, too
        rows = [
            [
                [(turned(bias.alpha[h], i) @ turned(bias.beta[h], j)).item() for j in range(length)]
                for i in range(length)
            ]
            for h in range(2)
        ]
        torch.testing.assert_close(bias(length).detach(), torch.tensor(rows, dtype=torch.float64))


def test_simple_bias_is_a_table_of_offsets():
    bias = SimpleBias(3)
    with torch.no_grad():
        bias.table.copy_(torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]]))
    assert bias(3).tolist() == [[[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]]
    assert bias(2).tolist() == [[[0, 1], [-1, 0]]]
    assert bias.between(-2, 0).tolist() == [[-2, -1, 0]]
    with pytest.raises(ModelError, match="4 tokens attend to each other, but the table is for chunk = 3"):
        bias(4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_cutting_and_joining(length):
    x = torch.randn(2, length, 3)
    chunks = split_chunks(x, 4)
    n = min(4, length)
    assert chunks.shape == (2, -(-length // n), n, 3)
    assert torch.equal(join_chunks(chunks, length), x)
    assert chunks.flatten(1, 2)[:, length:].abs().sum() == 0
    real = chunk_mask(None, length, 4, x.device)
    assert (real is None) == (length % n == 0)
    assert real is None or (real.sum().item(), real.shape) == (length, (1, *chunks.shape[1:3]))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (3, 4), (14, 4), (7, None)])
def test_steps_equal_forward(name, kind, bias, length, chunk_size):
    block = make(name, chunk_size, attention=kind, bias=bias, max_length=16).double()
    x = torch.randn(2, length, D, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(by_steps(block, x), block(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_state_empties_with_its_chunk(name):
    block = make(name, 4)
    state, counts = None, []
    for token in torch.randn(6, 1, D):
        _, state = block.step(token, state)
        chunk = getattr(state, "attention", state)
        counts.append((chunk.keys.shape[1], chunk.values.shape[1]))
    assert counts == [(1, 1), (2, 2), (3, 3), (0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["softmax", "laplace"])
def test_causal_blocks_do_not_see_the_future(name, kind):
    block = make(name, attention=kind).double()
    x = torch.randn(1, 10, D, dtype=torch.float64, requires_grad=True)
    y = block(x)
    for t in range(10):
        seen = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().sum(-1)
        assert seen[t] > 0
        assert seen[t + 1 :].sum() < 1e-12  # the transform's rounding
        if name != "ema":  # which alone looks across chunks
            assert (seen[: t // 4 * 4] == 0).all()
            assert (seen[t // 4 * 4 : t + 1] > 0).all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "laplace"])
def test_padding_never_changes_valid_outputs(name, causal, kind):
    block = make(name, attention=kind, causal=causal).double()
    lengths = [10, 7, 1, 0]
    mask = padding(lengths, 10)
    x = torch.randn(4, 10, D, dtype=torch.float64)
    y = block(x, mask)
    assert y.isfinite().all()
    junk = torch.where(mask[..., None], x, 1e6)
    torch.testing.assert_close(block(junk, mask.long())[mask], y[mask])
    for row, length in enumerate(lengths[:3]):
        torch.testing.assert_close(block(x[row : row + 1, :length])[0], y[row, :length])


def test_padding_of_infinities_stays_hidden():
    for name in ("heads", "gated"):
        block = make(name, causal=False)
        x, mask = torch.randn(1, 6, D), padding([4], 6)
        junk = torch.where(mask[..., None], x, math.inf)
        torch.testing.assert_close(block(junk, mask)[mask], block(x, mask)[mask])


@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_the_gated_block_equals_its_formulas(kind, causal, prenorm):
    block = make("ema", attention=kind, causal=causal, prenorm=prenorm).double()
    x = torch.randn(2, 10, D, dtype=torch.float64)
    normed = block.norm(x) if prenorm else x
    m = block.mixer(normed)
    weight, shift = block.expand.weight, block.expand.bias
    parts = [m @ w.T + b for w, b in zip(weight.split([D, 4, 8, D]), shift.split([D, 4, 8, D]), strict=True)]
    silu = nn.functional.silu
    u, z, r, hx = torch.sigmoid(parts[0]), silu(parts[1]), silu(parts[2]), parts[3]
    q, k = (z * block.shared.gamma[i] + block.shared.beta[i] for i in range(2))
    v = silu(normed @ block.value.weight.T + block.value.bias)
    h = silu(hx + (dense(block.attention, q, k, v) * r) @ block.contract.weight.T + block.contract.bias)
    out = u * h + (1 - u) * x
    torch.testing.assert_close(block(x), out if prenorm else block.norm(out))


def test_the_simpler_blocks_equal_their_formulas():
    x = torch.randn(2, 10, D, dtype=torch.float64)
    heads = make("heads").double()
    q, k, v = (x @ w.T + b for w, b in zip(heads.expand.weight.split(D), heads.expand.bias.split(D), strict=True))
    torch.testing.assert_close(heads(x), heads.contract(dense(heads.attention, q, k, v)))
    gated = make("gated").double()
    parts = zip(gated.expand.weight.split(D), gated.expand.bias.split(D), strict=True)
    z, v, r = (nn.functional.silu(x @ w.T + b) for w, b in parts)
    q, k = (z * gated.shared.gamma[i] + gated.shared.beta[i] for i in range(2))
    torch.testing.assert_close(gated(x), gated.contract(dense(gated.attention, q, k, v) * r))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(name, kind, causal):
    block = make(name, 2, attention=kind, causal=causal).double()
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in block.named_parameters()]
    mask = padding([3, 2], 3)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        y = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, mask))
        return y.masked_fill(~mask[..., None], 0.0)

    parameters = [p.detach().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_larger_chunks_than_in_training(name):
    x = torch.randn(1, 16, D, dtype=torch.float64)
    block, larger = make(name, 4).double(), make(name, 8).double()
    larger.load_state_dict(block.state_dict())
    block.chunk_size = 8
    torch.testing.assert_close(block(x), larger(x))
    torch.testing.assert_close(by_steps(block, x), larger(x))
    table = make(name, 4, bias="simple").double()
    table.chunk_size = 8
    with pytest.raises(ModelError, match="8 tokens attend to each other, but the table is for chunk = 4"):
        table(x)
    with pytest.raises(ModelError, match="5 tokens attend to each other"):
        by_steps(table, x)
    table.chunk_size = 3
    assert table(x).isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["softmax", "laplace"])
def test_half_precision_follows_full_precision(name, kind):
    block = make(name, attention=kind)
    x = torch.randn(2, 10, D)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (block(x) - expected).abs().max() < 0.05 * expected.abs().max()
    half = block.to(torch.bfloat16)
    y = half(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    assert half.step(x[:, 0].to(torch.bfloat16), None)[0].dtype == torch.bfloat16


def test_dropouts_act_where_they_should():
    x = torch.randn(2, 8, D)
    for options in ({"dropout": 0.5}, {"attention_dropout": 0.5}, {"hidden_dropout": 0.5}):
        block = make("trivial", **options)
        assert torch.equal(block(x), block(x))
        block.train()
        assert not torch.equal(block(x), block(x))
    # of the mixer's output nothing is left: the block is that of a mixer that gives 0
    block, silent = make("trivial", dropout=1.0).train(), make("trivial")
    silent.mixer.forward = torch.zeros_like
    torch.testing.assert_close(block(x), silent(x))
    # nothing is left of what was attended to: only the bias of the last layer is
    block = make("trivial", hidden_dropout=1.0).train()
    u, _, _, hx = block.expand(2 * block.norm(x)).split(block.sizes, -1)
    h = nn.functional.silu(hx + block.contract.bias)
    torch.testing.assert_close(block(x), x + u.sigmoid() * (h - x))
    # kept weights are scaled up, so that their mean stays
    v = torch.ones(4000, 2, 1)
    mean = attend(torch.zeros(4000, 2, 2), torch.zeros(4000, 2, 2), v, dropout=0.5).mean().item()
    assert mean == pytest.approx(1, abs=0.05)


def test_initialisation_and_sizes():
    block = MovingAverageGatedAttention(64, 128, 32, mixer=DampedEMA(64, 4), chunk_size=16)
    for layer in (block.value, block.expand, block.contract):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()
    assert block.shared.gamma.std().item() == pytest.approx(0.02, rel=0.4)
    assert (block.shared.beta == 0).all()
    assert block.attention.bias.alpha.std().item() == pytest.approx(0.02, rel=0.6)
    mine = sum(p.numel() for n, p in block.named_parameters() if not n.startswith("mixer"))
    assert mine == (64 + 1) * 128 + (64 + 1) * (64 + 32 + 128 + 64) + (128 + 1) * 64 + 4 * 32 + 2 * 32
    heads = ChunkedMultiHeadAttention(64, 4, bias="none")
    assert sum(p.numel() for p in heads.parameters()) == 4 * 65 * 64
    gated = ChunkedGatedSingleHeadAttention(64, bias="none")
    assert sum(p.numel() for p in gated.parameters()) == 4 * 65 * 64 + 4 * 64


@pytest.mark.parametrize("name", BLOCKS)
def test_bad_inputs(name):
    block = make(name)
    for shape in ((1, 0, D), (1, 4, D + 1), (4, D)):
        with pytest.raises(ModelError, match="must be \\(B, L, D\\) with L at least 1 and D = 6"):
            block(torch.zeros(shape))
    with pytest.raises(ModelError, match=r"mask is \(1, 3\), must be \(B, L\) = \(1, 4\)"):
        block(torch.zeros(1, 4, D), torch.ones(1, 3))
    with pytest.raises(ModelError, match=r"must be \(B, D\) with D = 6"):
        block.step(torch.zeros(1, 1, D), None)
    with pytest.raises(ModelError, match="chunk_size = 0"):
        block.chunk_size = 0
    with pytest.raises(UnsupportedError, match="whole sequence"):
        make(name, causal=False).step(torch.zeros(1, D), None)


def test_bad_options():
    for options, text in [
        ({"attention": "linear"}, "attention = 'linear': one of softmax, laplace"),
        ({"bias": "alibi"}, "bias = 'alibi': one of simple, rotary, none"),
        ({"chunk_size": 0}, "chunk_size = 0: must be at least 1"),
        ({"attention_dropout": 1.5}, "dropout = 1.5"),
        ({"chunk_size": None, "bias": "simple"}, "needs max_length"),
    ]:
        with pytest.raises(ModelError, match=text):
            make("trivial", **options)
    with pytest.raises(ModelError, match="heads = 4: must divide the width 6"):
        ChunkedMultiHeadAttention(6, 4)
    with pytest.raises(ModelError, match="width = 3: must be even"):
        ChunkedMultiHeadAttention(9, 3)
    with pytest.raises(ModelError, match="value_size = 0"):
        MovingAverageGatedAttention(6, 0, 4, mixer=Doubling())
    with pytest.raises(ModelError, match="length = 0"):
        split_chunks(torch.zeros(1, 0, 3), 4)
    block = MovingAverageGatedAttention(6, 8, 4, mixer=nn.Identity())
    with pytest.raises(UnsupportedError, match="Identity has no step"):
        block.step(torch.zeros(1, 6))


def test_attend_refuses_what_does_not_fit():
    x = torch.zeros(3, 4)
    with pytest.raises(ModelError, match="kind = 'hard'"):
        attend(x, x, x, kind="hard")
    with pytest.raises(ModelError, match=r"q \(3, 4\), k \(3, 5\)"):
        attend(x, torch.zeros(3, 5), x)
    with pytest.raises(ModelError, match="n = m"):
        attend(x, torch.zeros(2, 4), torch.zeros(2, 4), causal=True)
    with pytest.raises(ModelError, match=r"bias \(2, 2\): must be \(…, n, m\)"):
        attend(x, x, x, torch.zeros(2, 2))
