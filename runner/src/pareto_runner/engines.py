"""The engines that take optimizer steps: DeepSpeed, and the plain PyTorch loop that its cost is measured against."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pareto_core import Batch, Edit, Engine, Training, UnsupportedError
from pareto_core.cache import cache_directory
from pareto_core.edit import LocalEdit
from pareto_runner.shares import loss_of, shares, shifts_labels

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pareto_runner.deepspeed_files import TensorFiles


class Loop(Protocol):
    """An engine at work on one model: takes optimizer steps, and gives the model back."""

    edit: Edit

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take one optimizer step over a global batch; returns its mean loss."""
        ...

    def anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; all processes ask together, and wait for each other."""
        ...

    def save(self, folder: Path) -> None:
        """Write trained weights, buffers and the optimizer's state into ``folder``; all processes together.

        Frozen weights are left out: whoever goes on has built them again.

        Raises OSError or RuntimeError in the process that could not write its part.
        """
        ...

    def load(self, folder: Path) -> None:
        """Put a loop that has taken no step into the state that :meth:`save` wrote; all processes together."""
        ...

    def finish(self) -> nn.Module:
        """Return the trained module, whole and free of the engine."""
        ...


def distributed() -> tuple[int, int]:
    """Return (rank, world size) as the launcher set them; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init_deepspeed(accelerator: str) -> None:
    """Import DeepSpeed and start its communication, building its shared-memory op the first time (CPU).

    Raises UnsupportedError where the op cannot be built, with the build's own words.
    """
    os.environ["DS_ACCELERATOR"] = accelerator
    # One folder per environment: environments that share one compile it anew each time they take turns.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_directory() / "extensions" / environment))
    if "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(single)
    import deepspeed
    import torch

    try:
        deepspeed.init_distributed(dist_backend="nccl" if accelerator == "cuda" else "gloo", verbose=False)
    except (RuntimeError, ImportError) as error:
        raise UnsupportedError(
            f"DeepSpeed could not start: {error}. On a CPU it compiles a small C++ extension: install a C++ compiler "
            "(Debian and Ubuntu: apt-get install g++) and Python's headers (python3-dev)"
        ) from error
    if accelerator == "cpu":
        torch.distributed.barrier()  # every rank has mapped every buffer
        unlink_shared_memory()


def unlink_shared_memory(directory: Path = Path("/dev/shm")) -> None:
    """Remove this rank's buffer for all-reduces, 66 MiB, by name: DeepSpeed never does, and mapped it stays in use."""
    place = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    for path in directory.glob(f"deepspeed_allreduce_buffer_*{place}"):
        with contextlib.suppress(OSError):
            path.unlink()


def deepspeed_config(training: Training, engine: Engine, precision: str, world: int) -> dict[str, Any]:
    """Translate a stage's training and engine into DeepSpeed's configuration."""
    pieces = world * training.gradient_accumulation
    if training.batch_size % pieces:
        raise UnsupportedError(
            f"batch_size {training.batch_size} does not divide into {world} processes × "
            f"{training.gradient_accumulation} accumulation steps"
        )
    parameters: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer != "sgd":
        parameters["torch_adam"] = True
    names = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
    config: dict[str, Any] = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // pieces,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": training.gradient_clipping,
        "optimizer": {"type": names[training.optimizer], "params": parameters},
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if training.optimizer == "adam":
        parameters["adam_w_mode"] = False
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


class DeepSpeedLoop:
    """Training steps through ``deepspeed.initialize``.

    ``rebuild`` makes the untrained module again: under ZeRO-3 the trained weights are gathered into a fresh one, since
    the sharded module cannot leave the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        engine: Engine,
        precision: str,
        device: str,
        rebuild: Callable[[], nn.Module],
    ) -> None:
        import deepspeed

        self._rank, self._world = distributed()
        self._training, self._zero_stage, self._device, self._rebuild = training, engine.zero_stage, device, rebuild
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=deepspeed_config(training, engine, precision, self._world),
        )
        self._optimizer: Any = optimizer
        self._dtype = next(p.dtype for p in self._engine.module.parameters() if p.is_floating_point())
        self._shifted = shifts_labels(model)
        self._files = self._keep_files()
        self.edit: Edit = DeepSpeedEdit(self._optimizer)

    def _keep_files(self) -> TensorFiles:
        """Have the engine write and read its checkpoints through :class:`TensorFiles`.

        The scripts that it copies beside them are left out: code has no place there, and where the disk is full their
        copying would end one process while the others wait for it.
        """
        from pareto_runner.deepspeed_files import TensorFiles

        files = TensorFiles()
        self._engine.checkpoint_engine = files
        self._engine._copy_recovery_script = lambda _: None
        return files

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take one optimizer step; each process works on its share of the batch."""
        set_learning_rate(self._optimizer, learning_rate)
        accumulation = self._training.gradient_accumulation
        total: Any = 0.0
        for piece, share in shares(batch, self._rank, self._world, accumulation, self._shifted):
            output = self._engine(**{key: self._placed(value) for key, value in piece.items()})
            loss = loss_of(output, share)
            # The engine averages gradients over the processes and divides them by the accumulation steps.
            self._engine.backward(loss * (self._world * accumulation))
            self._engine.step()
            total += loss.detach()
        return self._over_ranks(float(total))

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        """Move an input to the device; numbers (a regression's labels) take the precision of the model."""
        return value.to(self._device, self._dtype if value.is_floating_point() else None)

    def _over_ranks(self, value: float) -> float:
        """Sum over processes."""
        if self._world == 1:
            return value
        import torch
        from deepspeed import comm

        total = torch.tensor([value], dtype=torch.float64, device=self._device)
        comm.all_reduce(total)
        return float(total)

    def anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process."""
        return self._over_ranks(float(flag)) > 0

    def save(self, folder: Path) -> None:
        """Have DeepSpeed write its checkpoint."""
        self._files.problem = None
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        if self._files.problem is not None:
            raise self._files.problem

    def load(self, folder: Path) -> None:
        """Have DeepSpeed read its checkpoint; raises OSError where it finds none."""
        found, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        if found is None:
            raise OSError(f"DeepSpeed finds no checkpoint in {folder}")

    def finish(self) -> nn.Module:
        """Return the trained module (ZeRO-3: gathered into a fresh one)."""
        module: nn.Module = self._engine.module
        if self._zero_stage == 3:
            module = self._gather(module)
        self._engine.destroy()
        return module

    def _gather(self, sharded: nn.Module) -> nn.Module:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
            state = {name: tensor.detach().clone() for name, tensor in sharded.state_dict().items()}
        fresh = self._rebuild().to(self._device)
        fresh.load_state_dict(state)
        return fresh


class TorchLoop:
    """The same steps without an engine: what DeepSpeed is compared with, one process."""

    def __init__(self, model: nn.Module, training: Training, precision: str, device: str) -> None:
        import torch

        self._model, self._training, self._device = model.to(device), training, device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        makers = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        maker: Any = makers[training.optimizer]
        self._optimizer = maker(self._parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._autocast = torch.autocast(device.split(":")[0], types.get(precision), enabled=precision != "fp32")
        self._shifted = shifts_labels(model)
        self.edit: Edit = LocalEdit(self._optimizer)

    def step(self, batch: Batch, learning_rate: float) -> float:
        """Take one optimizer step."""
        import torch

        set_learning_rate(self._optimizer, learning_rate)
        total: Any = 0.0
        for piece, share in shares(batch, 0, 1, self._training.gradient_accumulation, self._shifted):
            with self._autocast:
                output = self._model(**{key: value.to(self._device) for key, value in piece.items()})
            loss = loss_of(output, share)
            loss.backward()
            total += loss.detach()
        if self._training.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._training.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(total)

    def anywhere(self, flag: bool) -> bool:
        """Return ``flag``: there is one process."""
        return flag

    def save(self, folder: Path) -> None:
        """Write one file."""
        import torch

        frozen = {name for name, p in self._model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        weights = {name: value for name, value in self._model.state_dict().items() if name not in frozen}
        torch.save({"weights": weights, "optimizer": self._optimizer.state_dict()}, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        import torch

        state = torch.load(folder / "engine.pt", map_location="cpu", weights_only=True)
        self._model.load_state_dict(state["weights"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])

    def finish(self) -> nn.Module:
        """Return the module, which was trained in place."""
        return self._model


class DeepSpeedEdit(LocalEdit):
    """Reads and writes full parameters through DeepSpeed wherever it holds shards or fp32 masters of its own."""

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the fp32 master."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not _managed(parameter):
            return super().get(parameter)
        value: torch.Tensor = safe_get_full_fp32_param(parameter)
        return value.detach().clone()

    def set(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Write the parameter and its fp32 master."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        if _managed(parameter):
            safe_set_full_fp32_param(parameter, value)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                super().set(parameter, value)
        else:
            super().set(parameter, value)

    def get_state(self, parameter: torch.Tensor, key: str) -> torch.Tensor | None:
        """Return the optimizer state ``key``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not _managed(parameter):
            return super().get_state(parameter, key)
        value = safe_get_full_optimizer_state(parameter, key)
        return None if value is None else value.detach().clone()

    def set_state(self, parameter: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """Write the optimizer state ``key``."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if _managed(parameter):
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            super().set_state(parameter, key, value)


def _managed(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id") or getattr(parameter, "_hp_mapping", None) is not None


def make_loop(
    model: nn.Module,
    training: Training,
    engine: Engine,
    precision: str,
    device: str,
    accelerator: str | None,
    rebuild: Callable[[], nn.Module],
) -> Loop:
    """Start the engine that a run names; raises UnsupportedError where DeepSpeed has no accelerator for the target."""
    if engine.name == "torch":
        return TorchLoop(model, training, precision, device)
    if accelerator is None:
        raise UnsupportedError("DeepSpeed has no accelerator for this target")
    init_deepspeed(accelerator)
    return DeepSpeedLoop(model, training, engine, precision, device, rebuild)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
