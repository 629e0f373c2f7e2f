"""``amips registry``."""

from __future__ import annotations

import click

from amips_plugins.bundle import CollectionKey
from amips_plugins.cli.output import echo_json
from amips_plugins.cli.publish import registry_option
from amips_plugins.registry import Registry

__all__ = ["command"]


@click.group("registry")
def command() -> None:
    """List, pin and roll back the published bundles of a collection.

    A collection is named as DATABASE/NAME/FIELD, such as milvus/docs/vector; leave FIELD empty for
    Qdrant's unnamed vector.
    """


class _Key(click.ParamType[CollectionKey]):
    name = "collection"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> CollectionKey:
        parts = str(value).split("/")
        if len(parts) != 3:
            self.fail(f"{value!r} is not DATABASE/NAME/FIELD.", param, ctx)
        database, name, field = parts
        return CollectionKey(database=database, name=name, field=field)


_KEY = click.argument("collection", type=_Key())


@command.command("list")
@_KEY
@registry_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_versions(collection: CollectionKey, registry: str | None, as_json: bool) -> None:
    """List the versions; a star marks the one that serves.

    Whose signature a signed version has is found out when it is opened.
    """
    store = Registry(registry)
    current, pinned = store.current(collection), store.pinned(collection)
    versions = store.versions(collection)
    signed = [version for version in versions if store.signed(collection, version)]
    if as_json:
        about = {"versions": versions, "current": current, "pinned": pinned, "signed": signed}
        echo_json(about)
        return
    for version in versions:
        mark = "*" if version == current else " "
        notes = ["pinned"] * (mark == "*" and pinned) + ["signed"] * (version in signed)
        click.echo(f"{mark} {version}" + (f" ({', '.join(notes)})" if notes else ""))
    if not versions:
        click.echo(f"Nothing is published for {collection.name!r} in {store.root}.")


@command.command("pin")
@_KEY
@click.argument("version")
@registry_option
def pin(collection: CollectionKey, version: str, registry: str | None) -> None:
    """Serve VERSION, whatever is published later."""
    Registry(registry).pin(collection, version)
    click.echo(f"{version} serves and is pinned.")


@command.command("unpin")
@_KEY
@registry_option
def unpin(collection: CollectionKey, registry: str | None) -> None:
    """Serve the newest version again, and every later one."""
    click.echo(f"{Registry(registry).unpin(collection)} serves.")


@command.command("rollback")
@_KEY
@registry_option
def roll_back(collection: CollectionKey, registry: str | None) -> None:
    """Serve the version that served before the current one."""
    click.echo(f"{Registry(registry).roll_back(collection)} serves.")
