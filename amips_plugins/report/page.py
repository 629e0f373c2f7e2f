"""The page: plain HTML with the pictures in it. No script, no font, no image from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from amips_plugins.errors import require

require("matplotlib", "report")  # before what imports it

from amips_plugins.files import replace_file  # noqa: E402
from amips_plugins.report.costs import (  # noqa: E402
    latency,
    probes,
    promises,
    recall_against_cost,
)
from amips_plugins.report.data import ReportData  # noqa: E402
from amips_plugins.report.epochs import training  # noqa: E402
from amips_plugins.report.filtered import filtered_recall  # noqa: E402
from amips_plugins.report.searched import cell_sizes, flat_map  # noqa: E402
from amips_plugins.report.style import COLOURS, Chart, to_png, to_svg  # noqa: E402

__all__ = ["all_charts", "render", "write_pngs"]

_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 52rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; }
h1, h2, h3 { line-height: 1.25; text-wrap: pretty; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%%); }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 .4rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.08rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 42rem; }
.what { color: var(--muted); margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid var(--linear); padding: .1rem 0 .1rem 1rem; font-size: 1.08rem; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 1rem;
  margin: 1.6rem 0 0; padding: 0; list-style: none; }
.key li { border-top: 2px solid var(--ink); padding-top: .45rem; color: var(--muted);
  font-size: .88rem; line-height: 1.35; }
.key strong { display: block; color: var(--ink); font-size: 1.5rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
nav ol { margin: 1.6rem 0 0; padding: 0 0 0 1.2rem; font-size: .94rem; }
nav li { margin: .15rem 0; }
a { color: var(--linear); text-underline-offset: .15em; }
:focus-visible { outline: 3px solid var(--supportnet); outline-offset: 3px; border-radius: 2px; }
.skip { position: absolute; left: -100rem; top: .5rem; background: var(--paper);
  padding: .5rem 1rem; }
.skip:focus { left: .5rem; z-index: 1; }
figure { margin: 2.6rem 0 0; }
.plot { overflow-x: auto; } /* on a narrow screen text stays large enough to read */
figure svg { display: block; width: 100%%; min-width: 32rem; height: auto; overflow: visible; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif !important; }
.hint { display: none; color: var(--muted); font-size: .88rem; margin: 0 0 .4rem; }
@media (max-width: 34.5rem) { .hint { display: block; } }
figcaption { color: var(--muted); font-size: .92rem; margin-top: .6rem; max-width: 44rem; }
details { margin-top: .55rem; font-size: .92rem; }
summary { cursor: pointer; color: var(--linear); width: fit-content; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .7rem 0 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .3rem; }
th, td { padding: .28rem 1.3rem .28rem 0; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; color: var(--muted); border-bottom-color: var(--muted); }
.card th { font-weight: 400; color: var(--muted); white-space: nowrap; }
.card td { text-align: left; overflow-wrap: anywhere; font-size: .94rem; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
footer { margin-top: 3rem; color: var(--muted); font-size: .88rem; }
@media print { .skip, nav { display: none; } details::details-content {
  content-visibility: visible; } }
@media (forced-colors: active) { .verdict { border-left-color: CanvasText; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{heading}</h1>
<p class="what">{what}</p>
</header>
<main id="main" tabindex="-1">
{main}
</main>
<footer><p>Made by <code>amips report</code>. Shares are of the keys; a model's multiplications are
counted as the keys that would cost as many.</p></footer>
</body>
</html>
"""

_GROUPS = (
    (
        "What it costs",
        (
            "recall-against-cost",
            "promised-recall",
            "cells-searched",
            "filtered-recall",
            "latency",
        ),
    ),
    ("What it searches", ("cell-sizes", "map")),
    ("How it was trained", ("training",)),
)


def render(data: ReportData) -> str:
    """Return the whole page. All text of the data is escaped: names are others' words."""
    manifest = data.manifest
    key = manifest.collection
    name = "/".join(part for part in (key.database, key.name, key.field) if part)
    charts = all_charts(data)
    style = _STYLE % {
        theme: " ".join(f"--{name}: {both[place]};" for name, both in COLOURS.items())
        for place, theme in enumerate(("light", "dark"))
    }
    parts = [
        f'<p class="verdict">{escape(manifest.reason)}</p>',
        _key_figures(data),
        _contents(charts),
        *_sections(charts, data),
        '<section aria-labelledby="card"><h2 id="card">Model card</h2>',
        _card(data),
        "</section>",
    ]
    return _PAGE.format(
        title=escape(f"Routing {key.name}: {manifest.model}"),
        style=style,
        heading=escape(f"A router for {key.name}"),
        what=escape(
            f"{name} · {manifest.count:,} keys of dimension {manifest.dim} ({manifest.metric}) · "
            f"bundle {manifest.version}"
        ),
        main="\n".join(parts),
    )


def write_pngs(data: ReportData, folder: Path) -> list[Path]:
    """Write every chart as NAME.png, on white, and return their paths."""
    paths = []
    for chart in all_charts(data):
        path = folder / f"{chart.name}.png"
        replace_file(path, to_png(chart))
        paths.append(path)
    return paths


def all_charts(data: ReportData) -> list[Chart]:
    """Draw what the data is enough for, in the order of the page."""
    first = (recall_against_cost(data), promises(data))
    charts = [chart for chart in first if chart is not None]
    curves, timings = data.curves, data.timings
    if curves is not None and curves.probes:
        charts.append(probes(data, curves))
    filtered = filtered_recall(data)
    if filtered is not None:
        charts.append(filtered)
    if timings is not None and timings.native_ms:
        charts.append(latency(timings))
    if data.cells is not None:
        charts.append(cell_sizes(data))
    if curves is not None:
        charts.append(flat_map(curves.flat))
        if curves.epochs:
            charts.append(training(curves))
    return charts


def _key_figures(data: ReportData) -> str:
    manifest, timings = data.manifest, data.timings
    k = manifest.default_k
    nearest = min(
        (figure.recall for figure in manifest.figures),
        key=lambda recall: abs(recall - manifest.default_recall),
        default=manifest.default_recall,
    )
    at = {f.candidate: f for f in manifest.figures if (f.k, f.recall) == (k, nearest)}
    told: list[tuple[str, str]] = []
    for name, what in ((manifest.model, "this model"), ("native", "nearest centroids")):
        figure = at.get(name)
        if figure is not None and figure.total is not None:
            told.append(
                (f"{figure.total:.1%}", f"of a full scan for recall@{k} {nearest:.2f}, {what}")
            )
    if manifest.n_cells:
        told.append((f"{manifest.n_cells}", "cells"))
    if timings is not None and timings.native_ms:
        told.append(
            (f"{timings.routed_recall:.3f}", f"recall@{timings.k} found in the collection, routed")
        )
    else:
        told.append((f"{manifest.parameters:,}", "multiplications of the model a query"))
    items = "".join(f"<li><strong>{escape(a)}</strong> {escape(b)}</li>" for a, b in told)
    return f'<ul class="key">{items}</ul>'


def _contents(charts: Sequence[Chart]) -> str:
    links = "".join(f'<li><a href="#{c.name}">{escape(c.title)}</a></li>' for c in charts)
    return (
        f'<nav aria-label="Findings"><ol>{links}<li><a href="#card">Model card</a></li></ol></nav>'
    )


def _sections(charts: Sequence[Chart], data: ReportData) -> Iterable[str]:
    for number, (heading, names) in enumerate(_GROUPS, start=1):
        inside = [_figure(chart) for chart in charts if chart.name in names]
        inside += [f"<p>{escape(text)}</p>" for text in _missing(heading, data)]
        if inside:
            yield f'<section aria-labelledby="s{number}"><h2 id="s{number}">{heading}</h2>'
            yield from inside
            yield "</section>"


def _missing(heading: str, data: ReportData) -> Iterable[str]:
    """Say what is not shown, and why."""
    if heading == "What it costs" and data.timings is None:
        yield (
            "Times are not shown: with --collection URI --queries test.npy the collection itself "
            "is searched, natively and routed."
        )
    if heading == "How it was trained" and data.curves is None:
        yield (
            "Training curves, cells searched by a query and the map are not shown: they are kept "
            "in curves.json of a run's folder, which a bundle by itself does not have, nor a run "
            "of an earlier version."
        )


def _figure(chart: Chart) -> str:
    name = chart.name
    svg = to_svg(chart)
    opening, rest = svg.split(">", 1)
    told = (
        f'<title id="{name}-title">{escape(chart.title)}</title>'
        f'<desc id="{name}-desc">{escape(chart.description)}</desc>'
    )
    return (
        f'<figure id="{name}"><h3>{escape(chart.title)}</h3>'
        f'<p class="hint">Scroll sideways to see all of the chart.</p>'
        f'<div class="plot">{opening}>{told}{rest}</div>'
        f"<figcaption>{escape(chart.caption)}</figcaption>"
        f'<details><summary>The numbers<span class="sr"> of: {escape(chart.title)}</span></summary>'
        f"{_table(chart.title, chart.header, chart.rows)}</details></figure>"
    )


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _card(data: ReportData) -> str:
    manifest = data.manifest
    key = manifest.collection
    told = {"log": "logged queries", "guess": "queries guessed from the keys: no better than that"}
    facts = [
        ("model", f"{manifest.model}, recipe {manifest.preset}"),
        ("made for", f"{key.database}, collection {key.name!r}, field {key.field!r}"),
        ("metric", f"{manifest.metric}, dimension {manifest.dim}"),
        ("snapshot", f"{manifest.count:,} keys, fingerprint {manifest.snapshot}"),
        ("trained on", told[manifest.queries]),
        ("target", f"recall@{manifest.default_k} {manifest.default_recall}"),
        ("cells", f"{manifest.n_cells}, layout {manifest.layout}" if manifest.n_cells else "none"),
        ("cost", f"{manifest.parameters:,} multiplications a query"),
        ("advice", manifest.choice),
        ("version", manifest.version),
        ("created", manifest.created),
        ("made with", ", ".join(f"{tool} {at}" for tool, at in sorted(manifest.tools.items()))),
        *(
            (name, f"{entry.bytes:,} bytes, sha256 {entry.sha256}")
            for name, entry in sorted(manifest.files.items())
        ),
    ]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts
    )
    return f'<table class="card"><tbody>{rows}</tbody></table>'
