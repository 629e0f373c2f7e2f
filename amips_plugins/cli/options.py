"""Options that several commands have, and the question that ``--yes`` answers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amips_plugins.errors import InvalidInput

if TYPE_CHECKING:
    from amips_plugins.collection import CollectionKey
    from amips_plugins.vectors import FloatArray, Metric

__all__ = [
    "QueryFiles",
    "agreed",
    "agreed_to_remove",
    "dry_run_option",
    "json_option",
    "queries_options",
    "registry_option",
    "several_option",
    "yes_option",
]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on standard output."
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would happen, and change nothing."
)

several_option = click.option(
    "--name",
    default="all",
    show_default=True,
    help="What several collections, searched as one, are called together.",
)

registry_option = click.option(
    "--registry",
    help="Folder or fsspec URL of the registry.  [default: $AMIPS_REGISTRY, or ./registry]",
)


@dataclass(frozen=True)
class QueryFiles:
    """What ``--queries`` and ``--queries-log`` name; neither, or one of them."""

    vectors: Path | None
    log: Path | None

    def read(self, key: CollectionKey, metric: Metric, dim: int) -> FloatArray | None:
        """Read the queries for this collection; None where none are named."""
        from amips_plugins.cli.queries import load_queries, load_query_log

        if self.vectors is not None:
            return load_queries(self.vectors, dim)
        return None if self.log is None else load_query_log(self.log, key, metric, dim)


def queries_options(about: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command both options; it receives them as one ``queries``, a ``QueryFiles``."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option(
            "--queries",
            type=click.Path(path_type=Path),
            help=f"A .npy file of (n, dim) query vectors{about}",
        )
        @click.option(
            "--queries-log",
            type=click.Path(path_type=Path),
            help="The folder, or one file, of a QueryLog of this collection, in place of "
            "--queries.",
        )
        @functools.wraps(command)
        def with_files(*, queries: Path | None, queries_log: Path | None, **rest: Any) -> Any:
            if queries is not None and queries_log is not None:
                raise InvalidInput("Pass one of --queries and --queries-log, not both.")
            return command(queries=QueryFiles(queries, queries_log), **rest)

        return with_files

    return give


def agreed(what: str, *, yes: bool) -> bool:
    """Ask somebody at a terminal whether to go on. A script is not asked: what it does goes on."""
    if yes or not sys.stdin.isatty():
        return True
    return _asked(what, default=True)


def agreed_to_remove(what: str, *, yes: bool) -> bool:
    """Ask somebody at a terminal whether to remove something; elsewhere require ``--yes``."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise InvalidInput(f"{what} Nobody is there to ask whether it may: add --yes.")
    return _asked(what, default=False)


def _asked(what: str, *, default: bool) -> bool:
    click.echo(what, err=True)
    return click.confirm("Go on?", default=default, err=True)
