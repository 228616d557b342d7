from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from pareto_adapters import Compacter, CompacterConfig
from pareto_adapters.compacter import CompacterCell, phm
from pareto_core import ConfigError, ModelError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts


def config(**options) -> CompacterConfig:
    return CompacterConfig(**{"n": 2, "reduction_factor": 4, **options})


def cells(model: nn.Module, adapter: str = "default") -> list[CompacterCell]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, CompacterCell)]
    return [module for name, module in found if name.endswith(f".{adapter}")]


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model.eval()


def matrix(a: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The definition: a sum of Kronecker products whose second factors have rank one."""
    return sum(torch.kron(a[i], s[i][:, None] @ t[i][None, :]) for i in range(len(a)))


def test_hand_computed():
    a = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    s, t = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    # W = [[1, 2], [0, 1]]·3 + [[0, 1], [1, 0]]·10 = [[3, 16], [10, 3]]
    assert phm(torch.tensor([1.0, 100.0]), a, s, t).tolist() == [1003.0, 316.0]


@pytest.mark.parametrize(("n", "p", "q"), [(1, 3, 2), (2, 6, 4), (3, 9, 12), (4, 4, 4)])
def test_outputs_and_gradients_equal_the_sum_of_kronecker_products(n, p, q):
    torch.manual_seed(0)
    shapes = [(2, 5, p), (n, n, n), (n, p // n), (n, q // n)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(2, 5, q, dtype=torch.float64)
    ours, theirs = phm(*leaves), leaves[0] @ matrix(*leaves[1:])
    torch.testing.assert_close(ours, theirs)
    mine = torch.autograd.grad((ours * weights).sum(), leaves)
    for one, other in zip(mine, torch.autograd.grad((theirs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_the_adapter_is_down_gelu_up_and_the_residual():
    torch.manual_seed(0)
    cell = randomised(CompacterCell(config(), 16, 16).double())
    y = torch.randn(3, 5, 16).double()
    h = y @ matrix(cell.A, cell.down.s, cell.down.t) + cell.down.b
    assert h.shape == (3, 5, 4)
    h = h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2
    expected = y + h @ matrix(cell.A, cell.up.s, cell.up.t) + cell.up.b
    torch.testing.assert_close(cell(torch.empty(0), y), expected)


def test_starts_at_the_identity_up_to_a_millionth():
    torch.manual_seed(0)
    cell = CompacterCell(CompacterConfig(), 768, 768)
    y = torch.randn(20, 768)
    assert 0 < (cell.double()(y, y.double()) - y).abs().max() < 1e-6
    assert float(cell.A.detach().std()) == pytest.approx(1e-4, rel=0.3)
    assert cell.down.s.abs().max() <= (12 / (1 + 192)) ** 0.5
    assert cell.down.t.abs().max() > 0.8 * (12 / (1 + 6)) ** 0.5


def test_share_of_t5_base_is_table_4_5s(t5_base):
    count = parameter_counts(get_peft_model(t5_base, CompacterConfig()))[0]
    assert count == 48 * (4 * (192 + 6) * 2 + 24 + 768) + 4**3 == 114_112
    assert round(100 * (count + 47_616) / 222_903_552, 4) == 0.0726


def test_the_first_factors_are_shared_and_trained_once(make_model, make_batch):
    model = randomised(get_peft_model(make_model("llama"), config()))
    found = cells(model)
    assert len(found) == 4
    assert [name for name, _ in model.named_parameters() if name.endswith(".A")] == [
        "base_model.model.model.layers.0.self_attn.compacter_cell.default.A"
    ]
    separate = [copy.deepcopy(found[0].A.detach()).requires_grad_(True) for _ in found]
    model(**make_batch("llama")).loss.backward()
    together = found[0].A.grad
    for cell, a in zip(found, separate, strict=True):
        holder = nn.Module()
        holder.A = nn.Parameter(a)
        cell._holder = [holder]
    model(**make_batch("llama")).loss.backward()
    torch.testing.assert_close(sum(cell._holder[0].A.grad for cell in found), together)


@pytest.mark.parametrize("low_memory", [False, True])
def test_sharing_outlives_saving_loading_and_copying(make_model, make_batch, tmp_path, low_memory):
    model = randomised(get_peft_model(make_model("bert"), config()))
    model.save_pretrained(tmp_path)
    assert sum(name.endswith(".A") for name in load_file(tmp_path / "adapter_model.safetensors")) == 1
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path, low_cpu_mem_usage=low_memory)
    for other in (loaded, copy.deepcopy(loaded)):
        before = other.eval()(**make_batch("bert")).logits
        torch.testing.assert_close(before, model(**make_batch("bert")).logits)
        shared = {id(cell._holder[0].A) for cell in cells(other)}
        assert shared == {id(cells(other)[0].A)}
    cells(loaded)[0].A.data.zero_()
    assert torch.equal(cells(other)[0].A, cells(model)[0].A)


def test_adapters_of_several_names_share_among_themselves_only(make_model, make_batch):
    model = get_peft_model(make_model("bert"), config(), adapter_name="one")
    model.add_adapter("two", config(n=4))
    first, second = ({id(cell._holder[0]) for cell in cells(model, name)} for name in ("one", "two"))
    assert len(first) == len(second) == 1
    assert first != second
    model.set_adapter("two")
    assert {p.shape for name, p in model.named_parameters() if p.requires_grad and name.endswith(".A")} == {(4, 4, 4)}


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"n": 3}, "n = 3 must divide the width 16 and the bottleneck 16 // 4 = 4"),
        ({"reduction_factor": 5}, "n = 2 must divide the width 16 and the bottleneck 16 // 5 = 3"),
        ({"reduction_factor": 17}, "bottleneck 16 // 17 = 0"),
    ],
)
def test_widths_that_n_does_not_divide_are_refused(make_model, fields, numbers):
    model = make_model("t5")
    with pytest.raises(ModelError, match=numbers):
        get_peft_model(model, config(**fields))
    assert not cells(model)


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("n", 2.0), ("reduction_factor", 0), ("reduction_factor", "8")])
def test_bad_fields_are_refused_by_name(field, value):
    for cls in (CompacterConfig, Compacter):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{field} = "):
            cls(**{field: value})


def test_the_method_adapts_every_block_and_its_files_hold_the_shared_factors_once(tmp_path):
    task = TinyTask(hidden=48)
    method = Compacter(n=2, reduction_factor=8)
    model = randomised(method.build(task))
    assert len(cells(model)) == 4
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("compacter_cell" in name or "classifier" in name for name in trained)
    deployed = method.finish(model, task)
    method.save(deployed, tmp_path)
    assert sum(name.endswith(".A") for name in load_file(tmp_path / "model.safetensors")) == 1
    loaded = method.load(tmp_path)
    batch = next(iter(task.batches("test", 4, 0)))
    torch.testing.assert_close(loaded(**batch).logits, deployed(**batch).logits)
