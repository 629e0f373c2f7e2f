"""The ``amips`` command: one module per subcommand, loaded when it is called."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import Any

import click

from amips_plugins.errors import AmipsError

__all__ = ["main"]

_COMMANDS = {
    "demo": "Try it all on the docstrings of the installed Python packages.",
    "doctor": "Say whether routing would pay for a collection; nothing is changed.",
    "snapshot": "Copy a collection's ids and vectors to a folder.",
    "train": "Train a router on a snapshot and a log of queries.",
    "report": "Show a training, or a bundle, as one HTML page.",
    "publish": "Put a trained bundle into a registry.",
    "layout": "Put a collection into the cells of its bundle; status, rollback, drop-old.",
    "backfill": "Give the keys that others have written their cells.",
    "status": "Say how a collection's router does, and what to do about it.",
    "evaluate": "Compare native and learned search on your own queries.",
    "registry": "List, pin and roll back published bundles.",
}


class _Commands(click.Group):
    """Lists commands without importing them, so that ``amips --help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands, in the order you would use them"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="amips-plugins", prog_name="amips")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def _amips(ctx: click.Context, debug: bool) -> None:
    """Make a Milvus or Qdrant collection cheaper to search by learning from its queries.

    A collection is named by a URI:

    \b
      milvus:///path/docs.db?collection=docs      Milvus Lite
      milvus://localhost:19530?collection=docs    Milvus server
      qdrant:///path/folder?collection=docs       Qdrant, embedded
      qdrant://localhost:6333?collection=docs     Qdrant server
      qdrant-edge:///path/folder?collection=docs  Qdrant Edge, embedded

    Add &field=NAME where there are several vector fields, and +https to the scheme for TLS.
    Credentials come from AMIPS_MILVUS_TOKEN and AMIPS_QDRANT_API_KEY.

    The main job, from a collection to a cheaper search:

    \b
      amips snapshot URI -o snap/
      amips train snap/ --queries queries.npy -o run/
      amips publish run/ --registry ./registry
      amips layout URI
      amips evaluate URI --queries test.npy
    """  # noqa: D301 - click wants the backspace itself, to keep the lines
    ctx.obj = {"debug": debug}


def main(args: list[str] | None = None) -> None:
    """Run the command line; the console script's entry point."""
    warnings.showwarning = _show_warning
    arguments = sys.argv[1:] if args is None else args
    if "--debug" not in arguments:  # pymilvus logs tracebacks of what it raises as well
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    try:
        _amips.main(args=arguments, prog_name="amips", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nInterrupted. Run the same command again to go on from here.", err=True)
        sys.exit(130)
    except AmipsError as exc:
        if "--debug" in arguments:
            raise
        click.echo(f"Error: {exc}", err=True)
        sys.exit(1)
    except Exception as exc:
        if "--debug" in arguments or not _is_the_databases(exc):
            raise
        said = " ".join(str(getattr(exc, "message", "") or exc).split())
        click.echo(f"Error: The database says: {said[:500]} (--debug shows more.)", err=True)
        sys.exit(1)


def _is_the_databases(exc: Exception) -> bool:
    """Whether an error comes from a database or its client, and not from a fault of ours."""
    origins = {kind.__module__.partition(".")[0] for kind in type(exc).__mro__}
    return not origins.isdisjoint({"pymilvus", "grpc", "qdrant_client", "httpx", "qdrant_edge"})


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
