"""The MLflow UI on a store that the tracker filled, opened in headless Chromium.

Against the store of a real run, for screenshots:
``python runner/tests/test_ui.py sqlite:////path/to/mlflow.db OUTPUT_DIRECTORY``
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pareto_runner import tracking

PATIENCE_S = 60
SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))


def missing() -> str:
    """Why the UI cannot be opened here; empty where it can."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed"
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found (Debian: chromium, chromium-driver)" if absent else ""


@contextlib.contextmanager
def serve(uri: str) -> Iterator[str]:
    """Run the UI of a store on a free loopback port; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        command = tracking.ui_command(uri, port)
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for_server(server, address, log)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait_for_server(server: subprocess.Popen[bytes], address: str, log: Any) -> None:
    """Return once the server answers; raise with its log where it ended or stays silent."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pause.wait(0.2)
    log.seek(0)
    raise RuntimeError(f"no answer from {address}\n{log.read().decode(errors='replace')[-3000:]}")


@contextlib.contextmanager
def browser(width: int = 1680, height: int = 1050) -> Iterator[Any]:
    """Headless Chromium that can reach nothing but loopback."""
    os.environ["SE_AVOID_STATS"] = "true"
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as profile:
        flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage", "disable-sync"]
        flags += ["disable-background-networking", "disable-component-update", f"window-size={width},{height}"]
        flags += ["host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"user-data-dir={profile}"]
        for flag in flags:
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        # the assistant's pane would hide a third of the page
        closed = "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
        closed += "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": f"try {{{closed}}} catch {{}}"})
        try:
            yield driver
        finally:
            driver.quit()


def open_page(driver: Any, url: str, *expected: str) -> str:
    """Open ``url``, wait until its text holds all of ``expected``, and return the text."""
    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get("about:blank")
    driver.get(url)

    def text(_: Any = None) -> str:
        return str(driver.find_element(By.TAG_NAME, "body").text)

    def complete(_: Any) -> bool:
        shown = text()
        return all(part in shown for part in expected)

    try:
        WebDriverWait(driver, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException]).until(complete)
    except TimeoutException:
        shown = text()
        keep(driver, "mlflow-failure")
        lacking = [part for part in expected if part not in shown]
        raise AssertionError(f"{url} does not show {lacking}; it shows:\n{shown[:4000]}") from None
    return text()


def keep(driver: Any, name: str) -> None:
    """Save a screenshot where ``$PARETO_SCREENSHOTS`` says."""
    directory = os.environ.get("PARETO_SCREENSHOTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(directory) / f"{name}.png"))


def runs_url(address: str, experiment: str) -> str:
    """The table of an experiment's runs."""
    return address + tracking.ui_page(experiment)


def charts_url(address: str, experiment: str) -> str:
    """The charts of an experiment's runs."""
    return f"{runs_url(address, experiment)}&compareRunsMode=CHART"


def compare_url(address: str, experiment: str, runs: list[str]) -> str:
    """The compare view of some runs."""
    return f"{address}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store with a suite of five results that are ok and one that failed."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('ui')}/mlflow.db"
    ok, failed = SAMPLES["ok"], SAMPLES["failed"]
    results = [ok(variant) for variant in SAMPLES["VARIANTS"]]
    results += [ok("KronA (24, 16)", 1), failed("KronA (7, 5)", "7 does not divide 384")]
    with tracking.Tracker(uri) as tracker:
        tracker.suite("adapters · smoke", {"profile": "smoke"})
        runs = [tracker.log(result) for result in results]
    return {"uri": uri, "runs": runs, "experiment": tracker.experiment_id, "results": results}


@pytest.fixture(scope="module")
def ui(store: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The store's UI and a browser, for all tests of this file."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with serve(store["uri"]) as address, browser() as driver:
        yield {**store, "address": address, "driver": driver}


def test_the_table_shows_every_run_with_its_score(ui: dict[str, Any]) -> None:
    names = [tracking.run_name(result) for result in ui["results"]]
    text = open_page(ui["driver"], runs_url(ui["address"], ui["experiment"]), *names)
    keep(ui["driver"], "mlflow-runs")
    assert "68.4" in text  # KronA's accuracy with its first seed
    for column in ("accuracy", "trainable_parameters", "latency_ms.batch1", "train_step_ms"):
        assert column in text


def test_the_compare_view_sets_the_variants_side_by_side(ui: dict[str, Any]) -> None:
    runs = [ui["runs"][2], ui["runs"][3]]
    expected = [
        "LoRA r=1",
        "KronA (24, 16)",
        "krona.a_shape",
        "(24, 16)",
        "lora.rank",
        "latency_ms.batch1",
        "67.5",
        "68.4",
    ]
    text = open_page(ui["driver"], compare_url(ui["address"], ui["experiment"], runs), *expected)
    keep(ui["driver"], "mlflow-compare")
    assert "ratio.latency_ms.batch1" in text  # the names of later metrics are drawn once one scrolls to them
    figures = text.split("\nMetrics\n")[1].split()
    assert figures[figures.index("135") + 1] == "139"  # the training steps, side by side


def test_the_charts_show_each_metric(ui: dict[str, Any]) -> None:
    expected = ["accuracy", "latency_ms.batch1", "KronA (24, 16) · seed 1 · xeon"]
    open_page(ui["driver"], charts_url(ui["address"], ui["experiment"]), *expected)
    keep(ui["driver"], "mlflow-charts")


def take_screenshots(uri: str, directory: str, limit: int = 6) -> None:
    """Save the table, the charts and the compare view (of the newest suite's results) of an existing store."""
    os.environ["PARETO_SCREENSHOTS"] = directory
    with tracking.Tracker(uri) as tracker:
        experiment = tracker.experiment_id
        found = tracker.client.search_runs([experiment], "tags.`pareto.kind` = 'result' and tags.status = 'ok'")
        newest = {run.data.params["variant"]: run for run in reversed(found)}
    chosen = list(newest.values())[:limit]
    if not chosen:
        raise SystemExit(f"{uri} has no finished results")
    names = [run.info.run_name for run in chosen]
    with serve(uri) as address, browser() as driver:
        open_page(driver, runs_url(address, experiment), names[0])
        keep(driver, "mlflow-runs")
        open_page(driver, charts_url(address, experiment), "accuracy")
        keep(driver, "mlflow-charts")
        runs = [run.info.run_id for run in chosen]
        open_page(driver, compare_url(address, experiment, runs), names[0], "accuracy")  # later ones need scrolling
        keep(driver, "mlflow-compare")


if __name__ == "__main__":
    take_screenshots(sys.argv[1], sys.argv[2])
