"""The report in headless Chromium: wide and narrow, light and dark, without a network.

Screenshots of a real report: ``python runner/tests/test_report_page.py results/report.html OUTPUT_DIRECTORY``
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pareto_runner.report import write_report

HERE = Path(__file__).parent
SAMPLES = runpy.run_path(str(HERE / "samples.py"))
UI = runpy.run_path(str(HERE / "test_ui.py"))
DESKTOP, PHONE = (1280, 900), (390, 844)


def look(driver: Any, path: Path, size: tuple[int, int], scheme: str) -> None:
    """Open a file as a screen of this size shows it to a reader who prefers ``scheme``."""
    phone = size == PHONE
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get(path.as_uri())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three seeds, two questions and two failures."""
    failed = SAMPLES["failed"]
    results = SAMPLES["suite"](3)
    results += [failed("KronA (7, 5)", "7 does not divide 384", log="x" * 500)]
    results += [failed("Adapter_with_a_name_that_is_one_long_word_" * 3, "no_space_to_break_this_line" * 9)]
    return write_report(results, {}, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """One browser for all tests of this file."""
    reason = UI["missing"]()
    if reason:
        pytest.skip(reason)
    with UI["browser"](*DESKTOP) as found:
        yield found


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 568)])
def test_the_page_never_scrolls_sideways_but_its_tables_may(driver: Any, page: Path, size: tuple[int, int]) -> None:
    look(driver, page, size, "light")
    driver.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
    boxes = driver.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])"
    )
    assert boxes
    if size != DESKTOP:
        assert any(inside > outside for inside, outside in boxes)  # wide, and in its own box


def test_the_variants_names_stay_when_a_table_is_scrolled(driver: Any, page: Path) -> None:
    look(driver, page, PHONE, "light")
    left = driver.execute_script(
        "const box = document.querySelector('section .scroll'); box.scrollLeft = 200;"
        "return box.querySelector('tbody th').getBoundingClientRect().left"
    )
    assert 0 <= left < 30


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2.1 defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_ground(driver: Any, page: Path, scheme: str) -> None:
    look(driver, page, DESKTOP, scheme)
    ground = luminance(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    for selector in ("body", ".small", ".legend", ".better", ".worse", "thead th", "a", ".mark.failed", "svg", ".chip"):
        script = "return getComputedStyle(document.querySelector(arguments[0])).color"
        ink = luminance(driver.execute_script(script, selector))
        contrast = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
        assert contrast >= 4.5, f"{selector}: {contrast:.1f}"  # WCAG's AA


def test_nothing_is_missing_or_refused_and_logs_unfold(driver: Any, page: Path) -> None:
    look(driver, page, DESKTOP, "light")
    assert driver.get_log("browser") == []
    shown = "return document.querySelector('section pre').checkVisibility()"
    assert not driver.execute_script(shown)
    driver.execute_script("document.querySelector('section details summary').click()")
    assert driver.execute_script(shown)


def take_screenshots(path: Path, directory: Path) -> None:
    """Save the top of a report on a wide light screen, and its first question on a dark phone."""
    directory.mkdir(parents=True, exist_ok=True)
    with UI["browser"](*DESKTOP) as driver:
        look(driver, path, (DESKTOP[0], 1860), "light")
        save(driver, directory / "report-desktop.png")
        look(driver, path, PHONE, "dark")
        driver.execute_script("document.querySelector('h2').scrollIntoView()")
        save(driver, directory / "report-phone.png")


def save(driver: Any, path: Path) -> None:
    """Save what the screen shows, packed tightly."""
    from PIL import Image

    driver.save_screenshot(str(path))
    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
