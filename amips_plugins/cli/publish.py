"""``amips publish``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command", "registry_option"]

registry_option = click.option(
    "--registry",
    help="Folder or fsspec URL of the registry.  [default: $AMIPS_REGISTRY, or ./registry]",
)


@click.command("publish")
@click.argument("run", type=click.Path(path_type=Path))
@registry_option
def command(run: Path, registry: str | None) -> None:
    """Publish the bundle of a RUN folder and make it the latest of its collection.

    Readers see the old version or the new one, never half of one.
    """
    from amips_plugins.bundle import MANIFEST
    from amips_plugins.registry import Registry

    folder = run / "bundle" if (run / "bundle" / MANIFEST).exists() else run
    store = Registry(registry)
    published = store.publish(folder)
    click.echo(f"Published {published} to {store.root}.")
