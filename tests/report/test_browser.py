"""The report in a real browser: every chart is there to be seen, and nothing is fetched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from amips_plugins.layout import lay_out
from amips_plugins.report.data import read_report
from amips_plugins.report.page import render
from amips_plugins.report.timings import measure_timings
from tests.support.browser import HINT, Tab, chromium, find_chromium
from tests.support.trainings import collection, queries, short_run

pytestmark = pytest.mark.slow

CHARTS = 8
BOXES = """
[...document.querySelectorAll('figure svg')].map(svg => ({
  box: svg.getBoundingClientRect().toJSON(),
  marks: [...svg.querySelectorAll('path, use')].filter(mark => {
    const box = mark.getBoundingClientRect();
    return !mark.closest('defs') && box.width + box.height > 1;
  }).length,
  texts: [...svg.querySelectorAll('text')].filter(
    text => text.getBoundingClientRect().width > 0).length,
  textSize: Math.min(...[...svg.querySelectorAll('text')].map(
    text => text.getBoundingClientRect().height)),
  outside: [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect(), page = document.documentElement;
    return box.left < 0 || box.right > page.clientWidth;
  }).map(text => text.textContent),
}))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    found = read_report(short_run(folder).path)
    laid_out = lay_out(collection(), found.bundle)
    live = measure_timings(laid_out, found.bundle, queries(seed=9)[:40])
    path = folder / "report.html"
    path.write_text(render(replace(found, timings=live)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_chromium()
    if program is None:
        pytest.skip(HINT)
    with chromium(program) as found:
        yield found


def pixels(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_there_to_be_seen(tab: Tab, page: Path, scheme: str, width: int) -> None:
    tab.open(page, scheme=scheme, width=width)
    charts: list[dict[str, Any]] = tab.run(BOXES)
    assert len(charts) == CHARTS
    for chart in charts:
        assert chart["box"]["width"] >= 512
        assert chart["box"]["height"] > 0.3 * chart["box"]["width"]
        assert chart["marks"] >= 8
        assert chart["texts"] >= 3
        assert chart["outside"] == [] or width < 500
        assert chart["textSize"] >= 9
    assert tab.run("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    hint = "[...document.querySelectorAll('.hint')].map(hint => hint.offsetHeight > 0)"
    assert tab.run(hint) == [width < 500] * CHARTS  # wider than the window: the page says so
    assert tab.requests == [page.as_uri()]
    assert tab.complaints == []
    shot = pixels(tab.screenshot())
    assert shot.shape[0] > 3_000
    paper = shot[2, 2]
    assert (paper > 250).all() if scheme == "light" else (paper < 40).all()
    painted = (np.abs(shot.astype(int) - paper).max(axis=2) > 60).mean()
    assert 0.02 < painted < 0.4
    for chart in charts:  # each of them on the picture, too
        box = {side: round(chart["box"][side]) for side in ("top", "bottom", "left", "right")}
        inside = shot[box["top"] : box["bottom"], box["left"] : min(box["right"], width)].astype(
            int
        )
        assert (np.abs(inside - paper).max(axis=2) > 60).mean() > 0.005
        colourful = inside.max(axis=2) - inside.min(axis=2) > 60
        assert colourful.mean() > 0.0005 or width < 500  # where only a part of it shows


def test_light_and_dark_differ(tab: Tab, page: Path) -> None:
    shots = []
    for scheme in ("light", "dark"):
        tab.open(page, scheme=scheme)
        shots.append(pixels(tab.screenshot()))
    assert shots[0].shape == shots[1].shape
    assert shots[0].mean() > 200
    assert shots[1].mean() < 60


def test_the_keyboard_goes_everywhere(tab: Tab, page: Path) -> None:
    tab.open(page)
    focused = "document.activeElement.className || document.activeElement.tagName"
    tab.press("Tab")
    assert tab.run(focused) == "skip"
    assert tab.run("document.activeElement.getBoundingClientRect().left") >= 0
    tab.press("Enter")
    assert tab.run("location.hash") == "#main"
    assert tab.run("document.activeElement.id") == "main"
    seen = []
    for _ in range(40):
        tab.press("Tab")
        if tab.run("document.activeElement.tagName") == "SUMMARY":
            assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            tab.press("Enter")
            seen.append(tab.run("document.activeElement.parentElement.open"))
            shown = "document.activeElement.parentElement.querySelector('table').offsetHeight"
            assert tab.run(shown) > 0
        if len(seen) == CHARTS:
            break
    assert seen == [True] * CHARTS


def test_a_screen_reader_hears_every_chart(tab: Tab, page: Path) -> None:
    tab.open(page)
    nodes = tab.ask("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            role, name = node["role"]["value"], node.get("name", {}).get("value", "")
            named.setdefault(role, []).append(name)
    pictures = named.get("image", []) + named.get("img", [])
    assert len(pictures) == CHARTS
    assert all(len(name) > 60 for name in pictures)  # the finding and what is to be seen
    assert len(set(pictures)) == CHARTS
    assert len(named["main"]) == len(named["navigation"]) == 1
    assert len(named["heading"]) == 1 + 4 + CHARTS
    toggles = named.get("DisclosureTriangle", [])
    assert len(set(toggles)) == len(toggles) == CHARTS
