"""Options that several commands have, and the question that ``--yes`` answers."""

from __future__ import annotations

import sys

import click

from amips_plugins.errors import InvalidInput

__all__ = ["agreed", "agreed_to_remove", "dry_run_option", "json_option", "yes_option"]

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on standard output."
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would happen, and change nothing."
)


def agreed(what: str, *, yes: bool) -> bool:
    """Ask somebody at a terminal whether to go on. A script is not asked: what it does goes on."""
    if yes or not sys.stdin.isatty():
        return True
    return _asked(what, default=True)


def agreed_to_remove(what: str, *, yes: bool) -> bool:
    """Ask somebody at a terminal whether to remove something for good.

    Raises
    ------
    InvalidInput
        Nobody is there to ask, and ``--yes`` was not given.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise InvalidInput(f"{what} Nobody is there to ask whether it may: add --yes.")
    return _asked(what, default=False)


def _asked(what: str, *, default: bool) -> bool:
    click.echo(what, err=True)
    return click.confirm("Go on?", default=default, err=True)
