"""``schema`` and ``presets``: what a config may hold."""

from __future__ import annotations

import click

from compressed_format.cli.options import debug_option, json_option, print_json
from compressed_format.cli.tables import print_table
from compressed_format.config import PRESETS, QuantizationArgs, QuantizationConfig, json_schema

__all__ = ["NOT_SERVED", "presets_command", "schema_command"]

NOT_SERVED = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"})
"""The formats of presets that this library knows by name only; a table of its own, because theirs imports torch."""


@click.command(
    "schema",
    epilog="""\b
Examples:
  compressed-format schema > quantization_config.schema.json""",
)
@debug_option
def schema_command() -> None:
    """Print the JSON Schema of hand-written configs.

    An editor that is told of it, by "$schema" in the config, completes and checks the config while it is written.
    """
    print_json(json_schema())


@click.command(
    "presets",
    epilog="""\b
Examples:
  compressed-format presets
  compressed-format presets --json""",
)
@json_option
@debug_option
def presets_command(as_json: bool) -> None:
    """List the schemes that have a name, for --config and for groups of a config.

    With --json, each preset as the config that it is short for.
    """
    if as_json:
        print_json({name: QuantizationConfig.preset(name).to_dict() for name in PRESETS})
        return
    rows = []
    for name, scheme in PRESETS.items():
        format = QuantizationConfig.preset(name).format.value
        format += " (not written yet)" if format in NOT_SERVED else ""
        rows.append((name, _described(scheme.weights), _described(scheme.input_activations), format))
    print_table(("preset", "weights", "inputs", "format"), rows)


def _described(args: QuantizationArgs | None) -> str:
    """Width, type and strategy of a tensor in a few words."""
    if args is None:
        return "as they are"
    words = [f"{args.type.value}{args.num_bits}"]
    if args.block_structure is not None:
        words.append("block " + " x ".join(map(str, args.block_structure)))
    elif args.group_size:
        words.append(f"group {args.group_size}")
    else:
        words.append(args.strategy.value)
    if not args.symmetric:
        words.append("asymmetric")
    if args.dynamic:
        words.append("dynamic" if args.dynamic is True else f"dynamic {args.dynamic}")
    return ", ".join(words)
