from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from pareto_cpu_runtime import _native

CHUNK = 128
ISAS = [isa for isa in ("scalar", "avx2", "avx512f", "avx512_bf16") if isa in _native.available()]
# Relative to the largest value: fp32 sums; int8 has 127 levels to each side.
TOLERANCE = {"fp32": 3e-6, "int8": 2e-2}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(kw_only=True)
class Setting:
    """One attention step; a row of a token table is that token's queries, keys and values."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    length: int = 300
    slots: int = 3
    layers: int = 1
    layer: int = 0
    threads: int = 2
    max_rows: int = 400
    dtype: str = "fp32"
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.scale = self.options.pop("scale", self.head_dim**-0.5)
        self.width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.pool = _native.Pool(self.threads)
        self.cache = _native.Cache(self.layers, self.slots, self.kv_heads, self.length, self.head_dim, dtype=self.dtype)

    def program(self, table: torch.Tensor) -> tuple[_native.Program, int]:
        program = _native.Program(self.pool, self.max_rows)
        x, y = program.buffer(self.width), program.buffer(self.heads * self.head_dim)
        program.embed(table, x)
        program.attention(
            self.cache, self.layer, x, y, self.heads, self.kv_heads, self.head_dim, self.scale, **self.options
        )
        program.finish()
        return program, y

    def run(self, table: torch.Tensor, calls: list[list[tuple[int, int, int]]]) -> torch.Tensor:
        """Context rows of all calls; a call is a list of (token, slot, position)."""
        program, y = self.program(table)
        return torch.cat([self.call(program, y, call) for call in calls])

    def call(self, program: _native.Program, y: int, rows: list[tuple[int, int, int]]) -> torch.Tensor:
        tokens, slots, positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()
        program.run(tokens, slots, positions, torch.empty(0, dtype=torch.int32), torch.empty(0, 0))
        out = torch.empty(len(rows), self.heads * self.head_dim)
        program.read(y, out)
        return out


def table_of(setting: Setting, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, setting.width, generator=torch.Generator().manual_seed(seed))


def prompt(tokens: int, slot: int = 0, start: int = 0) -> list[tuple[int, int, int]]:
    return [(start + i, slot, start + i) for i in range(tokens)]


def rotated(x: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rows of x (tokens, head_dim) as complex numbers times exp(i angle)."""
    width = table.shape[1]
    halves = x[:, :width].unflatten(1, (-1, 2) if interleaved else (2, -1))
    a, b = halves.unbind(2 if interleaved else 1)
    turned = torch.complex(a, b) * torch.complex(*table[: len(x)].double().chunk(2, dim=1))
    pairs = torch.stack([turned.real, turned.imag], dim=2 if interleaved else 1).flatten(1)
    return torch.cat([pairs, x[:, width:]], dim=1)


def normed(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return x if weight is None else x / torch.sqrt((x * x).mean(1, keepdim=True) + epsilon) * weight.double()


def reference(setting: Setting, table: torch.Tensor) -> torch.Tensor:
    """The context of a prompt that is all of the table's rows, in float64 and one head at a time."""
    o, d, group = setting.options, setting.head_dim, setting.heads // setting.kv_heads
    tokens, epsilon = len(table), o.get("norm_epsilon", 1e-6)
    vectors = table.double().view(tokens, setting.heads + 2 * setting.kv_heads, d)

    def turned(head: int, weight: torch.Tensor | None) -> torch.Tensor:
        rows = normed(vectors[:, head], weight, epsilon)
        return rows if o.get("rotary") is None else rotated(rows, o["rotary"], o.get("interleaved", False))

    keys = [turned(setting.heads + j, o.get("k_norm")) for j in range(setting.kv_heads)]
    out = torch.empty(tokens, setting.heads, d, dtype=torch.float64)
    distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    hidden = distance > 0
    if o.get("window"):
        hidden |= distance <= -o["window"]
    for head in range(setting.heads):
        scores = turned(head, o.get("q_norm")) @ keys[head // group].T * setting.scale
        if o.get("slopes") is not None:
            scores = scores + o["slopes"][head].double() * distance
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
        out[:, head] = weights @ vectors[:, setting.heads + setting.kv_heads + head // group]
    return out.view(tokens, -1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def cos_sin(length: int, dim: int) -> torch.Tensor:
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


SHAPES = [
    (1, 1, 8),
    (2, 1, 7),
    (3, 3, 16),
    (4, 2, 80),
    (8, 1, 64),
    (6, 2, 96),
    (71, 1, 8),
    (8, 8, 32),
    (5, 1, 100),
    (2, 2, 128),
    (12, 4, 64),
    (26, 2, 8),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_prompt_against_float64(isa, heads, kv_heads, head_dim):
    setting = Setting(heads=heads, kv_heads=kv_heads, head_dim=head_dim, options={"isa": isa})
    table = table_of(setting, 150)
    assert error(setting.run(table, [prompt(150)]), reference(setting, table)) < TOLERANCE["fp32"]


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257])
def test_lengths_around_tiles_and_chunks(tokens):
    setting = Setting(heads=2, kv_heads=1, head_dim=24)
    table = table_of(setting, tokens)
    assert error(setting.run(table, [prompt(tokens)]), reference(setting, table)) < TOLERANCE["fp32"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_int8_cache(isa, head_dim):
    setting = Setting(head_dim=head_dim, dtype="int8", options={"isa": isa})
    table = table_of(setting, 200)
    assert error(setting.run(table, [prompt(200)]), reference(setting, table)) < TOLERANCE["int8"]


def bf16_bound(setting: Setting, table: torch.Tensor) -> torch.Tensor:
    """How far a prompt's context can lie off where queries, keys, weights and values are each rounded to bf16."""
    half_step, group = 2.0**-9, setting.heads // setting.kv_heads
    q, k, v = (part[0].double().abs() for part in heads_of(setting, table))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    signed = [part[0].double() for part in heads_of(setting, table)[:2]]
    scores = signed[0] @ signed[1].repeat_interleave(group, 0).transpose(1, 2) * setting.scale
    hidden = torch.ones(len(table), len(table), dtype=torch.bool).triu(1)
    off = (q @ k.transpose(1, 2) * setting.scale * (2 * half_step + half_step**2)).masked_fill(hidden, 0)
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    size = weights @ v  # (heads, tokens, head_dim)
    factor = (2 * off.amax(2, keepdim=True)).exp() * (1 + half_step) ** 2 - 1
    return (size * factor).transpose(0, 1).reshape(len(table), -1) * 1.001


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_bf16_cache_within_what_rounding_allows(isa, heads, kv_heads, head_dim):
    setting = Setting(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype="bf16", options={"isa": isa})
    table = table_of(setting, 150)
    off = (setting.run(table, [prompt(150)]) - reference(setting, table)).abs()
    assert (off <= bf16_bound(setting, table)).all()
    assert off.square().mean().sqrt() < 4e-3 * reference(setting, table).square().mean().sqrt()


@pytest.mark.parametrize("name", ["window", "window of one", "alibi", "norms", "interleaved"])
def test_bf16_cache_with_options(name):
    setting = Setting(dtype="bf16", options=dict(OPTIONS[name]))
    table = table_of(setting, 280)
    assert error(setting.run(table, [prompt(280)]), reference(setting, table)) < 1.2e-2


def test_bf16_cache_holds_the_nearest_bf16_values():
    options = {"rotary": cos_sin(300, 16)}
    narrow, wide = Setting(dtype="bf16", options=dict(options)), Setting(options=dict(options))
    table = table_of(narrow, 20)
    head = narrow.heads * narrow.head_dim
    for row in range(20):  # position 0 alone: the softmax of one score is 1, so the context is the value
        got = narrow.run(table, [[(row, 0, 0)]])[0].view(narrow.heads, -1)
        values = table[row, head + 2 * 16 :].bfloat16().float().view(2, -1)
        assert torch.equal(got, values.repeat_interleave(2, dim=0))
    both = [setting.run(table, [prompt(20)]) for setting in (narrow, wide)]
    assert 0 < float((both[0] - both[1]).abs().max()) < 0.05


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_int8_cache_of_extreme_values(size):
    setting = Setting(dtype="int8", options={"scale": 0.0})
    table = torch.full((3, setting.width), size)
    torch.testing.assert_close(setting.run(table, [prompt(3)]), torch.full((3, 64), size), rtol=0.01, atol=1e-36)


OPTIONS = {
    "plain": {},
    "rotary": {"rotary": cos_sin(300, 16)},
    "partial rotary": {"rotary": cos_sin(300, 6)},
    "interleaved": {"rotary": cos_sin(300, 16), "interleaved": True},
    "partial interleaved": {"rotary": cos_sin(310, 10), "interleaved": True},
    "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.0625, 2.0**-8])},
    "window": {"window": 40},
    "window of one": {"window": 1},
    "window of a chunk": {"window": CHUNK},
    "window and alibi": {"window": 150, "slopes": torch.tensor([1.0, 0.1, 0.01, 0.0])},
    "norms": {
        "q_norm": torch.linspace(0.5, 2, 16),
        "k_norm": torch.linspace(2, 0.5, 16),
        "norm_epsilon": 1e-5,
        "rotary": cos_sin(300, 16),
    },
    "scale": {"scale": 1.0},
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_float64(isa, name):
    setting = Setting(options={**OPTIONS[name], "isa": isa})
    table = table_of(setting, 280)
    assert error(setting.run(table, [prompt(280)]), reference(setting, table)) < 2 * TOLERANCE["fp32"]


def context(setting: Setting, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Torch's own attention over (1, heads, tokens, head_dim)."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(q.shape[2], -1)


def heads_of(setting: Setting, table: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of the rows as (1, heads, tokens, head_dim)."""
    vectors = table.view(1, len(table), -1, setting.head_dim).transpose(1, 2)
    return list(vectors.split([setting.heads, setting.kv_heads, setting.kv_heads], dim=1))


def test_rotary_as_in_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = cos_sin(300, 32)
    setting = Setting(head_dim=32, options={"rotary": angles})
    table = table_of(setting, 150)
    q, k, v = heads_of(setting, table)
    cos, sin = (half[:150].repeat(1, 2)[None] for half in angles.chunk(2, dim=1))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    assert error(setting.run(table, [prompt(150)]), context(setting, q, k, v)) < 1e-5


def test_partial_rotary_as_in_gpt_neox():
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    angles = cos_sin(300, 8)
    setting = Setting(heads=3, kv_heads=3, head_dim=32, options={"rotary": angles})
    table = table_of(setting, 150)
    q, k, v = heads_of(setting, table)
    cos, sin = (half[:150].repeat(1, 2)[None] for half in angles.chunk(2, dim=1))
    q_turned, k_turned = apply_rotary_pos_emb(q[..., :8], k[..., :8], cos, sin)
    q, k = torch.cat([q_turned, q[..., 8:]], dim=-1), torch.cat([k_turned, k[..., 8:]], dim=-1)
    assert error(setting.run(table, [prompt(150)]), context(setting, q, k, v)) < 1e-5


def test_interleaved_rotary_as_in_gptj():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    sin, cos = create_sinusoidal_positions(300, 16).chunk(2, dim=1)
    options = {"rotary": torch.cat([cos, sin], dim=1).contiguous(), "interleaved": True}
    setting = Setting(heads=3, kv_heads=3, head_dim=32, options=options)
    table = table_of(setting, 150)
    q, k, v = heads_of(setting, table)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first = apply_rotary_pos_emb(x.transpose(1, 2)[..., :16], sin[None, :150], cos[None, :150])
        return torch.cat([first.transpose(1, 2), x[..., 16:]], dim=-1)

    assert error(setting.run(table, [prompt(150)]), context(setting, turned(q), turned(k), v)) < 1e-5


BITWISE = [
    ({"heads": 8, "kv_heads": 2, "head_dim": 16}, {"rotary": cos_sin(300, 16)}),
    ({"heads": 5, "kv_heads": 5, "head_dim": 20}, {"window": 100}),
    ({"heads": 7, "kv_heads": 1, "head_dim": 40}, {"slopes": torch.linspace(0.1, 1, 7)}),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("case", range(len(BITWISE)))
def test_rows_are_bitwise_the_same_however_they_come(isa, dtype, case):
    sizes, options = BITWISE[case]

    def setting(threads: int) -> Setting:
        return Setting(**sizes, dtype=dtype, threads=threads, options={**options, "isa": isa})

    tokens = 270
    table = table_of(setting(1), tokens)
    whole = setting(1).run(table, [prompt(tokens)])
    assert torch.isfinite(whole).all()
    # Alone: the first rows, those about the chunks' bounds and the last; what lies between comes as prompts.
    calls = [[row] for row in prompt(3)] + [prompt(120, start=3)]
    calls += [[row] for row in prompt(9, start=123)] + [prompt(121, start=132)]
    calls += [[row] for row in prompt(17, start=253)]
    for threads in (1, 2, 3):
        assert torch.equal(setting(threads).run(table, [prompt(tokens)]), whole)
        assert torch.equal(setting(threads).run(table, calls), whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_mixed_batches_of_prompts_and_single_tokens(threads):
    def alone(slot: int) -> torch.Tensor:
        return Setting().run(table, [prompt(220, slot)])

    setting = Setting(threads=threads)
    table = table_of(setting, 220)
    program, y = setting.program(table)
    done = {slot: [] for slot in range(3)}
    calls = [  # (slot, first token, tokens) in the order of the call's rows
        [(0, 0, 100)],
        [(0, 100, 1), (1, 0, 60)],
        [(1, 60, 70), (2, 0, 1), (0, 101, 1)],
        [(0, 102, 1), (1, 130, 1), (2, 1, 1)],
        [(2, 2, 130), (0, 103, 117), (1, 131, 2)],
    ]
    for call in calls:
        rows = [row for slot, start, count in call for row in prompt(count, slot, start)]
        out = setting.call(program, y, rows)
        for row, (_, slot, _) in zip(out, rows, strict=True):
            done[slot].append(row)
    for slot, rows in done.items():
        assert torch.equal(torch.stack(rows), alone(slot)[: len(rows)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_of_what_lay_in_the_cache_before_is_seen(dtype, threads):
    options = {"window": 30, "rotary": cos_sin(300, 16)}
    clean = Setting(dtype=dtype, options=dict(options))
    used = Setting(dtype=dtype, threads=threads, options=dict(options))
    table = table_of(used, 300)
    poison = torch.full_like(table, math.nan)
    for slot in range(used.slots):
        assert used.run(poison, [prompt(300, slot)]).isnan().all()
    want = clean.run(table, [prompt(140)])
    assert torch.equal(used.run(table, [prompt(140, 1)]), want)
    assert torch.equal(used.run(table, [[row] for row in prompt(140, 2)]), want)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("bad", [40, 41])
def test_a_row_that_is_not_a_number_leaves_the_rows_before_it_and_other_slots_alone(dtype, bad):
    setting = Setting(heads=3, kv_heads=3, dtype=dtype)
    table = table_of(setting, 60)
    want = setting.run(table, [prompt(60)])
    table[bad] = math.nan
    got = setting.run(table, [[*prompt(60), (7, 1, 0)]])
    assert torch.equal(got[:bad], want[:bad])
    assert got[bad:60].isnan().all()
    assert torch.isfinite(got[60]).all()


def test_infinite_and_huge_scores():
    setting = Setting(heads=1, kv_heads=1, head_dim=8, options={"scale": 1.0})
    table = table_of(setting, 30) * 1e6
    assert error(setting.run(table, [prompt(30)]), reference(setting, table)) < 1e-5
    table[10, 0] = math.inf
    got = setting.run(table, [prompt(30)])
    assert torch.isfinite(got[:10]).all()
    assert got[10].isnan().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tokens", [1, 16, 37, 130])
def test_copied_slots_go_on_as_their_source(dtype, tokens):
    setting = Setting(dtype=dtype, layers=2, layer=1)
    table = table_of(setting, 200)
    want = setting.run(table, [prompt(200)])
    setting.run(table_of(setting, 200, seed=1), [prompt(200, 2)])
    setting.cache.copy(0, 2, tokens)
    assert torch.equal(setting.run(table, [prompt(200 - tokens, 2, tokens)]), want[tokens:])
    setting.cache.copy(2, 2, tokens)
    setting.cache.copy(0, 1, 0)


def test_layers_are_apart():
    pool, cache = _native.Pool(2), _native.Cache(2, 1, 1, 50, 8)
    widths = Setting(heads=1, kv_heads=1, head_dim=8)
    first, second = table_of(widths, 50, seed=1), table_of(widths, 50, seed=2)
    results = []
    for layer, table in ((0, first), (1, second), (0, first)):
        widths.pool, widths.cache, widths.layer = pool, cache, layer
        results.append(widths.run(table, [prompt(50)]))
    again = widths.run(first, [[(49, 0, 49)]])  # the rest of layer 0 is still there
    assert torch.equal(results[0], results[2])
    assert torch.equal(again[0], results[0][49])
    assert error(results[1], reference(widths, second)) < TOLERANCE["fp32"]


def test_cache_bytes():
    fp32 = _native.Cache(2, 3, 2, 256, 64, "fp32").bytes
    assert fp32 == 2 * 3 * 2 * 2 * 256 * 64 * 4
    assert _native.Cache(2, 3, 2, 256, 64, "bf16").bytes == fp32 // 2
    assert _native.Cache(2, 3, 2, 256, 64, "int8").bytes == fp32 // 4 + 2 * 3 * 2 * 2 * 256 * 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 300)], "position 300 is not below 300"),
        ([(0, 0, -1)], "position -1 is not below 300"),
        ([(0, 3, 0)], "slot 3 is not below 3"),
        ([(0, -1, 0)], "slot -1 is not below 3"),
        ([(5, 0, 0)], "token 5 is not below 5"),
        ([(0, 1, 4), (1, 0, 4), (2, 1, 4)], "position 4 of slot 1 comes twice"),
    ],
)
def test_rows_that_have_no_place(rows, message):
    setting = Setting()
    program, y = setting.program(table_of(setting, 5))
    with pytest.raises(ValueError, match=message):
        setting.call(program, y, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must be a multiple of kv_heads 2, not 3"),
        ({"kv_heads": 4}, "cache is made for 2 key-value heads of 16"),
        ({"head_dim": 8}, "cache is made for 2 key-value heads of 16"),
        ({"layer": 1}, "layer 1 is not below 1"),
        ({"layer": -1}, "layer -1 is not below 1"),
        ({"window": -1}, "window must be at least 0"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"y": 0}, "x and y must be different"),
        ({"x": 1, "y": 0}, "buffer 1 is 64 wide, the step needs 128"),
        ({"rotary": cos_sin(299, 16)}, "rotary must have a row for each of the cache's 300 positions, not 299"),
        ({"rotary": cos_sin(300, 18)}, "rotary must have an even number of columns up to head_dim 16, not 18"),
        ({"rotary": torch.zeros(300, 5)}, "rotary must have an even number"),
        ({"slopes": torch.zeros(3)}, "slopes must have 4 values"),
        ({"q_norm": torch.zeros(3)}, "q_norm must have 16 values"),
        ({"k_norm": torch.zeros(17)}, "k_norm must have 16 values"),
        ({"isa": "sse9"}, "isa must be auto, scalar, avx2, avx512f or avx512_bf16"),
    ],
)
def test_steps_that_cannot_be(change, message):
    setting = Setting()
    program = _native.Program(setting.pool, 4)
    x, y = program.buffer(setting.width), program.buffer(64)
    arguments = {"layer": 0, "x": x, "y": y, "heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, **change}
    with pytest.raises(ValueError, match=message):
        program.attention(setting.cache, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, 1, 1), "must be at least 1"),
        ((1, 1, 1, 0, 1), "must be at least 1"),
        ((1, 1, 1, 1, 1, "fp8"), "dtype must be one of fp32, bf16, int8, not 'fp8'"),
        ((2**40, 2**40, 8, 8, 8), "more than"),
    ],
)
def test_caches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.Cache(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 0, 1), "from_slot 3"), ((0, -1, 1), "to_slot -1"), ((0, 1, 301), "tokens must be 0 to 300, not 301")],
)
def test_copies_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Setting().cache.copy(*arguments)
