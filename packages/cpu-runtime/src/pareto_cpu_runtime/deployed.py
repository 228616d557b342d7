"""What quantised models are deployed as: the native runtime, or a transformers model whose linear layers hold codes.

Both come from a packed directory, so that what is scored is what is stored.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pareto_core.errors import UnsupportedError
from pareto_cpu_runtime.checkpoint import PackedModel, copy_packed, load_packed, restore, save_packed
from pareto_cpu_runtime.families import FAMILIES, fusions
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear, QuantisedModel
from pareto_cpu_runtime.runtime import Runtime


class PackedFiles:
    """A packed directory; one of our own is removed with this object."""

    def __init__(self, directory: Path, own: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.directory, self._own = directory, own

    @classmethod
    def of(cls, model: QuantisedModel) -> PackedFiles:
        """Write ``model`` to a directory of our own, fused as the runtime wants it where it has the architecture."""
        own = tempfile.TemporaryDirectory(prefix="pareto-packed-")
        known = getattr(model.config, "model_type", None) in FAMILIES
        save_packed(model, Path(own.name), fusions(model.config) if known else ())
        return cls(Path(own.name), own)

    def copy_to(self, directory: Path) -> None:
        """Copy the files to ``directory``; a model that lies there and is in use stays whole for who uses it."""
        copy_packed(self.directory, directory)


class DeployedRuntime:
    """A packed model in the native runtime: called, and generates, as a transformers model does."""

    def __init__(self, runtime: Runtime, files: PackedFiles) -> None:
        self.runtime, self.files = runtime, files

    def __call__(self, **batch: Any) -> Any:
        """Return transformers' output with fp32 ``logits`` (rows, length, vocabulary) and, given labels, ``loss``."""
        return self.runtime(**batch)

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> torch.Tensor:
        """Continue texts with transformers' arguments; see :mod:`pareto_cpu_runtime.generate`."""
        return self.runtime.generate(input_ids, attention_mask, **options)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.runtime.weight_bytes

    def kernels(self) -> Counter[str]:
        """How many operators each kernel serves."""
        return Counter(str(row["kernel"]) for row in self.runtime.kernels().values())


class CodesLinear(nn.Module):
    """A linear layer that holds codes, two to a byte where they have four bits, and dequantises them when it is called.

    It shows what quantisation does to any transformers model, encoders included; it is not fast.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, matrix: QuantisedLinear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self._group, self._bits, self._multiplier = matrix.group, matrix.bits, matrix.multiplier
        self._halved = matrix.store_bits == 4 and self.in_features % 2 == 0
        codes = matrix.codes
        self.register_buffer("codes", codes[:, ::2] | (codes[:, 1::2] << 4) if self._halved else codes)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("zeros", matrix.zeros)
        self.register_buffer("bias", bias)

    def matrix(self) -> QuantisedLinear:
        """The codes with their scales, one code to a byte."""
        codes = self.codes
        if self._halved:
            codes = torch.stack((codes & 15, codes >> 4), 2).view(self.out_features, self.in_features)
        return QuantisedLinear(codes, self.scales, self.zeros, self._multiplier, self._group, self._bits)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight in fp32, (out_features, in_features)."""
        return self.matrix().dequantise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` W^T + b of shape (..., out_features), in the dtype of ``x``."""
        bias = self.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return nn.functional.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def torch_model(packed: PackedModel, files: PackedFiles) -> Any:
    """Return the packed model as a transformers model in evaluation mode whose quantised layers hold codes."""
    matrices = packed.linears()
    model = restore(packed, matrices)
    for name, matrix in matrices.items():
        parent, _, child = name.rpartition(".")
        bias = getattr(model.get_submodule(name), "bias", None)
        layer = CodesLinear(matrix, None if bias is None else bias.detach())
        setattr(model.get_submodule(parent), child, layer)
    model.files = files
    return model.requires_grad_(False).eval()


def deploy(files: PackedFiles, engine: str, **options: Any) -> Any:
    """Load a packed directory into the ``engine``: ``runtime`` or ``torch``; ``options`` are the runtime's,
    ``ranks`` among them where several processes share it.

    Raises :class:`UnsupportedError` where the runtime lacks the architecture, and :class:`DataError` for damaged files.
    """
    if engine == "torch":
        return torch_model(load_packed(files.directory), files)
    kind = load_packed(files.directory, check=False).config.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(
            f'the runtime has no architecture {kind!r} (it has {", ".join(sorted(FAMILIES))}); engine = "torch" has any'
        )
    if "ranks" in options:
        from pareto_cpu_runtime.parallel import ParallelRuntime

        return DeployedRuntime(ParallelRuntime(files.directory, **options), files)
    return DeployedRuntime(Runtime.from_pretrained(files.directory, **options), files)
