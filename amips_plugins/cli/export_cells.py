"""``amips export-cells``."""

from __future__ import annotations

from pathlib import Path

import click

from amips_plugins.cli.options import json_option
from amips_plugins.cli.output import echo_json, size

__all__ = ["command"]


@click.command("export-cells")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder to write to.",
)
@json_option
def command(run: Path, out: Path, as_json: bool) -> None:
    """Write cells and router as plain tensors (safetensors and JSON).

    RUN is the folder that amips train filled, or a bundle. Centroids, router weights, thresholds
    and the cell of every key, for an engine's own pruner or a program in another language.
    """
    from amips_plugins.errors import InvalidInput
    from amips_plugins.export.neutral_cells import DESCRIPTION, export_cells
    from amips_plugins.routing.serving import bundle_in

    if out.exists() and any(out.iterdir()) and not (out / DESCRIPTION).exists():
        raise InvalidInput(f"{out} holds something else; name a new folder.")
    described = export_cells(bundle_in(run), out)
    if as_json:
        echo_json(described)
        return
    written = sum(file["bytes"] for file in described["files"].values())
    click.echo(
        f"{described['n_cells']} cells of {described['bundle']} are in {out} ({size(written)}); "
        f"{DESCRIPTION} says what each tensor is."
    )
