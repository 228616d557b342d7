"""What the small models share that are trained once on this machine and kept in the cache directory."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pareto_core.errors import ModelError
from pareto_core.task import Batch

if TYPE_CHECKING:
    import torch


class Schedule(Protocol):
    """How long a model trains: ``steps`` batches of ``batch`` windows of ``window`` tokens."""

    @property
    def window(self) -> int:
        """Tokens of a window."""
        ...

    @property
    def batch(self) -> int:
        """Windows of a batch."""
        ...

    @property
    def steps(self) -> int:
        """Batches, one optimizer step each."""
        ...

    @property
    def learning_rate(self) -> float:
        """Highest learning rate, reached after the warm-up."""
        ...

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        ...


def to_standard_error(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def trained_once(
    path: Path, module: str, title: str, name: str, duration: str, say: Callable[[str], None] = to_standard_error
) -> Path:
    """Return ``path``, the directory of the trained model ``name``; :func:`run_command` of ``module`` makes it.

    Where it is made, ``say`` is told so, with ``title`` and ``duration``, and then how far the training is. Processes
    that ask at once wait for the one that trains. Raises :class:`ModelError` where training fails.
    """
    if (path / "config.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not (path / "config.json").is_file():
            say(f"training {title}, once: {duration} on two idle cores; kept in {path}")
            _run([sys.executable, "-m", module, "--model", name, str(path)], title, say)
    return path


def _run(command: list[str], title: str, say: Callable[[str], None]) -> None:
    """Train in a process of its own: random numbers and peak memory of this one stay as they are."""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                say(f"training {title}: {line.rstrip()}")
        except BaseException:
            process.kill()  # an interrupted suite leaves nothing behind that trains on
            raise
        if process.wait():
            errors.seek(0)
            raise ModelError(f"training {title} failed: {errors.read().strip()[-500:]}")


def save_whole(model: Any, tokenizer: Any, path: Path) -> None:
    """Write model and tokenizer to the new directory ``path``, whole or not at all; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        made = Path(directory) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            os.rename(made, path)
        except OSError:
            if not (path / "config.json").is_file():  # else another process was faster: its files are as good
                raise


def fit(model: Any, batches: Iterable[Batch], schedule: Schedule) -> None:
    """Train ``model`` in place by AdamW, one step for each of the ``batches`` (with ``labels``).

    Prints the loss and the time that is left ten times.
    """
    import torch

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate(step, schedule)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (done := step + 1) % max(1, schedule.steps // 10) == 0:
            left = (time.monotonic() - start) / done * (schedule.steps - done) / 60
            print(f"step {done} of {schedule.steps}: loss {loss.item():.3f}, {left:.0f} min left", flush=True)
    model.eval()


def rate(step: int, schedule: Schedule) -> float:
    """Share of the learning rate: a linear rise over the warm-up, then a linear fall to zero."""
    return min((step + 1) / schedule.warmup, (schedule.steps - step) / (schedule.steps - schedule.warmup))


def shuffled_windows(ids: torch.Tensor, schedule: Schedule) -> Iterator[torch.Tensor]:
    """Yield ``steps`` batches (batch, window): all windows of the text in random order, over and over."""
    import torch

    windows = ids[: len(ids) // schedule.window * schedule.window].view(-1, schedule.window)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(schedule.steps):
        while len(order) < schedule.batch:
            order = torch.cat([order, torch.randperm(len(windows))])
        chosen, order = order[: schedule.batch], order[schedule.batch :]
        yield windows[chosen]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_command(
    module: str, names: Sequence[str], train: Callable[[str, Path], None], kept: Callable[[str], Path]
) -> None:
    """``python -m module``: print the kept model's directory, or train into a new one that is named."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description="Train the model unless it is kept already, and print its directory."
    )
    parser.add_argument("--model", choices=names, default=names[0], help="which one (default: %(default)s)")
    parser.add_argument("directory", nargs="?", type=Path, help="train into this new directory instead")
    arguments = parser.parse_args()
    if arguments.directory is None:
        print(kept(arguments.model))
    else:
        train(arguments.model, arguments.directory)
