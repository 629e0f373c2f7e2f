"""The report of a real, short training: what is on the page, and what never gets there."""

from __future__ import annotations

import re
import shutil
import struct
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.cli import main
from amips_plugins.errors import BundleMismatch, BundleNotFound, InvalidInput
from amips_plugins.export.train import Run
from amips_plugins.layout import lay_out
from amips_plugins.report.data import ReportData, Timings, read_report
from amips_plugins.report.page import all_charts, render, write_pngs
from amips_plugins.report.style import COLOURS, to_svg
from amips_plugins.report.timings import measure_timings
from amips_plugins.report.training_record import CURVES, Curves, read_curves
from tests.support.bundles import write_bundle
from tests.support.trainings import NAME, collection, queries, short_run

ALL = [
    "recall-against-cost",
    "promised-recall",
    "cells-searched",
    "filtered-recall",
    "latency",
    "cell-sizes",
    "map",
    "training",
]
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return short_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def data(run: Run) -> ReportData:
    found = read_report(run.path)
    laid_out = lay_out(collection(), found.bundle)
    live = measure_timings(laid_out, found.bundle, queries(seed=9)[:40])
    return replace(found, timings=live)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_training_keeps_its_curves(run: Run) -> None:
    curves = read_curves(run.path / CURVES)
    assert curves is not None
    assert curves.version == run.manifest.version
    assert {line.candidate for line in curves.lines} == {"native", "linear", "supportnet"}
    assert all(line.recall == sorted(line.recall) for line in curves.lines)
    assert all(line.total == sorted(line.total) for line in curves.lines)
    assert [len(one.loss) for one in curves.epochs] == [2, 2]
    figures = {(f.candidate, f.k): f for f in run.manifest.figures if f.recall == 0.9}
    for line in curves.lines:  # the same measurement, at the same recall
        at = int(np.argmax(np.array(line.recall) >= 0.9))
        assert line.total[at] == pytest.approx(figures[line.candidate, line.k].total, abs=0.02)
    test = sum(curves.probes)
    assert test > 100
    assert curves.probes[0] == 0
    assert sum(curves.demand) == test * 10
    assert curves.promises is not None
    assert curves.promises.measured[-1] == 1.0
    assert np.subtract(curves.promises.measured, curves.promises.promised).min() > -0.05
    assert len(curves.flat.keys) == len(curves.flat.cells) == 1_500
    assert curves.flat.shift > 0.3
    again = read_curves(run.path / CURVES)
    assert again == curves


@pytest.mark.slow
def test_every_chart_is_drawn(data: ReportData) -> None:
    charts = all_charts(data)
    assert [chart.name for chart in charts] == ALL
    pages = []
    for chart in charts:
        assert chart.rows
        assert {len(row) for row in chart.rows} == {len(chart.header)}
        assert len(chart.description) > 40
        drawn = to_svg(chart)
        pages.append(drawn)
        assert drawn.count("<path") + drawn.count("<use") > 12
        coloured = set(re.findall(r"#[0-9a-f]{6}\b", drawn))
        assert coloured == set()  # all of them are the page's to choose
    assert [to_svg(chart) for chart in all_charts(data)] == pages  # the same every time


@pytest.mark.slow
def test_the_page_stands_by_itself(data: ReportData) -> None:
    text = render(data)
    page = Page(text)
    assert not {"script", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        assert str(attributes["href"])[1:] in ids
    assert len(page.all("svg")) == len(page.all("figure")) == len(page.all("details")) == len(ALL)
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= set(ids)
    assert page.tags[0] == ("html", {"lang": "en"})
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all("scope" in attributes for attributes in page.all("th"))
    assert "prefers-color-scheme: dark" in text
    assert data.manifest.snapshot in page.text
    assert len(text) < 1_500_000


@pytest.mark.slow
def test_names_are_no_markup(data: ReportData) -> None:
    text = render(data)
    assert NAME not in text
    assert "<b>" not in text
    assert NAME in Page(text).text
    evil = "</title><script>alert(1)</script>"
    changed = msgspec.structs.replace(
        data.manifest, reason=evil, preset=evil, version=evil, tools={evil: evil}
    )
    worse = replace(data, bundle=replace(data.bundle, manifest=changed))
    text = render(worse)
    assert "<script" not in text
    assert evil in Page(text).text


def test_text_has_contrast() -> None:
    def luminance(colour: str) -> float:  # WCAG 2.2, relative luminance
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (0, 1):
        paper = luminance(COLOURS["paper"][theme])
        for name in ("ink", "muted", "native", "linear", "supportnet", "keynet"):
            text = luminance(COLOURS[name][theme])
            ratio = (max(text, paper) + 0.05) / (min(text, paper) + 0.05)
            assert ratio >= 4.5, (name, theme)
    light = [both[0] for both in COLOURS.values()]
    assert len(set(light)) == len(light)  # or one could not be told from the other in an SVG


def test_a_bundle_alone_says_what_it_lacks(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.bundle, tmp_path / "alone")
    alone = read_report(tmp_path / "alone")
    assert alone.curves is None
    names = [chart.name for chart in all_charts(alone)]
    assert names == [
        "recall-against-cost",
        "promised-recall",
        "filtered-recall",
        "cell-sizes",
    ]
    text = Page(render(alone)).text
    assert "kept in curves.json" in text.replace("\n", " ")
    assert "Times are not shown" in text
    # In its run it has the curves beside it.
    assert read_report(run.bundle).curves is not None


def test_a_bundle_with_next_to_nothing(tmp_path: Path) -> None:
    write_bundle(tmp_path / "made", figures=[], choice="unheard of")
    bare = read_report(tmp_path / "made")
    assert "recall-against-cost" not in [chart.name for chart in all_charts(bare)]
    assert "Model card" in Page(render(bare)).text


def test_an_earlier_run_can_be_shown(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / CURVES).unlink()
    assert read_report(tmp_path / "run").curves is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-20], "cannot be read"),
        (lambda _: b'{"format": 1}', "cannot be read"),
        (lambda data: data.replace(b'"format":1', b'"format":9'), "has format 9"),
        (lambda data: re.sub(rb'"version":"[^"]*"', b'"version":"v0"', data), "is of bundle v0"),
    ],
)
def test_damaged_curves_are_one_sentence(
    run: Run, tmp_path: Path, change: Any, message: str
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    path = tmp_path / "run" / CURVES
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InvalidInput, match=message):
        read_report(tmp_path / "run")


def test_there_has_to_be_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="no bundle"):
        read_report(tmp_path)


@pytest.mark.slow
def test_live_searches(data: ReportData) -> None:
    live = data.timings
    assert isinstance(live, Timings)
    assert len(live.native_ms) == len(live.routed_ms) == 40
    assert live.native_recall == 1.0
    assert live.routed_recall > 0.85
    assert live.fallbacks == 0
    assert f"{live.routed_recall:.3f}" in render(data)
    assert "will not last" not in render(data)
    unbuilt = replace(data, timings=msgspec.structs.replace(live, caveat="Optimise first: do."))
    assert "These times will not last. Optimise first: do." in render(unbuilt)
    with pytest.raises(BundleMismatch, match="not laid out"):
        measure_timings(collection(), data.bundle, queries()[:5])


def test_a_keynet_has_no_cells(data: ReportData) -> None:
    changed = msgspec.structs.replace(
        data.manifest,
        model="keynet",
        n_cells=0,
        layout="",
        choice="native",
        figures=[
            msgspec.structs.replace(figure, candidate="keynet", total=None, scanned=None)
            if figure.candidate == "linear" and figure.recall > 0.9
            else figure
            for figure in data.manifest.figures
        ],
    )
    curves = data.curves
    assert isinstance(curves, Curves)
    bare = ReportData(
        replace(data.bundle, manifest=changed),
        None,
        None,
        msgspec.structs.replace(curves, probes=[], promises=None),
    )
    names = [chart.name for chart in all_charts(bare)]
    assert names == ["recall-against-cost", "map", "training"]
    assert "Nothing learned beats nearest centroids" in render(bare)


@pytest.mark.slow
def test_pictures(data: ReportData, tmp_path: Path) -> None:
    paths = write_pngs(data, tmp_path / "png")
    assert [path.stem for path in paths] == ALL
    for path in paths:
        png = path.read_bytes()
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert width > 900
        assert height > 400
        assert len(png) < 200_000


@pytest.mark.slow
def test_the_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["report", str(run.path), "--png", "png"])
    out = capsys.readouterr().out
    assert "The report is in report.html" in out
    assert "7 charts are in png." in out
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for arguments, message in (
        ([str(run.path), "--queries", "q.npy"], "both --collection and --queries"),
        ([str(tmp_path)], "no bundle"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["report", *arguments, "-o", "other.html"])
        assert exit_.value.code == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.html").exists()
    assert (run.bundle / MANIFEST).is_file()
