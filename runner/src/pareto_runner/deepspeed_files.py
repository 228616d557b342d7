"""How DeepSpeed writes and reads the files of a checkpoint here. Imported when a DeepSpeed engine starts."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

#: what DeepSpeed's files hold besides tensors and plain values: numbers in classes of its own
CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class TensorFiles(TorchCheckpointEngine):
    """Files of tensors, plain values and :data:`CLASSES`; reading one runs no code that it brings.

    A write that fails is kept as ``problem``, not raised: the other processes would wait for this one for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problem: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write ``state_dict`` to ``path``."""
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer says RuntimeError where a disk is full
            self.problem = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read ``path``; raises UnpicklingError where it holds anything else."""
        with torch.serialization.safe_globals(CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)
