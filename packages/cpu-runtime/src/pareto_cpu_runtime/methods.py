"""The package's techniques as methods that the runner measures: INT4 by six algorithms, and the search over them.

H. Shen, H. Chang, B. Dong, Y. Luo, H. Meng, "Efficient LLM Inference on CPUs", 2023, https://arxiv.org/abs/2311.00502.
The algorithms are in :mod:`pareto_cpu_runtime.quantise`; here a model is quantised on the task's training split,
packed, and deployed in the native runtime or, where that has not the architecture, in torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pareto_core import Measurement, Method, Paper, Task
from pareto_cpu_runtime.quantise.config import (
    AWQConfig,
    GPTQConfig,
    MethodName,
    Override,
    QuantisationConfig,
    RoundingConfig,
    TEQConfig,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

CHAPTER = Paper(
    "Efficient LLM Inference on CPUs",
    "H. Shen, H. Chang, B. Dong, Y. Luo, H. Meng",
    2023,
    "https://arxiv.org/abs/2311.00502",
)
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving(Method):
    """How a quantised model is deployed.

    ``engine`` is the native ``runtime``, or ``torch`` for architectures that it has not (encoders). ``kernel`` and
    ``compute`` narrow the choice of kernels, ``cache_dtype`` is the KV cache's, ``max_length`` its tokens (default: the
    model's positions, at most 2048), ``threads`` default to torch's; ``memory`` says whether weights are read or
    mapped. With ``ranks`` above 1 so many processes share the matrices and the CPUs (tensor parallelism).
    """

    paper: ClassVar[Paper | None] = CHAPTER
    finishes_exactly: ClassVar[bool] = False

    engine: Literal["runtime", "torch"] = "runtime"
    kernel: str = "auto"
    compute: Literal["", "int8", "fp16", "fp32", "bf16"] = ""
    cache_dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    max_length: int | None = None
    threads: int | None = None
    ranks: int = 1
    memory: Literal["read", "map"] = "read"

    def validate(self) -> None:
        """Check ranges."""
        for field in ("max_length", "threads"):
            value = getattr(self, field)
            self.require(field, value is None or value > 0, "must be above 0")
        self.require("ranks", self.ranks > 0, "must be above 0")
        alone = self.ranks == 1 or (self.engine == "runtime" and self.threads is None and self.memory == "read")
        self.require("ranks", alone, "above 1 needs the runtime, and takes neither threads nor memory")
        self.require("kernel", bool(self.kernel), 'must not be empty ("auto" chooses)')

    def build(
        self, task: Task, model: nn.Module | Mapping[str, nn.Module] | None = None, teacher: nn.Module | None = None
    ) -> nn.Module:
        """Return the backbone as it is: nothing is trained."""
        return self.starting_model(task, model)

    def deployed(self, quantised: Any) -> Any:
        """Pack a ``QuantisedModel`` and load it from the packed files."""
        from pareto_cpu_runtime.deployed import PackedFiles

        return self._load(PackedFiles.of(quantised))

    def _load(self, files: Any) -> Any:
        from pareto_cpu_runtime.deployed import deploy

        options: dict[str, Any] = {}
        if self.engine == "runtime":
            names = ["kernel", "compute", "cache_dtype", "max_length"]
            names += ["threads", "memory"] if self.ranks == 1 else ["ranks"]
            options = {name: getattr(self, name) for name in names}
        return deploy(files, self.engine, **options)

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """Bits per quantised weight, MiB of the packed file, and how many operators each kernel serves."""
        from pareto_cpu_runtime.checkpoint import load_packed

        packed = load_packed(deployed.files.directory, check=False)
        weights = sum(matrix.n * matrix.k for matrix in packed.matrices.values())
        bits = 8 * sum(matrix.bytes for matrix in packed.matrices.values()) / max(1, weights)
        found = [
            Measurement(name="bits_per_weight", value=bits, unit="bits"),
            Measurement(name="quantised_weights", value=weights, unit="weights"),
            Measurement(name="packed_mib", value=packed.weight_bytes / MIB, unit="MiB"),
        ]
        if self.engine == "runtime":
            for kernel, count in sorted(deployed.kernels().items()):
                found.append(Measurement(name=f"kernel.{kernel}", value=count, unit="operators"))
        return tuple(found)

    def save(self, deployed: Any, directory: Path) -> None:
        """Write the packed directory (:mod:`pareto_cpu_runtime.checkpoint`)."""
        deployed.files.copy_to(Path(directory))

    def load(self, directory: Path) -> Any:
        """Load a packed directory as these fields say; raises DataError where files are missing or damaged."""
        from pareto_cpu_runtime.deployed import PackedFiles

        return self._load(PackedFiles(Path(directory)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(Serving):
    """Base of the methods with one algorithm; fields as in :class:`~pareto_cpu_runtime.quantise.QuantisationConfig`."""

    algorithm: ClassVar[MethodName]

    bits: int = 4
    group_size: int | Literal["channel"] = 32
    symmetric: bool = True
    leave_out: tuple[str, ...] = ()
    leave_out_most_sensitive: int = 0
    mixed: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    samples: int = 128
    length: int = 512
    calibration_seed: int = 0

    def validate(self) -> None:
        """Check ranges, the quantisation's among them."""
        super().validate()
        self.require("calibration_seed", self.calibration_seed >= 0, "must not be negative")
        self.recipe()

    def recipe(self) -> QuantisationConfig:
        """The quantisation's configuration."""
        shared = {field for field in QuantisationConfig.field_names() if field in self.field_names()}
        fields = {field: getattr(self, field) for field in shared}
        return QuantisationConfig(method=self.algorithm, seed=self.calibration_seed, **fields)

    def prepare(self, task: Task) -> None:
        """Read the calibration's batches from the task's training split, where the algorithm looks at activations."""
        if self.recipe().calibrated:
            self._calibrations[_key(task)] = calibration_batches(task, self.recipe())

    @functools.cached_property
    def _calibrations(self) -> dict[str, list[torch.Tensor]]:
        return {}

    def finish(self, model: nn.Module, task: Task) -> Any:
        """Quantise, pack and deploy; calibrates on the task's training split."""
        from pareto_cpu_runtime.quantise import quantize

        calibration: Any = None
        if self.recipe().calibrated:
            if _key(task) not in self._calibrations:
                self.prepare(task)
            calibration = self._calibrations.pop(_key(task))
        return self.deployed(quantize(model.eval(), calibration, self.recipe()))


def _key(task: Task) -> str:
    return f"{task.name} {task.canonical()}"


def calibration_batches(task: Task, recipe: QuantisationConfig) -> list[torch.Tensor]:
    """Tokens without padding of so many training batches that they fill the recipe's samples, each (count,)."""
    found, needed = [], recipe.samples * recipe.length
    for batch in task.batches("train", min(recipe.batch_size, task.size("train")), recipe.seed):
        tokens, mask = batch["input_ids"], batch.get("attention_mask")
        found.append(tokens.reshape(-1) if mask is None else tokens[mask.bool()])
        needed -= len(found[-1])
        if needed <= 0:
            break
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN(Int4):
    """Round to nearest: no calibration."""

    algorithm: ClassVar[MethodName] = "rtn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Int4):
    """GPTQ: columns are rounded in turn, each error spread over those that follow."""

    paper: ClassVar[Paper | None] = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh",
        2022,
        "https://arxiv.org/abs/2210.17323",
    )
    algorithm: ClassVar[MethodName] = "gptq"

    gptq: GPTQConfig = dataclasses.field(default_factory=GPTQConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Int4):
    """AWQ: input channels that carry large activations are scaled up before rounding."""

    paper: ClassVar[Paper | None] = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "J. Lin, J. Tang, H. Tang, S. Yang, W.-M. Chen, W.-C. Wang, G. Xiao, X. Dang, C. Gan, S. Han",
        2023,
        "https://arxiv.org/abs/2306.00978",
    )
    algorithm: ClassVar[MethodName] = "awq"

    awq: AWQConfig = dataclasses.field(default_factory=AWQConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TEQ(Int4):
    """TEQ: the scales of the input channels are trained."""

    paper: ClassVar[Paper | None] = Paper(
        "TEQ: Trainable Equivalent Transformation for Quantization of LLMs",
        "W. Cheng, Y. Cai, K. Lv, H. Shen",
        2023,
        "https://arxiv.org/abs/2310.10944",
    )
    algorithm: ClassVar[MethodName] = "teq"

    teq: TEQConfig = dataclasses.field(default_factory=TEQConfig)


_ROUNDING = Paper(
    "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
    "W. Cheng, W. Zhang, H. Shen, Y. Cai, X. He, K. Lv, Y. Liu",
    2023,
    "https://arxiv.org/abs/2309.05516",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignRound(Int4):
    """SignRound: signed gradients decide which way each weight is rounded."""

    paper: ClassVar[Paper | None] = _ROUNDING
    algorithm: ClassVar[MethodName] = "signround"

    rounding: RoundingConfig = dataclasses.field(default_factory=RoundingConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoRound(Int4):
    """AutoRound: SignRound that learns where each group is clipped as well."""

    paper: ClassVar[Paper | None] = _ROUNDING
    algorithm: ClassVar[MethodName] = "autoround"

    rounding: RoundingConfig = dataclasses.field(default_factory=RoundingConfig)
