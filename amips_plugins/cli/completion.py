"""``amips completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["command"]

_VARIABLE = "_AMIPS_COMPLETE"  # click reads it; its name follows from the program's


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete the names of commands, options, choices and files.

    \b
      bash  echo 'eval "$(amips completion bash)"' >> ~/.bashrc
      zsh   echo 'eval "$(amips completion zsh)"' >> ~/.zshrc     (below compinit)
      fish  amips completion fish > ~/.config/fish/completions/amips.fish
    """  # noqa: D301 - click wants the backspace itself, to keep the lines
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"This version of click knows no completion for {shell}.")
    click.echo(found(ctx.find_root().command, {}, "amips", _VARIABLE).source())
