from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pareto_core.errors import DataError, ModelError
from pareto_cpu_runtime import panels
from pareto_cpu_runtime.checkpoint import (
    MANIFEST,
    TENSORS,
    dequantise,
    load_packed,
    pack_matrix,
    save_packed,
    write_packed,
)
from pareto_cpu_runtime.manifest import seal
from pareto_cpu_runtime.quantise.config import Precision, QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise
from pareto_cpu_runtime.quantise.fusion import Fusion, fuse, split
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.rtn import round_to_nearest
from pareto_cpu_runtime.tensor_file import Pending, map_tensors, write_tensors

G32 = QuantisationConfig(group_size=32)
GATED = Fusion(
    "model.layers.0.mlp.gate_up", ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"), "interleave"
)
QKV = Fusion("model.layers.0.self_attn.qkv", tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv"))


@pytest.fixture
def saved(model_of: Callable[..., Any], tmp_path: Path) -> Path:
    save_packed(quantise(model_of("llama"), config=G32), tmp_path)
    return tmp_path


def packed_by_loops(matrix: QuantisedLinear) -> bytes:
    """The layout of native/packed.h, written out byte by byte."""
    (n, _), groups, out = matrix.shape, matrix.scales.shape[1], bytearray()
    middle = 8 if matrix.store_bits == 4 else 128
    for panel in range(0, n, 64):
        for g in range(groups):
            rows = range(panel, panel + 64)
            out += b"".join((matrix.scales[r, g].numpy().tobytes() if r < n else b"\0\0") for r in rows)
            zeros = [middle if r >= n or matrix.zeros is None else int(matrix.zeros[r, g]) for r in rows]
            out += bytes(zeros) if matrix.zeros is not None else b""
            for quad in range(0, matrix.group, 4):

                def code(c: int, j: int, quad: int = quad, g: int = g, zeros: list[int] = zeros) -> int:
                    inside = panel + c < n and quad + j < matrix.group  # noqa: B023
                    return int(matrix.codes[panel + c, g * matrix.group + quad + j]) if inside else zeros[c]  # noqa: B023

                if matrix.store_bits == 8:
                    out += bytes(code(c, j) for c in range(64) for j in range(4))
                else:
                    out += bytes(
                        code(32 * half + c, j) | code(32 * half + 16 + c, j) << 4
                        for half in range(2)
                        for c in range(16)
                        for j in range(4)
                    )
    return bytes(out)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 64, 32), (70, 64, 64), (1, 66, 66), (130, 96, 32), (16, 45, 45)])
def test_panels_are_those_of_the_layout(n: int, k: int, group: int, symmetric: bool, bits: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    size = group if group in (32, 64) else "channel"
    matrix = round_to_nearest(weight, Precision(bits=bits, group_size=size, symmetric=symmetric))
    zeros = None if matrix.zeros is None else matrix.zeros.numpy()
    plain = panels.pack(matrix.codes.numpy(), matrix.scales.numpy(), zeros, matrix.store_bits)
    assert plain.tobytes() == packed_by_loops(matrix)
    assert plain.tobytes() == pack_matrix(matrix).numpy().tobytes()
    codes, scales, kept = panels.unpack(plain, n, k, group, matrix.store_bits, not symmetric)
    assert np.array_equal(codes, matrix.codes.numpy())
    assert np.array_equal(scales, matrix.scales.numpy())
    assert (kept is None) == symmetric
    assert symmetric or np.array_equal(kept, zeros)


def test_a_model_comes_back(any_model: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    quantised = quantise(any_model, config=G32)
    save_packed(quantised, tmp_path)
    with torch.no_grad():
        expected = quantised.dequantise()(tokens).logits
        found = dequantise(tmp_path)(tokens).logits
    assert torch.equal(found, expected)


def test_precisions_survive(model_of: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantisationConfig(
        group_size=32,
        symmetric=False,
        mixed={"*.v_proj": {"bits": 3}, "*.o_proj": {"bits": 8, "group_size": "channel"}},
    )
    quantised = quantise(model_of("llama"), config=config)
    save_packed(quantised, tmp_path)
    loaded = load_packed(tmp_path)
    for name, matrix in loaded.linears().items():
        for field in dataclasses.fields(matrix):
            before, after = getattr(quantised.matrices[name], field.name), getattr(matrix, field.name)
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, (
                name,
                field.name,
            )
    assert loaded.manifest.recipe == config.to_json()
    assert loaded.weight_bytes == (tmp_path / TENSORS).stat().st_size


def test_fused_matrices_split_again(model_of: Callable[..., Any], tmp_path: Path) -> None:
    quantised = quantise(model_of("llama"), config=G32)
    save_packed(quantised, tmp_path, [GATED, QKV])
    loaded = load_packed(tmp_path)
    assert {GATED.name, QKV.name} <= set(loaded.matrices)
    assert loaded.matrices[GATED.name].n == 256
    assert not set(GATED.modules) & set(loaded.matrices)
    gate = quantised.matrices[GATED.modules[0]].codes
    fused = loaded.linear(GATED.name).codes
    assert torch.equal(fused[:16], gate[:16])
    assert torch.equal(fused[32:48], gate[16:32])
    found, expected = loaded.linears(), quantised.matrices
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].dequantise(), expected[name].dequantise()) for name in expected)


def test_what_differs_in_precision_is_stored_apart(model_of: Callable[..., Any], tmp_path: Path) -> None:
    config = QuantisationConfig(group_size=32, mixed={"*.up_proj": {"bits": 8}}, leave_out=("*.k_proj",))
    save_packed(quantise(model_of("llama"), config=config), tmp_path, [GATED, QKV])
    assert set(GATED.modules) <= set(load_packed(tmp_path).matrices)
    assert QKV.modules[0] in load_packed(tmp_path).matrices


def test_fusing_needs_equal_shapes() -> None:
    one, two = (round_to_nearest(torch.randn(n, 64), Precision(group_size=32)) for n in (24, 32))
    with pytest.raises(ModelError, match="cannot be interleaved"):
        fuse([one, one], "interleave")
    assert [m.shape for m in split(fuse([one, two], "concat"), [24, 32], "concat")] == [(24, 64), (32, 64)]


def test_shared_weights_are_stored_once(model_of: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    model = model_of("llama-tied")
    save_packed(quantise(model, config=dataclasses.replace(G32, leave_out=("lm_head",))), tmp_path)
    loaded = load_packed(tmp_path)
    assert loaded.manifest.shared == {"lm_head.weight": "model.embed_tokens.weight"}
    restored = dequantise(tmp_path)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight


def test_a_quantised_head_is_not_shared(model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of("llama-tied")
    save_packed(quantise(model, config=G32), tmp_path)
    restored = dequantise(tmp_path)
    assert torch.equal(restored.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(restored.lm_head.weight, model.lm_head.weight)


def test_other_readers_of_safetensors_read_it(saved: Path) -> None:
    ours = map_tensors(saved / TENSORS)
    with safe_open(saved / TENSORS, "pt") as file:
        assert set(file.keys()) == set(ours)
        assert all(torch.equal(file.get_tensor(name), ours[name]) for name in ours)


def test_panels_lie_on_cache_lines(saved: Path) -> None:
    loaded = load_packed(saved)
    assert all(loaded.panels(name).data_ptr() % 64 == 0 for name in loaded.matrices)


def test_packed_without_native_code(saved: Path) -> None:
    """A fresh interpreter in which the native module cannot be imported gives the same weights."""
    code = (
        "import sys; sys.modules['pareto_cpu_runtime._native'] = None\n"
        "from pareto_cpu_runtime.checkpoint import dequantise, load_packed, pack_matrix\n"
        "import torch\n"
        "from pathlib import Path\n"
        "p = load_packed(Path(sys.argv[1]))\n"
        "assert all(torch.equal(pack_matrix(p.linear(n)), p.panels(n)) for n in p.matrices)\n"
        "print(float(dequantise(Path(sys.argv[1])).lm_head.weight.detach().double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(dequantise(saved).lm_head.weight.detach().double().sum())


def _edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None], sealed: bool = True) -> None:
    """Alter the manifest; ``sealed`` makes its hash fit again, so that what is altered must be found by itself."""
    values = json.loads((directory / MANIFEST).read_text())
    change(values)
    (directory / MANIFEST).write_text(json.dumps({**values, "sha256": seal(values)} if sealed else values))


def _edit_config(directory: Path, **changes: Any) -> None:
    """Alter the config, with its hash."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit_manifest(directory, lambda v: v["configs"].update({"config.json": digest}))


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    data = (saved / TENSORS).read_bytes()[:keep]
    (saved / TENSORS).write_bytes(data)
    with pytest.raises(DataError, match=f"{TENSORS} has {len(data)} bytes, expected"):
        load_packed(saved)
    _edit_manifest(saved, lambda v: v.update(file_bytes=len(data)))
    with pytest.raises(DataError, match=TENSORS):  # found by the header where the size was altered too
        load_packed(saved, check=False)


def test_an_altered_file_is_refused(saved: Path) -> None:
    data = bytearray((saved / TENSORS).read_bytes())
    data[-1000] ^= 1
    (saved / TENSORS).write_bytes(data)
    with pytest.raises(DataError, match=r"model\.safetensors does not have the sha256"):
        load_packed(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.update(format_version=1),
            "has format version 1; this release reads version 2: pack the model again",
        ),
        (lambda v: v.pop("format_version"), "is damaged"),
        (lambda v: v.pop("recipe"), "recipe"),
        (lambda v: v["matrices"]["lm_head"].update(n=128), r"lm_head\.packed is uint8 \[.*\], its matrix needs uint8"),
        (lambda v: v["matrices"]["lm_head"].update(group=48), "must divide k"),
        (lambda v: v["matrices"]["lm_head"].update(bits=5), "bits = 5"),
        (lambda v: v["matrices"]["lm_head"].update(multiplier=-1.0), "multiplier"),
        (lambda v: v["matrices"].update(extra=v["matrices"]["lm_head"]), r"holds no extra\.packed"),
        (lambda v: v.update(shared={"a": "b"}), "is one with 'b'"),
        (lambda v: v.update(matrices=[]), "matrices"),
        (lambda v: v.update(configs={}), "configs must name"),
    ],
)
def test_an_altered_manifest_is_refused(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    _edit_manifest(saved, change)
    with pytest.raises(DataError, match=message) as caught:
        load_packed(saved)
    assert MANIFEST in str(caught.value) or TENSORS in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["matrices"]["lm_head"].update(multiplier=2.0),
        lambda v: v["recipe"].update(bits=8),
        lambda v: v.update(sha256=""),
        lambda v: v.pop("sha256"),
    ],
)
def test_a_manifest_that_is_whole_but_altered_is_refused(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _edit_manifest(saved, change, sealed=False)
    with pytest.raises(DataError, match=rf"{MANIFEST} does not have the sha256 that it names"):
        load_packed(saved, check=False)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_altered_configs_are_refused(saved: Path, name: str) -> None:
    text = (saved / name).read_text()
    (saved / name).write_text(text + " ")
    with pytest.raises(DataError, match=f"{name} does not have the sha256"):
        load_packed(saved, check=False)
    (saved / name).unlink()
    with pytest.raises(DataError, match=f"no {name} in"):
        load_packed(saved, check=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers = 1000000000: the weights allow 1 to"),
        ({"num_hidden_layers": 1}, r"config\.json asks for 1 blocks, there are weights of 2"),
        ({"num_hidden_layers": 3}, r"config\.json asks for 3 blocks, there are weights of 2"),
        ({"num_hidden_layers": "two"}, r"config\.json"),
        ({"num_attention_heads": 10**9}, r"num_attention_heads"),
        ({"intermediate_size": 10**9}, r"intermediate_size"),
        ({"num_key_value_heads": 3}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, r"config"),
        ({"rope_parameters": "linear"}, r"config"),
        ({"eos_token_id": "</s>"}, r"config\.json"),
        ({"rms_norm_eps": "small"}, r"config\.json"),
        ({"rms_norm_eps": 0.0}, r"config\.json.*epsilon"),
        ({"max_position_embeddings": 0}, r"config\.json.*positions"),
        ({"model_type": 3}, r"config\.json"),
        ({"hidden_act": "tanh"}, r"config\.json.*hidden_act"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_names_its_file(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    from pareto_cpu_runtime.runtime import Runtime

    _edit_config(saved, **changes)
    with pytest.raises(DataError, match=message) as caught:
        Runtime.from_pretrained(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "{", "", "null", '{"model_type": []}'])
def test_a_config_that_is_none_names_its_file(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    _edit_config_hash(saved)
    with pytest.raises(DataError, match=r"config\.json"):
        load_packed(saved)


def _edit_config_hash(directory: Path) -> None:
    digest = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    _edit_manifest(directory, lambda v: v["configs"].update({"config.json": digest}))


def test_saving_where_a_model_is_in_use_leaves_it_whole(
    model_of: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Another, smaller model takes the files' names; the mapped ones are those of the first for as long as it lives."""
    from pareto_cpu_runtime.runtime import Runtime

    save_packed(quantise(model_of("llama", width=128), config=G32), tmp_path)
    runtimes = [Runtime.from_pretrained(tmp_path, memory=memory, threads=1) for memory in ("read", "map")]
    before = [runtime(input_ids=tokens).logits for runtime in runtimes]
    loaded = load_packed(tmp_path)
    weight = loaded.linear("lm_head").codes.clone()
    save_packed(quantise(model_of("llama", layers=1), config=G32), tmp_path)
    after = [runtime(input_ids=tokens).logits for runtime in runtimes]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(loaded.linear("lm_head").codes, weight)
    assert len(load_packed(tmp_path).matrices) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", MANIFEST,
    ]  # fmt: skip


def test_a_model_may_be_written_where_its_tensors_come_from(model_of: Callable[..., Any], tmp_path: Path) -> None:
    save_packed(quantise(model_of("llama"), config=G32), tmp_path)
    first = load_packed(tmp_path)
    expected = {name: tensor.clone() for name, tensor in first.tensors.items()}
    write_packed(tmp_path, first.config, first.architecture, first.linears(), first.tensors, [QKV])
    again = load_packed(tmp_path)
    assert QKV.name in again.matrices
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in expected.items())


def test_a_save_that_fails_leaves_the_old_model(model_of: Callable[..., Any], saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    quantised = quantise(model_of("llama", seed=1), config=G32)
    bad = dataclasses.replace(quantised.matrices["lm_head"], scales=quantised.matrices["lm_head"].scales * math.nan)
    matrices = {**quantised.matrices, "lm_head": bad}
    with pytest.raises(ModelError, match="lm_head"):
        save_packed(dataclasses.replace(quantised, matrices=matrices), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    load_packed(saved)


def test_half_of_another_model_is_refused(model_of: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    """What a reader may meet between the weights' and the manifest's coming into place."""
    other = tmp_path / "other"
    save_packed(quantise(model_of("llama", seed=1), config=G32), other)
    (other / TENSORS).replace(saved / TENSORS)
    with pytest.raises(DataError, match="does not have the sha256"):
        load_packed(saved)


def test_the_generation_config_is_kept(model_of: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of("llama")
    model.generation_config.eos_token_id = [7, 9]
    model.generation_config.temperature = 0.5
    quantised = quantise(model, config=G32)
    save_packed(quantised, tmp_path)
    for restored in (quantised.dequantise(), dequantise(tmp_path)):
        assert restored.generation_config.eos_token_id == [7, 9]
        assert restored.generation_config.temperature == 0.5
    save_packed(dataclasses.replace(quantised, generation_config=None), tmp_path)
    assert load_packed(tmp_path).generation_config.eos_token_id == model.config.eos_token_id == 2


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a packed model"):
        load_packed(tmp_path / "nothing")
    (saved / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json"):
        load_packed(saved)
    (saved / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        load_packed(saved)


def test_another_architecture_is_refused(saved: Path) -> None:
    _edit_manifest(saved, lambda v: v.update(architecture="GPTJForCausalLM"))
    with pytest.raises(DataError, match="do not fit the architecture"):
        dequantise(saved)
    _edit_manifest(saved, lambda v: v.update(architecture="os"))
    with pytest.raises(DataError, match="'os' is not a model class"):
        dequantise(saved)


def test_scales_that_are_no_numbers_are_refused(model_of: Callable[..., Any], saved: Path) -> None:
    tensors = map_tensors(saved / TENSORS)
    name = next(name for name in tensors if name.endswith(".packed"))
    tensors[name][:2] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # fp16 NaN; the mapping is private
    pending = {n: Pending(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()}
    part = saved / "part"
    size, digest = write_tensors(part, pending)
    part.rename(saved / TENSORS)
    assert digest == hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()
    _edit_manifest(saved, lambda v: v.update(file_bytes=size, file_sha256=digest))
    with pytest.raises(DataError, match="hold NaN or infinite"):
        load_packed(saved)

    quantised = quantise(model_of("llama"), config=G32)
    matrix = quantised.matrices["lm_head"]
    bad = dataclasses.replace(matrix, scales=matrix.scales * float("nan"))
    with pytest.raises(ModelError, match="lm_head: scales hold NaN"):
        save_packed(dataclasses.replace(quantised, matrices={"lm_head": bad}), saved / "bad")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}}',
        b'{"a": {"dtype": "U9", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [1, 1.0], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": "1", "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}',
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(DataError, match=r"x\.safetensors"):
        map_tensors(path)
