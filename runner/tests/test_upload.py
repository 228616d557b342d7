"""Bringing results from the journal into MLflow, under real faults: nothing is lost, repeated, raised or waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pareto_core import Result
from pareto_runner import tracking, upload
from pareto_runner.isolate import Child
from pareto_runner.journal import Journal
from pareto_runner.upload import ItemError, Store, StoreError, Uploader, upload_journal

PATIENCE_S = 60
SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))
ok, failed = SAMPLES["ok"], SAMPLES["failed"]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to be copied: making one takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    tracking.create_sqlite(path)
    return path


@pytest.fixture
def database(empty_store: Path, tmp_path: Path) -> Path:
    """The file of a store of the test's own."""
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))


def journal(directory: Path, *results: Result) -> list[Path]:
    """Write a journal; returns its files."""
    home = Journal(directory / "journal")
    return [home.write(result) for result in results]


def statuses(database: Path, path: Path) -> list[str]:
    """Statuses of the runs that hold a journal file's result; deleted ones are left out."""
    query = (
        "select runs.status from runs join tags using (run_uuid) "
        "where tags.key = 'pareto.id' and tags.value = ? and lifecycle_stage = 'active'"
    )
    return [status for (status,) in rows(database, query, tracking.identity_of(path.read_bytes()))]


def suites(database: Path) -> dict[str, str]:
    """Status of each parent run by its name."""
    query = "select name, status from runs join tags using (run_uuid) where tags.key = 'pareto.suite'"
    return dict(rows(database, query))


def rows(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(database, timeout=PATIENCE_S)) as connection:
        return connection.execute(query, values).fetchall()


def wait_until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; raise where it never does."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("what was waited for did not happen")
        pause.wait(0.02)


def test_a_suite_goes_in_as_it_comes_and_the_rest_later_each_result_once(database: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{database}"
    paths = journal(tmp_path / "results", *(ok("BitFit", seed) for seed in range(3)), failed("BitFit", "no memory", 3))
    with Uploader(uri, tmp_path / "logs") as uploader:
        uploader.suite("adapters", {"profile": "smoke"})
        for path in (*paths[:2], paths[0]):
            uploader.log(path)
        uploader.close("FAILED")
    assert (uploader.problem, uploader.behind) == ("", [])
    assert suites(database) == {"adapters": "FAILED"}
    damaged = paths[0].with_name("000009-cut-k.json")
    damaged.write_bytes(paths[0].read_bytes()[:-100])
    told: list[str] = []
    summary = upload_journal(paths[0].parent, uri, told.append)
    assert (summary.uploaded, summary.present, summary.failed) == (2, 2, {})
    assert list(summary.damaged) == [damaged]
    assert str(summary).startswith(
        f"2 brought in, 2 there already\nleft out: {damaged} is not a result of this version: "
    )
    assert told[-1] == "5 of 5: 000009-cut-k.json"
    assert [statuses(database, path) for path in paths] == [["FINISHED"]] * 3 + [["FAILED"]]
    assert suites(database) == {"adapters": "FAILED", "results · uploaded later": "FINISHED"}


def test_a_locked_store_is_filled_at_the_end(database: Path, tmp_path: Path) -> None:
    paths = journal(tmp_path, ok("BitFit"), ok("BitFit", 1))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("begin exclusive")
        uploader = Uploader(f"sqlite:///{database}", tmp_path / "logs")
        uploader.suite("locked out")
        for path in paths:
            uploader.log(path)
        assert uploader.behind == paths
        assert "database is locked" in uploader.problem
        other.execute("rollback")
    uploader.close("FINISHED")
    assert (uploader.problem, uploader.behind) == ("", [])
    assert [statuses(database, path) for path in paths] == [["FINISHED"]] * 2
    assert suites(database) == {"locked out": "FINISHED"}


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each child that is started."""
    found: list[int] = []
    real = Store._start

    def start(self: Store) -> Child:
        found.append(1)
        return real(self)

    monkeypatch.setattr(Store, "_start", start)
    return found


def test_a_server_that_never_answers_costs_two_attempts_in_all(tmp_path: Path, starts: list[int]) -> None:
    paths = journal(tmp_path, *(ok("BitFit", seed) for seed in range(4)))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with Uploader(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "logs", limit=3) as uploader:
            uploader.suite("unheard")
            for path in paths:
                uploader.log(path)
            assert len(starts) == 1
    assert len(starts) == 2
    assert uploader.behind == paths
    assert "said nothing for 3 s" in uploader.problem
    assert "http://127.0.0.1:" in uploader.problem


def test_a_store_that_is_not_there_is_named_and_the_journal_stays(tmp_path: Path) -> None:
    paths = journal(tmp_path, ok("BitFit"), ok("BitFit", 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    before = [path.read_bytes() for path in paths]
    summary = upload_journal(paths[0].parent, uri)
    assert list(summary.failed) == paths
    assert str(summary).startswith(
        f"0 brought in, 0 there already, 2 not brought in\ncannot open the tracking store {uri}: "
    )
    assert [path.read_bytes() for path in paths] == before


def test_a_writer_that_is_killed_within_a_result_is_replaced_at_the_end(database: Path, tmp_path: Path) -> None:
    long = dataclasses.replace(ok("BitFit", 1), curve=tuple((step, 1.0) for step in range(1, 6001)))
    paths = journal(tmp_path, ok("BitFit"), long, ok("BitFit", 2))
    uploader = Uploader(f"sqlite:///{database}", tmp_path / "logs")
    uploader.suite("a fatal suite")
    uploader.log(paths[0])
    assert uploader._store._child is not None
    pid = uploader._store._child.pid

    def kill_within() -> None:
        wait_until(lambda: statuses(database, paths[1]) == ["RUNNING"])
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_within)
    killer.start()
    uploader.log(paths[1])
    killer.join()
    uploader.log(paths[2])
    assert uploader.behind == paths[1:]
    assert "killed by SIGKILL" in uploader.problem
    assert statuses(database, paths[1]) == ["RUNNING"]
    uploader.close("FINISHED")
    assert (uploader.problem, uploader.behind) == ("", [])
    assert [statuses(database, path) for path in paths] == [["FINISHED"]] * 3
    points = "select count(*) from metrics join runs using (run_uuid) where key = 'train_loss' and is_nan = 0 "
    points += "and lifecycle_stage = 'active' and name = 'BitFit · seed 1 · xeon'"
    assert rows(database, points) == [(6000,)]
    assert suites(database) == {"a fatal suite": "FINISHED"}


def test_two_uploads_at_once_lose_and_repeat_nothing(database: Path, tmp_path: Path) -> None:
    results = [ok("LoRA r=1", seed) for seed in range(15)]
    first = journal(tmp_path / "first", *results[:10])
    second = journal(tmp_path / "second", *results[5:])
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(upload_journal, [first[0].parent, second[0].parent], [f"sqlite:///{database}"] * 2))
    assert [summary.failed for summary in done] == [{}, {}]
    assert [statuses(database, path) for path in (*first, *second)] == [["FINISHED"]] * 20
    assert set(suites(database).values()) == {"FINISHED"}


PARENT = """
import sys
from pathlib import Path
from pareto_runner.upload import Uploader
uploader = Uploader(sys.argv[1], Path(sys.argv[2]))
uploader.suite("orphaned")
uploader.log(Path(sys.argv[3]))
print(uploader.problem or "logged", "mlflow" in sys.modules, flush=True)
sys.stdin.read()
"""


def test_a_suite_that_is_killed_is_marked_and_its_process_never_imports_mlflow(database: Path, tmp_path: Path) -> None:
    (path,) = journal(tmp_path, ok("BitFit"))
    command = [sys.executable, "-c", PARENT, f"sqlite:///{database}", str(tmp_path / "logs"), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "logged False\n"
        assert suites(database) == {"orphaned": "RUNNING"}
        parent.kill()
    wait_until(lambda: suites(database) == {"orphaned": "KILLED"})
    assert statuses(database, path) == ["FINISHED"]


@contextlib.contextmanager
def server(database: Path, port: int) -> Iterator[None]:
    """MLflow's server on a store."""
    command = tracking.ui_command(f"sqlite:///{database}", port)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)

    def answers() -> bool:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return True
        return False

    try:
        wait_until(answers)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_goes_and_comes_back_gets_each_result_once(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    results = [ok("LoRA r=1", seed) for seed in range(9)]
    paths = journal(tmp_path / "suite", *results[:6])
    others = journal(tmp_path / "others", *results[3:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    uploader = Uploader(uri, tmp_path / "logs")
    uploader.suite("goes and comes")
    with server(database, port):
        uploader.log(paths[0])
    for path in paths[1:]:
        uploader.log(path)
    assert uploader.behind == paths[1:]
    assert f"the tracking store {uri}" in uploader.problem
    with server(database, port), ThreadPoolExecutor() as pool:
        other = pool.submit(upload_journal, others[0].parent, uri)
        uploader.close("FINISHED")
        assert other.result().failed == {}
    assert (uploader.problem, uploader.behind) == ("", [])
    assert [statuses(database, path) for path in (*paths, *others)] == [["FINISHED"]] * 12
    assert suites(database)["goes and comes"] == "FINISHED"
    assert len(list((tmp_path / "mlartifacts").rglob("result.json"))) >= 9


#: a child without MLflow that answers by the name of a journal file, and writes down what it was asked
STAND_IN = """
import json, sys, time
def say(**message): print("@pareto " + json.dumps(message), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    with open(sys.argv[1], "a") as heard: heard.write(line)
    answer = command.get("path", "").rpartition("/")[2]
    if answer == "refused" or command["do"] == "tidy": say(error="not this one", kind="refused")
    elif answer == "damaged": say(error="it is cut off", kind="damaged")
    elif answer == "dead": sys.exit("out of breath")
    elif answer == "slow": time.sleep(1000)
    else: say()
"""


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What children without MLflow were asked, in short."""
    record = tmp_path / "heard"
    record.touch()

    program, script = tmp_path / "python", tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' '{record}'\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))

    def read() -> list[str]:
        asked = [json.loads(line) for line in record.read_text().splitlines()]
        return [
            f"{one['do']} {Path(one.get('path') or one.get('status') or one.get('name', '')).name}" for one in asked
        ]

    return read


def test_a_result_that_is_refused_does_not_hold_up_the_others(heard: Callable[[], list[str]], tmp_path: Path) -> None:
    with Uploader(None, tmp_path) as uploader:
        uploader.suite("s")
        for name in ("one", "refused", "damaged", "two"):
            uploader.log(tmp_path / name)
        assert uploader.problem == "not this one"
    assert [path.name for path in uploader.behind] == ["refused", "damaged"]
    first = ["suite s", "log one", "log refused", "log damaged", "log two"]
    assert heard() == [*first, "log refused", "log damaged", "close FINISHED"]


def test_refusals_in_a_row_are_the_stores_fault(heard: Callable[[], list[str]], tmp_path: Path) -> None:
    store = Store(None, tmp_path)
    for _ in range(2):
        with pytest.raises(ItemError, match="not this one"):
            store.log(Path("refused"))
    store.log(Path("one"))
    for expected in (ItemError, ItemError, StoreError):
        with pytest.raises(expected, match="not this one"):
            store.log(Path("refused"))
    assert not store.running


def test_an_upload_that_the_store_refuses_as_a_whole_leaves_everything(
    heard: Callable[[], list[str]], tmp_path: Path
) -> None:
    paths = journal(tmp_path, ok("BitFit"), ok("BitFit", 1))
    summary = upload_journal(paths[0].parent)
    assert summary.failed == dict.fromkeys(paths, "not this one")
    assert str(summary) == "0 brought in, 0 there already, 2 not brought in\nnot this one"
    assert [line.split()[0] for line in heard()] == ["suite", "tidy"]


def test_a_child_that_ends_is_replaced_once_at_the_end(heard: Callable[[], list[str]], tmp_path: Path) -> None:
    with Uploader(None, tmp_path) as uploader:
        uploader.suite("s")
        for name in ("one", "dead", "two"):
            uploader.log(tmp_path / name)
        uploader.close("FAILED")
    assert (
        uploader.problem
        == "writing to the tracking store sqlite:///mlflow.db: the process ended with status 1: out of breath"
    )
    assert [path.name for path in uploader.behind] == ["dead", "two"]
    assert heard() == ["suite s", "log one", "log dead", "suite s", "log dead"]


def test_no_attempt_begins_after_the_time_for_the_last_one(
    heard: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = Uploader(None, tmp_path)
    uploader.log(tmp_path / "dead")
    uploader.log(tmp_path / "one")
    monkeypatch.setattr(upload, "LAST_ATTEMPT", 0.0)
    uploader.close()
    assert [path.name for path in uploader.behind] == ["dead", "one"]
    assert heard() == ["log dead"]


def test_an_interruption_leaves_the_result_for_the_end(heard: Callable[[], list[str]], tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def suite() -> None:
        with uploader:
            uploader.log(tmp_path / "one")
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            uploader.log(tmp_path / "slow")

    before = signal.signal(signal.SIGALRM, interrupt)
    uploader = Uploader(None, tmp_path, limit=2)
    try:
        with pytest.raises(KeyboardInterrupt):
            suite()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert uploader.behind == [tmp_path / "slow"]
    assert heard() == ["log one", "log slow", "log slow"]


def test_a_suite_without_results_starts_no_child(heard: Callable[[], list[str]], tmp_path: Path) -> None:
    with Uploader(None, tmp_path) as uploader:
        uploader.suite("s")
    assert heard() == []
    assert upload_journal(tmp_path) == upload.Summary()


def test_results_go_in_where_no_log_can_be_written(heard: Callable[[], list[str]], tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with Uploader(None, tmp_path / "plain" / "logs") as uploader:
        uploader.log(tmp_path / "one")
    assert uploader.behind == []
    assert heard() == ["log one", "close FINISHED"]


def test_a_program_that_cannot_be_started_is_a_fault_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with Uploader(None, tmp_path) as uploader:
        uploader.log(tmp_path / "one")
    assert uploader.behind == [tmp_path / "one"]
    assert "could not be started" in uploader.problem


def test_what_is_no_result_is_damaged(tmp_path: Path) -> None:
    texts = ["", "[" * 100_000, "{}", '"\\ud800"', json.dumps(ok("BitFit").to_json() | {"status": "splendid"})]
    for text in texts:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(upload.DamagedError, match=r"not a result of this version: ."):
            upload.read(tmp_path / "x.json")
    with pytest.raises(upload.DamagedError, match="cannot be read: No such file"):
        upload.read(tmp_path / "none.json")


def test_an_error_that_nobody_foresaw_is_told_of_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    answer = upload.carry_out(tracking.Tracker("sqlite:///never.db"), {"do": "log"})
    assert answer == {"error": "KeyError: 'path'", "kind": "refused"}
    assert "Traceback" in capsys.readouterr().err
