"""``completion``: what a shell has to run once to complete commands, options and paths."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from compressed_format.cli.options import debug_option

__all__ = ["completion_command"]


@click.command(
    "completion",
    epilog="""\b
Examples:
  compressed-format completion bash
  compressed-format completion zsh
  compressed-format completion fish
\b
To have it in every shell that is started from now on:
  bash  compressed-format completion bash > ~/.local/share/bash-completion/completions/compressed-format
  zsh   echo 'eval "$(compressed-format completion zsh)"' >> ~/.zshrc
  fish  compressed-format completion fish > ~/.config/fish/completions/compressed-format.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes this command line in SHELL: bash (4.4 or newer), zsh or fish."""
    program = ctx.find_root()
    name = program.info_name or "compressed-format"
    complete = get_completion_class(shell)
    assert complete is not None
    variable = f"_{name.replace('-', '_').replace('.', '_')}_COMPLETE".upper()
    click.echo(complete(program.command, {}, name, variable).source())
