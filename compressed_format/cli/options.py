"""Options and arguments that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "CONSUMERS",
    "consumer_names",
    "debug_is_on",
    "debug_option",
    "existing_path",
    "for_option",
    "forget_debug",
    "json_option",
    "print_json",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

CONSUMERS = ("vllm", "sglang", "transformers", "llama.cpp")
"""What may stand after ``--for``, beside ``all``."""

_debug = False


def debug_is_on() -> bool:
    """Whether ``--debug`` was given. Of the process, because it is asked for when no command is left to ask."""
    return _debug


def forget_debug() -> None:
    """As if no ``--debug`` had been given yet."""
    global _debug
    _debug = False


def _turn_on(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    global _debug
    if value and not ctx.resilient_parsing:
        _debug = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_turn_on,
    help="Show the traceback of an error.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
existing_path: Any = click.Path(exists=True, path_type=Path)


def for_option(help: str) -> Callable[[_Function], _Function]:
    """``--for``, which may be given several times; :func:`consumer_names` reads it."""
    return click.option("--for", "consumers", multiple=True, type=click.Choice([*CONSUMERS, "all"]), help=help)


def consumer_names(chosen: tuple[str, ...]) -> tuple[str, ...]:
    """The consumers that were named, each once."""
    return CONSUMERS if "all" in chosen else tuple(dict.fromkeys(chosen))


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII, in which no number is NaN or infinite."""
    import json

    click.echo(json.dumps(value, indent=2, allow_nan=False))
