"""``QuantizationScheme``: what one group of modules has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from frozendict import frozendict
from pydantic import Field

from compressed_format.config.args import QuantizationArgs
from compressed_format.config.formats import misfit
from compressed_format.config.kinds import Choice, ListOf, Nullable
from compressed_format.config.model import Model, Object
from compressed_format.config.patterns import Target
from compressed_format.config.report import INVALID, Report, child, show
from compressed_format.config.words import CompressionFormat, QuantizationStrategy

__all__ = ["QuantizationScheme", "check_activations", "describe_scheme", "format_kind"]

_ACTIVATIONS = tuple(QuantizationStrategy(name) for name in ("token", "tensor", "group", "tensor_group", "attn_head"))

_REFUSED_FORMATS = {
    CompressionFormat.MIXED_PRECISION: '"mixed-precision" says that groups differ; a group has one format of its own',
    CompressionFormat.MARLIN_24: '"marlin-24" is only read; write "pack-quantized", and sparsity "2:4" beside it',
    CompressionFormat.SPARSE_BITMASK: '"sparse-bitmask" is a format of sparsity_config, not of quantized weights',
    CompressionFormat.SPARSE_24_BITMASK: '"sparse-24-bitmask" is no format of a group; ask for it with sparsity "2:4"',
}


@dataclass(frozen=True)
class _TwoFour:
    """A kind: the one sparsity there is, ``"2:4"``."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, str) and value == "2:4":
            return "2:4"
        report.error(place, f'must be "2:4", not {show(value)}')
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"enum": ["2:4"]}


def check_weights(fields: dict[str, Any], place: str, report: Report) -> None:
    """The rules for args that describe weights."""
    if fields.get("dynamic"):
        report.doubt(child(place, "dynamic"), f"must be false for weights, not {show(fields['dynamic'])}")
    if fields.get("strategy") in (QuantizationStrategy.TOKEN, QuantizationStrategy.ATTN_HEAD):
        report.doubt(
            child(place, "strategy"),
            f"{show(fields['strategy'])} is for activations; weights take tensor, channel, group, block, tensor_group",
        )


def check_activations(fields: dict[str, Any], place: str, report: Report) -> None:
    """The rules for args that describe the outputs of a module or a kv cache."""
    _check_activations(fields, place, report, report.doubt)


def check_inputs(fields: dict[str, Any], place: str, report: Report) -> None:
    """The rules for args that describe the inputs of a module; no release has ever read other strategies."""
    _check_activations(fields, place, report, report.error)


def _check_activations(fields: dict[str, Any], place: str, report: Report, say: Callable[[str, str], None]) -> None:
    strategy = fields.get("strategy")
    if strategy is not None and strategy not in _ACTIVATIONS:
        say(
            child(place, "strategy"),
            f"{show(strategy)} is for weights; activations take {', '.join(_ACTIVATIONS)}",
        )
    if fields.get("actorder") is not None:
        report.error(child(place, "actorder"), "is for weights, and these are activations; leave it out")


def format_kind(*, mixed: bool) -> Choice:
    """The kind of a ``format`` key: of a group, or (``mixed``) of the whole config."""
    refused = {word.value: reason for word, reason in _REFUSED_FORMATS.items()}
    if mixed:
        del refused["mixed-precision"]
    return Choice(CompressionFormat, refused=frozendict(refused))


class QuantizationScheme(Model):
    """What one group of modules has in common: its targets, and how their tensors are quantized.

    Frozen and hashable. Constructing one checks it; all that is wrong is listed in one
    :class:`~compressed_format.errors.ConfigError`. Schemes inside a
    :class:`~compressed_format.config.QuantizationConfig` always have a ``format`` and never a ``sparsity``, which has
    moved to the config's ``sparsity_config`` there.
    """

    authors_only = frozenset({"sparsity"})

    targets: Annotated[tuple[str, ...], ListOf(Target())] = Field(
        description="The modules of this group: classes such as Linear, full names, or patterns behind re: that "
        "match from the start of the full name."
    )
    weights: Annotated[QuantizationArgs | None, Nullable(Object(QuantizationArgs, check_weights))] = Field(
        default=None, description="How weights are quantized; null leaves them as they are."
    )
    input_activations: Annotated[QuantizationArgs | None, Nullable(Object(QuantizationArgs, check_inputs))] = Field(
        default=None, description="How the inputs of the modules are quantized; null leaves them as they are."
    )
    output_activations: Annotated[QuantizationArgs | None, Nullable(Object(QuantizationArgs, check_activations))] = (
        Field(default=None, description="How the outputs of the modules are quantized; null leaves them as they are.")
    )
    format: Annotated[CompressionFormat | None, Nullable(format_kind(mixed=False))] = Field(
        default=None,
        description="How the tensors of this group are stored; left out, it follows from the rest of the group.",
    )
    sparsity: Annotated[Literal["2:4"] | None, Nullable(_TwoFour())] = Field(
        default=None,
        description="2:4 says that two of every four neighbouring weights are zero, and stores only the others.",
    )

    @classmethod
    def rules(cls, fields: dict[str, Any], place: str, report: Report) -> None:
        if fields.get("targets") == ():
            report.doubt(child(place, "targets"), "is empty, so the group applies to nothing")
        if fields.get("format") is CompressionFormat.MIXED_PRECISION:
            report.error(child(place, "format"), _REFUSED_FORMATS[CompressionFormat.MIXED_PRECISION])
        elif {"format", "weights"} <= fields.keys() and fields["format"] is not None:
            reason = misfit(fields["format"], fields["weights"])
            if reason is not None:
                report.doubt(child(place, "format"), f"{show(fields['format'])} {reason}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file, without ``sparsity``, which no file's group has."""

        def written(args: QuantizationArgs | None) -> dict[str, Any] | None:
            return None if args is None else args.to_dict()

        return {
            "targets": list(self.targets),
            "weights": written(self.weights),
            "input_activations": written(self.input_activations),
            "output_activations": written(self.output_activations),
            "format": None if self.format is None else self.format.value,
        }


def describe_scheme(scheme: QuantizationScheme) -> str:
    """A scheme in a few words: ``int4 group 128 symmetric, input float8 token dynamic``."""
    parts = []
    for label, args in (
        ("", scheme.weights),
        ("input ", scheme.input_activations),
        ("output ", scheme.output_activations),
    ):
        if args is not None:
            parts.append(label + _describe_args(args))
    return ", ".join(parts)


def _describe_args(args: QuantizationArgs) -> str:
    size = ""
    if args.block_structure is not None:
        size = f" {args.block_structure[0]}x{args.block_structure[1]}"
    elif args.group_size is not None and args.group_size > 0:
        size = f" {args.group_size}"
    kind = "dynamic" if args.dynamic else ("symmetric" if args.symmetric else "asymmetric")
    return f"{args.type.value}{args.num_bits} {args.strategy.value}{size} {kind}"
