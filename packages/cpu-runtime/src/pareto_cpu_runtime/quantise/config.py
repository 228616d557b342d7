"""What to quantise, how finely, and by which method. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Literal

from pareto_core.config import Config
from pareto_core.errors import ConfigError

MethodName = Literal["rtn", "gptq", "awq", "teq", "signround", "autoround"]
#: group sizes that the packed format's kernels are tiled for; "channel" is one group per output
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
BITS = (3, 4, 8)
_BITS_ALLOWED = "allowed: 3, 4 or 8"
_GROUPS_ALLOWED = f'allowed: {", ".join(map(str, GROUP_SIZES))} or "channel"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision(Config):
    """How finely one matrix is quantised: ``bits`` per code, inputs per group, and whether codes lie around a zero."""

    bits: int = 4
    group_size: int | Literal["channel"] = 128
    symmetric: bool = True

    def validate(self) -> None:
        """Check ranges."""
        self.require("bits", self.bits in BITS, _BITS_ALLOWED)
        self.require("group_size", self.group_size in (*GROUP_SIZES, "channel"), _GROUPS_ALLOWED)

    def group(self, inputs: int) -> int:
        """Return the number of inputs that share a scale in a matrix of ``inputs`` inputs."""
        return inputs if self.group_size == "channel" else int(self.group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override(Config):
    """What a mixed precision changes for the operators that a pattern matches; a field left out stays as it is."""

    bits: int | None = None
    group_size: int | Literal["channel"] | None = None
    symmetric: bool | None = None

    def applied(self, precision: Precision) -> Precision:
        """Return ``precision`` with the fields that are set here; Raises ConfigError where one is out of range."""
        changes = {name: value for name, value in self.to_json().items() if value is not None}
        return dataclasses.replace(precision, **changes)

    def validate(self) -> None:
        """Check ranges."""
        self.applied(Precision())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQConfig(Config):
    """GPTQ: ``damping`` is relative to the mean of H's diagonal, ``block_columns`` the lazy update's width B."""

    damping: float = 0.01
    block_columns: int = 128
    activation_order: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("damping", 0.0 < self.damping <= 1.0, "must be above 0 and at most 1")
        self.require("block_columns", 1 <= self.block_columns <= 4096, "must be between 1 and 4096")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQConfig(Config):
    """AWQ: ``grid`` points of alpha in [0, 1), and ``clip_steps`` ratios from 1 down to ``1 - clip_range``."""

    grid: int = 20
    clip_steps: int = 10
    clip_range: float = 0.5

    def validate(self) -> None:
        """Check ranges."""
        self.require("grid", 1 <= self.grid <= 1000, "must be between 1 and 1000")
        self.require("clip_steps", 0 <= self.clip_steps <= 1000, "must be between 0 (no clipping) and 1000")
        self.require("clip_range", 0.0 < self.clip_range < 1.0, "must be above 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TEQConfig(Config):
    """TEQ: ``steps`` of Adam at ``learning_rate``, falling linearly to 0, over ``batch`` calibration rows each."""

    steps: int = 1000
    learning_rate: float = 1e-3
    batch: int = 8

    def validate(self) -> None:
        """Check ranges."""
        self.require("steps", 1 <= self.steps <= 100_000, "must be between 1 and 100000")
        self.require("learning_rate", 0.0 < self.learning_rate <= 1.0, "must be above 0 and at most 1")
        self.require("batch", 1 <= self.batch <= 1024, "must be between 1 and 1024")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundingConfig(Config):
    """SignRound and AutoRound: ``steps`` of signed gradients over ``batch`` calibration rows each.

    ``learning_rate`` None is 1 / steps; it falls linearly to 0.
    """

    steps: int = 200
    learning_rate: float | None = None
    batch: int = 8

    def validate(self) -> None:
        """Check ranges."""
        self.require("steps", 1 <= self.steps <= 100_000, "must be between 1 and 100000")
        rate = self.learning_rate
        self.require("learning_rate", rate is None or 0.0 < rate <= 1.0, "must be above 0 and at most 1, or nothing")
        self.require("batch", 1 <= self.batch <= 1024, "must be between 1 and 1024")

    @property
    def rate(self) -> float:
        """The first step's length."""
        return 1.0 / self.steps if self.learning_rate is None else self.learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisationConfig(Config):
    """A recipe: the method, the precision, what is left out, and the calibration.

    The linear operators of a model's repeated blocks and its output embedding are quantised; embeddings, norms, biases
    and other heads are kept. ``leave_out`` and the keys of ``mixed`` are module names or patterns (``*.down_proj``,
    ``lm_head``); where several keys match, the last one holds. ``leave_out_most_sensitive`` further keeps that many
    operators, those whose rounding disturbs their own output most (:mod:`pareto_cpu_runtime.quantise.sensitivity`).
    ``samples`` rows of ``length`` tokens are the calibration, ``batch_size`` rows run at a time.
    """

    method: MethodName = "rtn"
    bits: int = 4
    group_size: int | Literal["channel"] = 128
    symmetric: bool = True
    leave_out: tuple[str, ...] = ()
    leave_out_most_sensitive: int = 0
    mixed: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    samples: int = 128
    length: int = 512
    batch_size: int = 8
    seed: int = 0
    gptq: GPTQConfig = GPTQConfig()
    awq: AWQConfig = AWQConfig()
    teq: TEQConfig = TEQConfig()
    rounding: RoundingConfig = RoundingConfig()

    def validate(self) -> None:
        """Check ranges."""
        self.require("bits", self.bits in BITS, _BITS_ALLOWED)
        self.require("group_size", self.group_size in (*GROUP_SIZES, "channel"), _GROUPS_ALLOWED)
        for field in ("samples", "length", "batch_size"):
            self.require(field, getattr(self, field) >= 1, "must be at least 1")
        for field in ("leave_out_most_sensitive", "seed"):
            self.require(field, getattr(self, field) >= 0, "must not be negative")
        for field in ("leave_out", "mixed"):
            self.require(field, all(getattr(self, field)), "a name or pattern must not be empty")

    @property
    def calibrated(self) -> bool:
        """Whether this recipe looks at activations."""
        return self.method != "rtn" or self.leave_out_most_sensitive > 0

    def precision(self, name: str) -> Precision | None:
        """Return how the operator ``name`` is quantised, None where it is left out."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.leave_out):
            return None
        precision = Precision(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        for pattern, override in self.mixed.items():
            if fnmatch.fnmatchcase(name, pattern):
                precision = override.applied(precision)
        return precision

    def check_patterns(self, names: list[str]) -> None:
        """Raise :class:`ConfigError` where a pattern matches no operator: a misspelt one would change nothing."""
        for field in ("leave_out", "mixed"):
            for pattern in getattr(self, field):
                if not fnmatch.filter(names, pattern):
                    allowed = f"matches none of the operators, such as {', '.join(names[:3])}"
                    raise ConfigError(type(self).__name__, field, pattern, allowed)
