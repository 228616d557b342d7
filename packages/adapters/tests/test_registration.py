from __future__ import annotations

import copy
import enum
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import PeftType

import pareto_adapters
from pareto_adapters import KronAConfig
from pareto_adapters._peft import Cell, TunerConfig
from pareto_adapters._registration import add_member, register
from pareto_adapters.krona import KronACell
from pareto_core import ModelError


def test_a_member_added_behaves_like_one_declared():
    class Kind(str, enum.Enum):  # noqa: UP042 (what PEFT's enumeration is)
        OLD = "OLD"

    new = add_member(Kind, "NEW")
    assert add_member(Kind, "NEW") is new
    assert Kind.NEW is Kind("NEW") is Kind["NEW"] is new
    assert list(Kind) == [Kind.OLD, new]
    assert len(Kind) == 2
    assert new in Kind
    assert isinstance(new, Kind)
    assert (new.name, new.value, new == "NEW") == ("NEW", "NEW", True)
    assert repr(new).endswith("Kind.NEW: 'NEW'>")
    assert copy.deepcopy(new) is new


def test_the_members_pickle():
    member = PeftType["KRONA"]
    assert pickle.loads(pickle.dumps(member)) is member
    config = KronAConfig(a_shape=(2, 2), target_modules=["q"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert config.peft_type is member


def test_importing_the_package_is_cheap_and_names_load_on_first_use():
    code = "import sys, pareto_adapters; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert pareto_adapters.KronAConfig is KronAConfig
    assert "KronA" in dir(pareto_adapters)
    with pytest.raises(AttributeError, match="no attribute 'Krona'"):
        _ = pareto_adapters.Krona


def test_registering_again_replaces_and_a_name_that_is_taken_is_refused():
    from peft import mapping

    before = mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType["KRONA"]]
    _, tuner = register(KronAConfig, KronACell)
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType["KRONA"]] is tuner
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType["KRONA"]] = before

    class OtherConfig(TunerConfig):
        peft_name = "lora"

    with pytest.raises(ModelError, match="already has a method 'lora'"):
        register(OtherConfig, Cell)


def test_a_config_loads_under_its_own_class(tmp_path):
    KronAConfig(a_shape=(2, 4), scale=0.5, target_modules=["q", "v"], init="normal").save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is KronAConfig
    assert (loaded.a_shape, loaded.scale, loaded.init) == ((2, 4), 0.5, "normal")
    assert loaded.target_modules == {"q", "v"}


@pytest.mark.parametrize("ours_outside", [True, False])
def test_stacked_tuners_are_refused_before_anything_changes(make_model, make_batch, ours_outside):
    model = make_model("bert").eval()
    configs = [LoraConfig(r=2, init_lora_weights=False, target_modules=["query"])]
    configs.insert(0 if not ours_outside else 1, KronAConfig(a_shape=(4, 4), init="normal", target_modules=["query"]))
    inner = get_peft_model(model, configs[0])
    for config in configs[1:]:
        outer = get_peft_model(inner.base_model.model, config).eval()
    batch = make_batch("bert")
    before = outer(**batch).logits
    state = {key: value.clone() for key, value in outer.state_dict().items()}
    with pytest.raises(ModelError, match=r"two tuners on .*query.*merge_adapter\(\) and then unload\(\)"):
        outer.merge_and_unload()
    with pytest.raises(ModelError, match=r"two tuners on .*query.*unload would drop the inner one"):
        outer.unload()
    assert all(torch.equal(value, state[key]) for key, value in outer.state_dict().items())
    outer.merge_adapter()
    torch.testing.assert_close(outer(**batch).logits, before, atol=1e-5, rtol=0)
    torch.testing.assert_close(outer.unload()(**batch).logits, before, atol=1e-5, rtol=0)


def test_peft_alone_still_merges(make_model, make_batch):
    model = get_peft_model(make_model("bert").eval(), LoraConfig(init_lora_weights=False, target_modules=["query"]))
    before = model(**make_batch("bert")).logits
    torch.testing.assert_close(model.merge_and_unload()(**make_batch("bert")).logits, before, atol=1e-5, rtol=0)
