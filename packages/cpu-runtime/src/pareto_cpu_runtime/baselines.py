"""What INT4 in our runtime is compared with: the same model in plain torch, in fp32, in bf16, and in torch's own INT4.

A. Paszke et al., "PyTorch: An Imperative Style, High-Performance Deep Learning Library", 2019,
https://arxiv.org/abs/1912.01703.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pareto_core import DataError, Measurement, Method, ModelError, Paper, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

PYTORCH = Paper(
    "PyTorch: An Imperative Style, High-Performance Deep Learning Library",
    "A. Paszke, S. Gross, F. Massa, A. Lerer, J. Bradbury, G. Chanan, and others",
    2019,
    "https://arxiv.org/abs/1912.01703",
)
#: group sizes of torch's product, and what the number of outputs must be a multiple of
GROUP_SIZES, OUTPUTS = (32, 64, 128, 256), 16
_DESCRIPTION = "torch_int4.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFP32(Method):
    """The task's backbone as it is, in fp32."""

    paper: ClassVar[Paper | None] = PYTORCH

    def build(
        self, task: Task, model: nn.Module | Mapping[str, nn.Module] | None = None, teacher: nn.Module | None = None
    ) -> nn.Module:
        """Return the backbone: nothing is trained."""
        return self.starting_model(task, model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchBF16(TorchFP32):
    """The backbone with weights and activations in bf16."""

    finishes_exactly: ClassVar[bool] = False

    def finish(self, model: nn.Module, task: Task) -> Any:
        """Round the weights to bf16."""
        return _in_bf16(model).eval()

    def load(self, directory: Path) -> Any:
        """Read a transformers model in bf16; raises :class:`DataError` where files are missing or do not fit."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise DataError(f"no config.json in {directory}: not a saved model")
        return _filled(_empty(directory, str(json.loads(path.read_text())["architectures"][0])), directory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchInt4(TorchFP32):
    """Torch's weight-only INT4 product for CPUs: asymmetric groups, rounded to nearest, activations in bf16.

    Linear layers whose outputs are no multiple of 16 stay in bf16, as do those in ``leave_out`` (module names).
    """

    finishes_exactly: ClassVar[bool] = False

    group_size: Literal[32, 64, 128, 256] = 32
    leave_out: tuple[str, ...] = ()

    def finish(self, model: nn.Module, task: Task) -> Any:
        """Replace the linear layers; raises :class:`ModelError` where there is none that groups divide."""
        import torch

        names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        for name in self.leave_out:
            if name not in names:
                raise ModelError(f"leave_out: the model has no linear layer {name!r}")
        model = _in_bf16(model).eval()
        if not _replace(model, self.group_size, lambda name, module: name not in self.leave_out):
            raise ModelError(f"{type(model).__name__} has no linear layer that groups of {self.group_size} divide")
        return model

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """How many layers torch's INT4 product serves, and bits per weight of theirs."""
        layers = [module for module in deployed.modules() if hasattr(module, "scales_and_zeros")]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        held = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in _held(layer))
        return (
            Measurement(name="bits_per_weight", value=8 * held / max(1, weights), unit="bits"),
            Measurement(name="kernel.torch_int4pack", value=len(layers), unit="operators"),
        )

    def save(self, deployed: Any, directory: Path) -> None:
        """Write the configuration, the names of the replaced layers, and all tensors."""
        from safetensors.torch import save_model

        directory.mkdir(parents=True, exist_ok=True)
        layers = [name for name, module in deployed.named_modules() if hasattr(module, "scales_and_zeros")]
        description = {"architecture": type(deployed).__name__, "group_size": self.group_size, "layers": layers}
        (directory / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        deployed.config.save_pretrained(directory)
        save_model(deployed, str(directory / "model.safetensors"))

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote; raises :class:`DataError` where it is missing or does not fit."""
        path = Path(directory) / _DESCRIPTION
        if not path.is_file():
            raise DataError(f"no {_DESCRIPTION} in {directory}: not a model of this method")
        description = json.loads(path.read_text())
        model = _empty(directory, description["architecture"])
        _replace(model, description["group_size"], lambda name, module: name in description["layers"])
        return _filled(model, directory)


def _in_bf16(model: Any) -> Any:
    """Round the weights, in place; computed buffers (rotary frequencies) stay in fp32, as transformers has them."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _empty(directory: Path, architecture: str) -> Any:
    """A model of the saved configuration in bf16, its weights yet to be read."""
    import torch
    from transformers import AutoConfig

    from pareto_cpu_runtime.quantise.restore import model_class

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    return model_class(architecture)._from_config(config, dtype=torch.bfloat16)


def _filled(model: Any, directory: Path) -> Any:
    from safetensors.torch import load_model

    missing, unexpected = load_model(model, Path(directory) / "model.safetensors", strict=False)
    if missing or unexpected:
        raise DataError(f"{directory}: missing weights {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}")
    return model.requires_grad_(False).eval()


def _held(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.packed, layer.scales_and_zeros


def _replace(model: Any, group: int, wanted: Any) -> int:
    """Replace the linear layers that are ``wanted`` and fit, in place; returns how many."""
    from torch import nn

    from pareto_cpu_runtime.torch_int4 import Int4PackLinear

    count = 0
    for name, module in list(model.named_modules()):
        fits = isinstance(module, nn.Linear) and not (module.in_features % group or module.out_features % OUTPUTS)
        if fits and wanted(name, module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int4PackLinear(module, group))
            count += 1
    return count
