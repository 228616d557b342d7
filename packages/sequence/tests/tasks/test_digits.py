from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from pareto_core import DataError
from pareto_sequence.tasks.digits import Digits


def test_the_splits_make_up_the_set(bag: Any) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    task = Digits()
    sizes = {split: task.size(split) for split in ("train", "dev", "test")}
    assert sizes == {"train": 1258, "dev": 180, "test": 359}
    rows = np.concatenate([task.items(split).rows for split in ("train", "dev", "test")])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, images.astype(np.uint8)))
    by_image = dict(zip(map(bytes, images.astype(np.uint8)), labels, strict=True))
    (batch,) = task.batches("test", 359, 0)
    assert batch["input_values"].shape == (359, 64)
    assert float(batch["input_values"].max()) == 1.0
    for values, label in zip(batch["input_values"].numpy(), batch["labels"].tolist(), strict=True):
        assert by_image[bytes(np.rint(values * 16).astype(np.uint8))] == label
    records = task.records(bag(10), "dev")
    assert len(records) == 180
    assert task.requests()["forward"].inputs["input_values"].shape == (1, 64)


def test_seeds_split_differently() -> None:
    pytest.importorskip("sklearn")
    first, again, other = Digits(), Digits(), Digits(seed=1)
    assert np.array_equal(first.items("test").rows, again.items("test").rows)
    assert not np.array_equal(first.items("test").rows, other.items("test").rows)
    assert first.data_revision() == again.data_revision() != other.data_revision()


def test_without_scikit_learn_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"sequence\.digits needs scikit-learn.*pareto-sequence\[digits\]"):
        Digits().size("test")
