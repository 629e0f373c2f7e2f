"""``amips layout``, and what belongs to it: ``status``, ``rollback``, ``drop-old``."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

import click
from click.shell_completion import CompletionItem

from amips_plugins.cell_layout import BuildPlan, LayoutStatus
from amips_plugins.cli.options import (
    agreed,
    agreed_to_remove,
    dry_run_option,
    json_option,
    registry_option,
    yes_option,
)
from amips_plugins.cli.output import duration, echo_json, share, size
from amips_plugins.cli.progress import show_progress
from amips_plugins.collection import Collection

if TYPE_CHECKING:
    from amips_plugins.bundle.package import Bundle

__all__ = ["command"]


class _Layout(click.Group):
    """A group whose first argument may also be a URI or an option: then it builds the cells."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [_build.name or "", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for name in self.commands if name != _build.name]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = super().shell_complete(ctx, incomplete)
        known = {item.value for item in names}
        options = _build.shell_complete(ctx, incomplete)
        return [*names, *(item for item in options if item.value not in known)]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] URI")
        formatter.write_usage(ctx.command_path, "status|rollback|drop-old [OPTIONS] URI")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        click.Command.format_options(_build, ctx, formatter)
        self.format_commands(ctx, formatter)


@click.command("build")
@click.argument("uri")
@click.option("--bundle", "version", metavar="VERSION", help="A version other than the latest.")
@registry_option
@click.option(
    "--storage",
    type=click.Choice(["partitions", "field", "payload", "copy", "shards"]),
    help="What holds a cell. Milvus: partitions, field.  [default: partitions where they are few "
    "enough]  Qdrant: payload (in place), copy, shards (a copy with a shard key for every cell; "
    "Qdrant Edge: a shard with a graph below the collection's own).  "
    "[default: copy where there are a graph and an alias, shards where a search asks 8 or more]",
)
@click.option(
    "--index",
    type=click.Choice(["flat", "auto", "hnsw", "ivf_flat", "ivf_sq8"], case_sensitive=False),
    help="Milvus: the index inside the cells: exact, the one the collection has now, or a kind.  "
    "[default: what the bundle was trained for, mostly flat]",
)
@click.option(
    "--alias",
    help="The alias to point at a copy.  [default: the one in the URI, if it is one]",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder to go on from after a crash.  "
    "[default: .amips/DATABASE-NAME-LAYOUT-ADDRESS where the command runs]",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0.001),
    metavar="GB",
    help="Memory the database may use for the collection; the plan says how to keep it there.",
)
@dry_run_option
@yes_option
@click.option("--drop-old", is_flag=True, help="Afterwards drop what rollback would need.")
@json_option
def _build(
    uri: str,
    version: str | None,
    registry: str | None,
    memory: float | None,
    dry_run: bool,
    yes: bool,
    drop_old: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Put the collection URI into the cells of its bundle, while others read and write it.

    Milvus, and a Qdrant server where there is a graph and an alias, get a new collection, NAME__g2,
    with a partition or a payload value for every cell; the old one stays as it is until it is
    dropped. Else Qdrant gets a payload key in place.

    On a terminal it shows what will happen and asks. Interrupted at any point, the same command
    goes on from there.
    """
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.collection import collection_key
    from amips_plugins.layout import lay_out

    with _connect(uri) as collection:
        bundle = Registry(registry).open(collection_key(collection.info), version)
        options["work"] = options["work"] or _work(uri, bundle)
        there = options["alias"] is None and _finished(collection, bundle)
        if dry_run or (not there and not yes and sys.stdin.isatty()):
            nothing = BuildPlan((), collection.count(), 0, 0.0, ("these cells are there already",))
            plan = nothing if there else _plan(collection, bundle, memory, **options)
            if dry_run and as_json:
                echo_json(plan)
            else:
                _show_plan(plan, collection, to_stderr=not dry_run)
            if dry_run or not click.confirm("Go on?", default=True, err=True):
                return
        placed = collection if there else lay_out(collection, bundle, show_progress, **options)
        with placed:
            dropped = placed.layouts.drop_old() if drop_old else []
            status = placed.layouts.status()
        if as_json:
            echo_json(status)
            return
        click.echo(
            f"{status.name!r} has {status.count:,} keys in {bundle.manifest.n_cells} cells "
            f"(layout {status.layout}){', as before' if there else ''}."
        )
        if options["alias"] is None and _is_elsewhere(uri, collection, status):
            click.echo(
                f"From now on search collection={status.name}. (An alias, --alias NAME, would lead "
                f"there by itself.)"
            )
        if dropped:
            click.echo(f"Dropped: {', '.join(dropped)}.")
        elif status.older:
            click.echo(
                f"Kept to roll back to: {', '.join(status.older)}. To drop it: amips layout "
                f"drop-old URI"
            )


def _plan(collection: Any, bundle: Any, memory: float | None, **options: Any) -> BuildPlan:
    from amips_plugins.layout import plan_layout

    n_bytes = None if memory is None else int(memory * 1e9)
    return plan_layout(collection, bundle, memory=n_bytes, **options)


@click.group("layout", cls=_Layout, help=_build.help)
def command() -> None:  # noqa: D103 - its help is that of building
    pass


command.add_command(_build)


@command.command("status")
@click.argument("uri")
@json_option
def _status(uri: str, as_json: bool) -> None:
    """Show the cells of the collection URI, and what is kept beside them."""
    with _connect(uri) as collection:
        status = collection.layouts.status()
        if as_json:
            echo_json(status)
        else:
            _show_status(status)


@command.command("rollback")
@click.argument("uri")
@yes_option
@click.option("--anyway", is_flag=True, help="Also where it holds keys that what serves has not.")
@json_option
def _roll_back(uri: str, yes: bool, anyway: bool, as_json: bool) -> None:
    """Serve what the collection URI was before its cells were built."""
    with _connect(uri) as collection:
        before = collection.layouts.status()
        if not agreed(f"{before.name!r} serves. This serves what served before it.", yes=yes):
            return
        with collection.layouts.roll_back(anyway=anyway) as earlier:
            status = earlier.layouts.status()
        if as_json:
            echo_json(status)
            return
        cells = "without cells" if status.layout is None else f"in the cells {status.layout}"
        if _is_elsewhere(uri, collection, status):
            click.echo(f"From now on search collection={status.name}, {cells}.")
        else:
            click.echo(f"{status.name!r} serves, {cells}.")


@command.command("drop-old")
@click.argument("uri")
@yes_option
@click.option("--anyway", is_flag=True, help="Also where it holds keys that what serves has not.")
@dry_run_option
@json_option
def _drop_old(uri: str, yes: bool, anyway: bool, dry_run: bool, as_json: bool) -> None:
    """Drop what rollback would need, and what unfinished builds have left.

    There is no way back from it: on a terminal it asks, and a script has to say --yes.
    """
    with _connect(uri) as collection:
        status = collection.layouts.status()
        old = [*status.older, *status.unfinished]
        what = f"{status.name!r} serves. This drops: {', '.join(old)}."
        if old and not dry_run and not agreed_to_remove(what, yes=yes):
            return
        dropped = [] if dry_run else collection.layouts.drop_old(anyway=anyway)
        if as_json:
            echo_json({"dropped": dropped, "old": old})
        elif dry_run and old:
            click.echo(what)
        else:
            said = f"Dropped: {', '.join(dropped)}." if dropped else "There is nothing to drop."
            click.echo(said)


def _connect(uri: str) -> Collection:
    from amips_plugins.adapters.connect import connect

    return connect(uri)


def _finished(collection: Collection, bundle: Bundle) -> bool:
    """Whether nothing is left to do: to say so is no error."""
    status = collection.layouts.status()
    return status.layout == bundle.manifest.layout and not status.unfinished


def _work(uri: str, bundle: Bundle) -> Path:
    """Return the folder of this job: one for each collection, layout and database."""
    parts, key = urlsplit(uri), bundle.manifest.collection
    address = hashlib.sha256(f"{parts.netloc}{parts.path}{key.namespace}".encode()).hexdigest()[:8]
    # Of the name without the generation: an alias names another one when it has been moved.
    name = quote(key.name, safe="")
    return Path(".amips") / f"{key.database}-{name}-{bundle.manifest.layout}-{address}"


def _is_elsewhere(uri: str, collection: Collection, status: LayoutStatus) -> bool:
    """Tell whether the URI still leads to what served before: it names no alias that moved."""
    before = collection.info.name
    return before != status.name and parse_qs(urlsplit(uri).query)["collection"] == [before]


def _show_plan(plan: BuildPlan, collection: Collection, *, to_stderr: bool) -> None:
    lines = [f"{collection.info.name!r}, {plan.keys:,} keys:"]
    lines += [f"  {number}. {step}" for number, step in enumerate(plan.steps, 1)]
    lines.append(f"About {size(plan.n_bytes)} more to store, {duration(plan.seconds)}.")
    lines += [f"Note: {note}" for note in plan.notes]
    click.echo("\n".join(lines), err=to_stderr)


def _show_status(status: LayoutStatus) -> None:
    overflow = f"{status.overflow:,} ({share(status.overflow / max(1, status.count))})"
    rows = {
        "collection": status.name,
        "layout": status.layout or "none",
        "bundle": status.version or "-",
        "storage": status.storage or "-",
        "keys": f"{status.count:,}",
        "overflow": overflow if status.layout else "-",
        "unfinished": ", ".join(status.unfinished) or "-",
        "older": ", ".join(status.older) or "-",
    }
    for name, value in rows.items():
        click.echo(f"{name:<11} {value}")
    for note in status.notes:
        click.echo(f"Note: {note}")
