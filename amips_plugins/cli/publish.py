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
@click.option("--anyway", is_flag=True, help="Also where the native search was found cheaper.")
def command(run: Path, registry: str | None, anyway: bool) -> None:
    """Publish the bundle of a RUN folder and make it the latest of its collection.

    Readers see the old version or the new one, never half of one.
    """
    from amips_plugins.errors import InvalidInput
    from amips_plugins.registry import Registry
    from amips_plugins.serving import bundle_in

    bundle = bundle_in(run)
    manifest = bundle.manifest
    if manifest.choice == "native" != manifest.model and not anyway:
        raise InvalidInput(f"{manifest.reason} To publish {manifest.model} all the same: --anyway.")
    store = Registry(registry)
    published = store.publish(bundle.location)
    click.echo(f"Published {published} to {store.root}.")
