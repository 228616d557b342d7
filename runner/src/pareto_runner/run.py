"""One run, top to bottom: ``prepare`` trains and scores a variant, ``measure`` times several in turns.

``prepare`` is executed in a process of its own (worker.py). ``measure`` runs in the parent and talks to one worker
process per variant. Everything around them (command line, journal, MLflow, report) is in suite.py and cli.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core import Measurement, Method, ModelError, Record, Result, RunSpec, Stage, Target, Task, UnknownNameError
from pareto_core.cache import write_json
from pareto_core.weights import check_finite, freeze, parameter_counts, weight_bytes
from pareto_runner import discover
from pareto_runner.checkpoint import CHECKPOINT_SECONDS, Checkpoints, identity_of
from pareto_runner.compare import carried_quantile, paired_difference, resample_scores
from pareto_runner.engines import Loop, distributed, init_deepspeed, make_loop
from pareto_runner.machine import context, machine, packages_of
from pareto_runner.phases import MIB, Phases
from pareto_runner.randomness import seed_everything
from pareto_runner.train import TrainingRun, train

if TYPE_CHECKING:
    from torch import nn

#: largest change of a logit that an exact ``finish`` may cause, relative to the largest logit
FINISH_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}

OnStep = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A prepared variant on disk: the deployed model, and the result so far (all but latencies)."""

    directory: Path
    result: Result

    @property
    def spec(self) -> RunSpec:
        """The specification that it was prepared from."""
        return self.result.spec

    def write(self) -> None:
        """Store the result beside the deployed model."""
        write_json(self.directory / "result.json", self.result.to_json())

    @classmethod
    def read(cls, directory: Path) -> Artifact:
        """Read what :meth:`write` wrote."""
        return cls(directory, Result.from_json(json.loads((directory / "result.json").read_text())))

    def records(self) -> list[Record]:
        """The scored records of the evaluation split."""
        return [Record(**record) for record in json.loads((self.directory / "records.json").read_text())]

    def libraries(self) -> list[str]:
        """Python modules that define what the deployed model is made of."""
        names: list[str] = json.loads((self.directory / "libraries.json").read_text())
        return names


def prepare(
    spec: RunSpec,
    directory: Path,
    labels: Path | None = None,
    on_step: OnStep = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Artifact:
    """Build, train, finish, score and save one variant in this process; every phase has its time and peak memory.

    ``labels`` is the artifact of the variant that a stage's ``labels_from`` names. Training goes on from the checkpoint
    of an earlier process that was cut short in the same directory, and leaves one every ``checkpoint_seconds``; what
    becomes of them goes to ``note``.
    """
    target, task = discover.make_target(spec.target), discover.make_task(spec.task)
    methods = [[discover.make_method(method) for method in stage.methods] for stage in spec.stages]
    if spec.engine.name == "deepspeed" and target.deepspeed_accelerator:
        init_deepspeed(target.deepspeed_accelerator)
    phases = Phases(target)
    with phases("prepare"):
        seed_everything(spec.seed)
        revision = task.data_revision()
        check_requests(spec, task)
        stage_task = task if labels is None else relabelled(task, labels)
    phases.start_from_here()
    with phases("build"):
        model: Any = task.frozen_backbone()
    teachers: dict[str, Any] = keep_teachers(spec.stages, "backbone", model)
    curve: list[tuple[int, float]] = []
    resumed = 0
    for number, (stage, together) in enumerate(zip(spec.stages, methods, strict=True)):
        own_task = stage_task if stage.labels_from else task
        work = StageWork(spec, stage, together, target, own_task, phases, teachers)
        checkpoints = Checkpoints(
            directory / "checkpoint" / f"stage{number}",
            identity_of(spec, number, own_task.data_revision()),
            phases,
            note,
            checkpoint_seconds,
            keep_trained=number + 1 < len(spec.stages),
        )
        model, run = work.train(model, on_step, checkpoints)
        if run is not None:
            curve += [(len(curve) + step, loss) for step, loss in run.curve]
            resumed += run.resumed_steps
            phases.add(training_measurements(run))
        with phases("finish"):
            model = work.finish(model)
        teachers.update(keep_teachers(spec.stages, stage.name, model))
    with phases("evaluate"):
        records = task.records(model, task.evaluation_split)
        scores = task.score(records)
    with phases("resample"):
        resampled = resample_scores(task, records)
    if resumed:
        phases.add([Measurement(name="resumed_steps", value=resumed, unit="steps")])
    phases.add(score_measurements(scores, task.units, len(records)))
    phases.add([Measurement(name="weight_mib", value=weight_bytes(model) / MIB, unit="MiB")])
    for method in methods[-1]:
        phases.add(method.figures(model))
    result = Result(
        spec=spec,
        status="ok",
        measurements=tuple(phases.measurements()),
        metric=task.primary_metric.name,
        higher_is_better=task.primary_metric.higher_is_better,
        resampled=resampled,
        machine=machine(),
        context=context(packages_of(spec)),
        curve=tuple(curve),
        data=revision,
        paper=dataclasses.asdict(method.paper) if method.paper else {},
    )
    artifact = Artifact(directory, result)
    if distributed()[0] == 0:
        method.save(model, directory / "deployed")
        save_reference(task, model, target, directory, records)
        artifact.write()
        shutil.rmtree(directory / "checkpoint", ignore_errors=True)
    return artifact


class StageWork:
    """One stage at work: builds its methods in order, trains them together, finishes them in order."""

    def __init__(
        self,
        spec: RunSpec,
        stage: Stage,
        methods: Sequence[Method],
        target: Target,
        task: Task,
        phases: Phases,
        teachers: Mapping[str, Any],
    ) -> None:
        self.spec, self.stage, self.methods = spec, stage, methods
        self.target, self.task, self.phases = target, task, phases
        self.teacher = teachers[stage.teacher] if stage.teacher else None
        self.precision = spec.engine.precision or target.default_precision

    def build(self, model: Any) -> Any:
        """Hand the frozen model through every method's ``build``."""
        with self.phases("prepare"):
            for method in self.methods:
                method.prepare(self.task)
        with self.phases("build"):
            model = freeze(model)
            for method in self.methods:
                model = method.build(self.task, model, self.teacher)
            check_finite(model)
        return model

    def loop(self, model: Any) -> Loop:
        """Start the training engine on a built model."""
        spec, target = self.spec, self.target
        return make_loop(
            model,
            self.stage.training,
            spec.engine,
            self.precision,
            target.device,
            target.deepspeed_accelerator,
            self.rebuild,
        )

    def rebuild(self) -> nn.Module:
        """Make the untrained module of a first stage again; a later stage's start is gone and cannot be."""
        if self.stage is not self.spec.stages[0]:
            raise ModelError("ZeRO-3 is supported in the first stage only; use zero_stage 2 for the later ones")
        seed_everything(self.spec.seed)
        model: Any = freeze(self.task.backbone())
        for method in self.methods:
            model = method.build(self.task, model, self.teacher)
        trained: nn.Module = model
        return trained

    def train(self, model: Any, on_step: OnStep, checkpoints: Checkpoints) -> tuple[Any, TrainingRun | None]:
        """Build and, where anything is trainable, train; returns the model and what training left."""
        model = self.build(model)
        trainable, total = parameter_counts(model)
        self.phases.add(parameter_measurements(trainable, total))
        if not trainable:
            return model.to(self.target.device), None
        with self.phases("build"):
            loop = self.loop(model)
        with self.phases("train"):
            seed = self.spec.seed
            run = train(loop, model, self.task, self.methods, self.stage.training, seed, on_step, checkpoints)
        return loop.finish().eval(), run

    def finish(self, model: Any) -> Any:
        """Hand the trained model through every method's ``finish`` and check those that promise equal outputs."""
        exact = all(method.finishes_exactly for method in self.methods)
        before = probe_logits(self.task, model) if exact else None
        for method in self.methods:
            model = method.finish(model, self.task)
        if before is not None:
            difference = relative_difference(before, probe_logits(self.task, model))
            self.phases.add([Measurement(name="finish_difference", value=difference, unit="relative")])
            if difference > FINISH_TOLERANCE[self.precision]:
                names = ", ".join(type(method).__name__ for method in self.methods)
                raise ModelError(f"finish of {names} changed the outputs by {difference:.1e} relative")
        return model


def check_requests(spec: RunSpec, task: Task) -> None:
    """Raise UnknownNameError where the specification asks for a request that the task does not have."""
    known = task.requests()
    for name in spec.requests:
        if name not in known:
            raise UnknownNameError(f"request of {task.name}", name, known)


def keep_teachers(stages: Sequence[Stage], name: str, model: Any) -> dict[str, Any]:
    """Copy the module called ``name`` if a stage wants it as its teacher."""
    wanted = bool(name) and any(stage.teacher == name for stage in stages)
    return {name: freeze(copy.deepcopy(model).eval())} if wanted else {}


def relabelled(task: Task, labels: Path) -> Task:
    """Return ``task`` with the training labels that another variant's deployed model predicts."""
    artifact = Artifact.read(labels)
    model = load_deployed(artifact)
    return task.relabel(task.records(model, "train"))


def load_deployed(artifact: Artifact) -> Any:
    """Load a prepared variant with the method that saved it."""
    last = artifact.spec.stages[-1].methods[-1]
    return discover.make_method(last).load(artifact.directory / "deployed")


def training_measurements(run: TrainingRun) -> list[Measurement]:
    """Median step with its spread (the first step, which warms up, left out where there are more), and throughput."""
    times = [1000 * seconds for seconds in run.step_seconds[1:] or run.step_seconds]
    return [
        Measurement(
            name="train_step_alone_ms",
            value=statistics.median(times),
            unit="ms",
            samples=len(times),
            low=carried_quantile(times, 0.1),
            high=carried_quantile(times, 0.9),
        ),
        Measurement(name="samples_per_second", value=run.samples_per_second, unit="1/s", samples=len(run.curve)),
        Measurement(name="training_steps", value=len(run.curve), unit="steps"),
    ]


def parameter_measurements(trainable: int, total: int) -> list[Measurement]:
    """Counts, and the share in percent."""
    return [
        Measurement(name="trainable_parameters", value=trainable, unit="parameters"),
        Measurement(name="total_parameters", value=total, unit="parameters"),
        Measurement(name="trainable_percent", value=100 * trainable / max(1, total), unit="%"),
    ]


def score_measurements(scores: Mapping[str, float], units: Mapping[str, str], count: int) -> list[Measurement]:
    """One per metric, over ``count`` records; in percent where ``units`` says nothing else."""
    return [
        Measurement(name=name, value=value, unit=units.get(name, "%"), samples=count) for name, value in scores.items()
    ]


def probe_logits(task: Task, model: Any) -> Any:
    """Logits on the first 16 items of the evaluation split."""
    import torch

    batch = next(iter(task.batches(task.evaluation_split, 16, 0)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        model.eval()
        return model(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu()


def relative_difference(a: Any, b: Any) -> float:
    """Largest absolute difference, relative to the largest magnitude of ``a``."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def answer_of(output: Any) -> Any:
    """Return what a call answered as one tensor on the CPU: logits in fp32, or generated tokens."""
    tensor = output.logits.float() if hasattr(output, "logits") else output
    return tensor.detach().cpu().contiguous().clone()


def save_reference(task: Task, model: Any, target: Target, directory: Path, records: Sequence[Record]) -> None:
    """Store the answers to every request, which timing workers must reproduce, what they import, and the records."""
    from safetensors.torch import save_file

    answers = {}
    for name, request in task.requests().items():
        answers[name] = answer_of(target.prepare(model, request)())
    if answers:
        save_file(answers, directory / "reference.safetensors")
    write_json(directory / "records.json", [dataclasses.asdict(record) for record in records])
    parts = model.modules() if hasattr(model, "modules") else [model]
    write_json(directory / "libraries.json", sorted({type(part).__module__ for part in parts}))


def measure(
    artifacts: Sequence[Artifact], notify: Callable[[str], None] = lambda _: None, limit: float | None = None
) -> list[Result]:
    """Time several prepared variants against each other: their workers stay alive together and take turns.

    A second worker of the baseline is the control: its ratio to the first shows what this machine can resolve. Returns
    one result per artifact, in order; a worker that fails, or is silent for ``limit`` seconds, turns its own result
    into a ``failed`` one.
    """
    from pareto_runner.turns import Crew

    if not artifacts:
        return []
    with Crew(artifacts, limit) as crew:
        notify("loading the finished models")
        crew.load()
        for request in crew.requests():
            notify(f"timing {request}")
            crew.time_request(request)
        if artifacts[0].spec.time_training:
            notify("loading the models in training")
            crew.start_training()
            notify("timing training steps")
            crew.time_training()
        results = crew.results()
    return add_differences(artifacts, results)


def add_differences(artifacts: Sequence[Artifact], results: Sequence[Result]) -> list[Result]:
    """Compare the score of each result that is ok with those of its baseline and rivals, over the same records."""
    records = {a.spec.variant: a.records() for a, r in zip(artifacts, results, strict=True) if r.status == "ok"}
    scored = {result.spec.variant: result for result in results if result.spec.variant in records}
    finished = []
    for result in results:
        mine = result.spec.variant
        others = [name for name in dict.fromkeys([result.spec.baseline, *result.spec.rivals]) if name != mine]
        found = [
            paired_difference(result, scored[name], records[mine], records[name])
            for name in others
            if mine in scored and name in scored
        ]
        differences = tuple(difference for difference in found if difference is not None)
        finished.append(dataclasses.replace(result, differences=differences))
    return finished
