"""``amips report``."""

from __future__ import annotations

from pathlib import Path

import click

from amips_plugins.cli.output import size
from amips_plugins.cli.progress import show_progress

__all__ = ["command"]


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    help="The page to write.",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for every chart as a PNG, too.",
)
@click.option("--collection", metavar="URI", help="Search this collection, and show the times.")
@click.option(
    "--queries",
    type=click.Path(path_type=Path),
    help="With --collection: a .npy file of (n, dim) query vectors that no training has seen; 300 "
    "of them are searched.",
)
def command(
    run: Path, out: Path, png: Path | None, collection: str | None, queries: Path | None
) -> None:
    """Show a training as one HTML page that needs no network.

    RUN is the folder that amips train filled, or a bundle.
    """
    from dataclasses import replace

    from amips_plugins.errors import InvalidInput, require

    require("matplotlib", "report")
    from amips_plugins.files import replace_file
    from amips_plugins.report.data import read_report
    from amips_plugins.report.page import render, write_pngs

    if (collection is None) != (queries is None):
        raise InvalidInput("Times need both --collection and --queries; pass both, or neither.")
    data = read_report(run)
    if collection is not None and queries is not None:
        from amips_plugins.adapters.connect import connect
        from amips_plugins.cli.queries import load_queries
        from amips_plugins.report.timings import measure_timings

        with connect(collection) as opened:
            rows = load_queries(queries, opened.info.dim)
            live = measure_timings(opened, data.bundle, rows, show_progress)
        data = replace(data, timings=live)
    with show_progress("draw", 1, 0, "pages") as step:
        page = render(data).encode()
        replace_file(out, page)
        step.advance()
    click.echo(f"The report is in {out} ({size(len(page))}).")
    if png is not None:
        paths = write_pngs(data, png)
        click.echo(f"{len(paths)} charts are in {png}.")
