"""The page in a real browser: nothing is cut off, in light and in dark, on a screen and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_report

from aq_jax.validate.page import page

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing of the browser's own goes out either.
OPTIONS = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = [path for name in NAMES if (path := shutil.which(name))]
        own = driver.chromium.executable_path
        path = found[0] if found else own if Path(own).exists() else None
        if path is None:
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []  # root has none
        running = driver.chromium.launch(executable_path=path, args=[*OPTIONS, *sandbox])
        yield running
        running.close()


def contrast(a: str, b: str) -> float:
    """Compute the contrast of two colours such as rgb(1, 2, 3), as WCAG reckons it."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(sample_report.sample()), "utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    shown, trouble = context.new_page(), []
    shown.on("console", lambda message: trouble.append(message.text))
    shown.on("request", lambda request: trouble.append(request.url))
    shown.goto(file.as_uri())
    assert trouble == [file.as_uri()]  # nothing is fetched, and nothing complained of

    assert shown.evaluate("document.documentElement.scrollWidth") == width  # wide parts scroll by themselves
    for wide in shown.locator("section > .wide, figure > .wide").all():
        cut = wide.evaluate("element => element.scrollWidth > element.clientWidth")
        assert cut is (width < 1000)
    drawn = [dot.bounding_box() for dot in shown.locator("circle").all()]
    assert len(drawn) == 4
    assert all(box["width"] > 5 for box in drawn)

    def colour(selector: str, name: str = "color") -> str:
        return shown.locator(selector).first.evaluate("(element, name) => getComputedStyle(element)[name]", name)

    paper = colour("body", "backgroundColor")
    assert (contrast(paper, "rgb(255, 255, 255)") < 2) is (scheme == "light")
    for selector in ("h1", "p", "td", "thead th", "tbody th", ".bad", "figcaption", "summary"):
        assert contrast(colour(selector), paper) >= 4.5, selector
    for selector in ("text", "text.ours", "text.peer", "circle.ours", "circle.failed"):
        assert contrast(colour(selector, "fill"), paper) >= 4.5, selector
    for selector in (".fails b", ".fails li"):
        assert contrast(colour(selector), colour(".fails", "backgroundColor")) >= 4.5
    context.close()
