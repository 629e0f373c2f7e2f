"""``amips registry``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from amips_plugins.cli.options import (
    agreed,
    dry_run_option,
    json_option,
    registry_option,
    yes_option,
)
from amips_plugins.cli.output import echo_json

if TYPE_CHECKING:
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.collection import CollectionKey

__all__ = ["command"]


@click.group("registry")
def command() -> None:
    """List, pin and roll back the published bundles of a collection.

    A collection is named as DATABASE/NAME/FIELD, such as milvus/docs/vector, or
    milvus@tenant/docs/vector in Milvus' database tenant; leave FIELD empty for Qdrant's unnamed
    vector.
    """


class _Key(click.ParamType["CollectionKey"]):
    name = "collection"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> CollectionKey:
        from amips_plugins.collection import CollectionKey

        parts = str(value).split("/")
        if len(parts) != 3:
            self.fail(f"{value!r} is not DATABASE/NAME/FIELD.", param, ctx)
        database, name, field = parts
        database, _, namespace = database.partition("@")
        return CollectionKey(database=database, namespace=namespace, name=name, field=field)


_KEY = click.argument("collection", type=_Key())


@command.command("list")
@_KEY
@registry_option
@json_option
def list_versions(collection: CollectionKey, registry: str | None, as_json: bool) -> None:
    """List the versions; a star marks the one that serves.

    Whose signature a signed version has is found out when it is opened.
    """
    from amips_plugins.bundle.registry import Registry

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


def _changing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of what changes which version serves."""
    for option in (json_option, yes_option, dry_run_option, registry_option):
        command = option(command)
    return command


@command.command("pin")
@_KEY
@click.argument("version")
@_changing
def pin(collection: CollectionKey, version: str, **asked: Any) -> None:
    """Serve VERSION, whatever is published later."""

    def change(store: Registry) -> str:
        store.pin(collection, version)
        return f"{version} serves and is pinned."

    _change(collection, lambda _: version, change, **asked)


@command.command("unpin")
@_KEY
@_changing
def unpin(collection: CollectionKey, **asked: Any) -> None:
    """Serve the newest version again, and every later one."""
    _change(
        collection,
        lambda store: next(reversed(store.versions(collection)), None),
        lambda store: f"{store.unpin(collection)} serves.",
        **asked,
    )


@command.command("rollback")
@_KEY
@_changing
def roll_back(collection: CollectionKey, **asked: Any) -> None:
    """Serve the version that served before the current one."""
    _change(
        collection,
        lambda store: store.previous(collection),
        lambda store: f"{store.roll_back(collection)} serves.",
        **asked,
    )


def _change(
    collection: CollectionKey,
    target: Callable[[Registry], str | None],
    change: Callable[[Registry], str],
    *,
    registry: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Change what serves, where somebody who is asked agrees; say what serves now."""
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.errors import BundleCorrupt

    store = Registry(registry)
    try:
        now, then = store.current(collection), target(store)
    except BundleCorrupt:  # a damaged latest.json, which pinning mends
        now = then = None
    known = then is not None and then in store.versions(collection)
    what = f"{now} serves. This serves {then}." if now else f"This serves {then}."
    if dry_run and known:
        said = what
    elif known and not agreed(what, yes=yes):
        return
    else:  # where nothing is known of the target, it says itself why
        said = change(store)
    if as_json:
        echo_json({"current": store.current(collection), "pinned": store.pinned(collection)})
    else:
        click.echo(said)
