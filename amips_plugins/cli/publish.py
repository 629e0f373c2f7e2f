"""``amips publish``."""

from __future__ import annotations

from pathlib import Path

import click

from amips_plugins.cli.options import dry_run_option, json_option, registry_option
from amips_plugins.cli.output import echo_json

__all__ = ["command"]


@click.command("publish")
@click.argument("run", type=click.Path(path_type=Path))
@registry_option
@click.option("--anyway", is_flag=True, help="Also where the native search was found cheaper.")
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path),
    help="Sign it first, with this private key (PEM, elliptic curve). A password comes from "
    "AMIPS_SIGNING_PASSWORD.",
)
@click.option(
    "--sign-sigstore",
    is_flag=True,
    help="Sign it first, without a key, by Sigstore: you log in, and your identity is published.",
)
@dry_run_option
@json_option
def command(
    run: Path,
    registry: str | None,
    anyway: bool,
    sign_key: Path | None,
    sign_sigstore: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish the bundle of a RUN folder and make it the latest of its collection.

    Readers see the old version or the new one, never half of one. Publishing a version again with a
    signature adds it, or replaces the one there was.
    """
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.bundle.signing import sign_with_key, sign_with_sigstore
    from amips_plugins.errors import InvalidInput
    from amips_plugins.routing.serving import bundle_in

    if sign_key is not None and sign_sigstore:
        raise InvalidInput("Pass one of --sign-key and --sign-sigstore, not both.")
    if dry_run and (sign_key is not None or sign_sigstore):
        raise InvalidInput("A dry run signs nothing: leave --sign-key and --sign-sigstore out.")
    bundle = bundle_in(run)
    manifest = bundle.manifest
    if manifest.choice == "native" != manifest.model and not anyway:
        raise InvalidInput(f"{manifest.reason} To publish {manifest.model} all the same: --anyway.")
    store = Registry(registry)
    if sign_key is not None:
        sign_with_key(Path(bundle.location), sign_key)
    elif sign_sigstore:
        sign_with_sigstore(Path(bundle.location))
    published = store.publish(bundle.location, dry_run=dry_run)
    if as_json:
        key = manifest.collection
        echo_json(
            {
                "version": published,
                "registry": store.root,
                "collection": str(key),
                "current": store.current(key),
                "pinned": store.pinned(key),
            }
        )
    elif dry_run:
        click.echo(f"{published} is sound, and would be published to {store.root}.")
    else:
        click.echo(f"Published {published} to {store.root}.")
