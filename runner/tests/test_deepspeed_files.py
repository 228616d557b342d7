"""Files of DeepSpeed's checkpoints: its own classes come back, other objects do not, and a failed write is kept."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pareto_runner.deepspeed_files import TensorFiles


def test_what_deepspeed_stores_comes_back(tmp_path: Path) -> None:
    path = str(tmp_path / "states.pt")
    scaler = DynamicLossScaler(
        init_scale=2**16,
        scale_window=100,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
        dtype=torch.float16,
    )
    scaler.cur_scale, scaler.cur_iter = 2**15, 7
    state = {
        "dynamic": scaler,
        "static": LossScaler(8.0),
        "stage": ZeroStageEnum.gradients,
        "place": fragment_address(numel=3, start=4),
        "weights": torch.arange(3.0),
        "shape": torch.Size([2, 3]),
    }
    files = TensorFiles()
    files.save(state, path)
    assert files.problem is None
    found = files.load(path, map_location="cpu")
    assert vars(found["dynamic"]) == vars(scaler)
    assert found["static"].loss_scale == 8.0
    assert (found["stage"], found["place"], found["shape"]) == (state["stage"], state["place"], state["shape"])
    assert torch.equal(found["weights"], torch.arange(3.0))


def test_any_other_object_is_refused(tmp_path: Path) -> None:
    torch.save({"path": tmp_path}, tmp_path / "states.pt")
    with pytest.raises(pickle.UnpicklingError, match="Path"):
        TensorFiles().load(str(tmp_path / "states.pt"))


def test_a_failed_write_is_kept_and_not_raised(tmp_path: Path) -> None:
    files = TensorFiles()
    files.save({}, str(tmp_path / "nowhere" / "states.pt"))
    assert isinstance(files.problem, RuntimeError | OSError)
