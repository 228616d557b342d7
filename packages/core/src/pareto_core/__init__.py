"""The six concepts that Pareto's techniques share: Method, Task, Target, RunSpec, Measurement and Result."""

from pareto_core.config import Config
from pareto_core.errors import (
    ConfigError,
    DataError,
    ModelError,
    ParetoError,
    TrainingError,
    UnknownNameError,
    UnsupportedError,
)
from pareto_core.method import Deployed, Edit, Method, Paper
from pareto_core.result import Comparison, Difference, Measurement, Result
from pareto_core.spec import Budget, Engine, MethodSpec, RunSpec, Stage, TaskRef, Training
from pareto_core.target import Probe, Target
from pareto_core.task import Batch, Metric, Protocol, Record, Request, Split, Task, TaskSpec

__all__ = [
    "Batch",
    "Budget",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "Deployed",
    "Difference",
    "Edit",
    "Engine",
    "Measurement",
    "Method",
    "MethodSpec",
    "Metric",
    "ModelError",
    "Paper",
    "ParetoError",
    "Probe",
    "Protocol",
    "Record",
    "Request",
    "Result",
    "RunSpec",
    "Split",
    "Stage",
    "Target",
    "Task",
    "TaskRef",
    "TaskSpec",
    "Training",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedError",
]
