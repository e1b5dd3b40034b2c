"""Completing commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete forge's commands, options and choices.

    \b
    SHELL bash: eval "$(forge completion bash)"           in ~/.bashrc
          zsh:  eval "$(forge completion zsh)"            in ~/.zshrc
          fish: forge completion fish | source            in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "forge", "_FORGE_COMPLETE").source())
