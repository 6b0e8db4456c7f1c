"""``QuantizationArgs``: how the values of one tensor are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from frozendict import frozendict
from pydantic import Field

from compressed_format.config.kinds import Anything, Boolean, Choice, DTypeName, Integer, Nullable, Text, thaw
from compressed_format.config.model import Model
from compressed_format.config.report import INVALID, Report, child, options, show
from compressed_format.config.words import ActivationOrdering, QuantizationStrategy, QuantizationType

__all__ = ["QuantizationArgs"]

_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
_DYNAMIC = (QuantizationStrategy.TOKEN, QuantizationStrategy.TENSOR, *_GROUPED)
_FLOAT_BITS = (4, 6, 8)
_WIDEST = 64


@dataclass(frozen=True)
class _Dynamic:
    """A kind: ``false``, ``true`` or ``"local"``."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, str):
            if (value.lower() if report.lenient else value) == "local":
                return "local"
        elif isinstance(value, bool) or (report.lenient and isinstance(value, (int, float)) and value in (0, 1)):
            return bool(value)
        report.error(place, f'must be true, false or "local", not {show(value)}')
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"enum": [True, False, "local"]}


@dataclass(frozen=True)
class _Ordering:
    """A kind: an activation ordering under any of its spellings; ``false`` is none."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        word = value.lower() if report.lenient and isinstance(value, str) else value
        if value is False:
            return None
        if isinstance(word, str) and word in ("static", "weight"):
            return ActivationOrdering.STATIC
        if value is True or (isinstance(word, str) and word in ("group", "dynamic")):
            if report.lenient:
                return ActivationOrdering.GROUP
            report.error(
                place,
                f"{show(value)} reorders the columns of the stored weight, which no current reader supports; "
                'write "static"',
            )
            return INVALID
        report.error(place, options(value, ["static", "weight"]))
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"enum": ["static", "weight", False]}


@dataclass(frozen=True)
class _Block:
    """A kind: the ``[rows, columns]`` of a block, or the older ``"128x128"``."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        sides: Any = value
        if isinstance(value, str) and len(value) < 40:
            sides = [int(side) if side.isascii() and side.isdecimal() else None for side in value.lower().split("x")]
        if isinstance(sides, (list, tuple)) and len(sides) == 2:
            whole = [int(side) if isinstance(side, float) and side.is_integer() else side for side in sides]
            if all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in whole):
                return (int(whole[0]), int(whole[1]))
        report.error(place, f"must be [rows, columns], two positive integers, not {show(value)}")
        return INVALID

    def schema(self) -> dict[str, Any]:
        side = {"type": "integer", "minimum": 1}
        pair = {"type": "array", "items": side, "minItems": 2, "maxItems": 2}
        return {"anyOf": [pair, {"type": "string", "pattern": "^0*[1-9][0-9]*[xX]0*[1-9][0-9]*$"}]}


class QuantizationArgs(Model):
    """How the values of one tensor are quantized: width, type, and which of them share a scale.

    Frozen and hashable. Constructing one checks it; all that is wrong is listed in one
    :class:`~compressed_format.errors.ConfigError`. ``strategy`` is never ``None`` once constructed: without one,
    no ``group_size`` means ``tensor``, a positive one ``group`` and -1 ``channel``. Canonical forms are held:
    a ``group_size`` of -1 becomes ``None``, ``"weight"`` becomes ``ActivationOrdering.STATIC``, and a ``zp_dtype``
    that says nothing (symmetric, or what follows from the type anyway) becomes ``None``.
    """

    num_bits: Annotated[int, Integer()] = Field(
        default=8, description="The width of one value: 1 to 8 for int, 4, 6 or 8 for float."
    )
    type: Annotated[QuantizationType, Choice(QuantizationType)] = Field(
        default=QuantizationType.INT, description="Whether the quantized values are integers or small floats."
    )
    symmetric: Annotated[bool, Boolean()] = Field(
        default=True, description="Whether zero is stored as 0; asymmetric values store a zero point beside each scale."
    )
    strategy: Annotated[QuantizationStrategy, Nullable(Choice(QuantizationStrategy))] = Field(
        default=None,  # type: ignore[assignment]  # the rules below put the inferred one in its place
        description="Which values share a scale. Left out, it follows from group_size: tensor without one, group for "
        "a positive one, channel for -1.",
    )
    group_size: Annotated[int | None, Nullable(Integer(least=-1))] = Field(
        default=None,
        description="How many neighbouring columns share a scale, for the strategies group and tensor_group.",
    )
    block_structure: Annotated[tuple[int, int] | None, Nullable(_Block())] = Field(
        default=None, description="The [rows, columns] that share a scale, for the strategy block."
    )
    dynamic: Annotated[bool | Literal["local"], _Dynamic()] = Field(
        default=False,
        description="Whether scales are computed anew for each input; local computes only the inner scales of "
        "tensor_group so. Weights are never dynamic.",
    )
    actorder: Annotated[ActivationOrdering | None, Nullable(_Ordering())] = Field(
        default=None,
        description="The order in which a calibration visits the columns of a weight with the strategy group; static "
        "(also called weight) visits important ones first and leaves the stored layout alone.",
    )
    scale_dtype: Annotated[str | None, Nullable(DTypeName())] = Field(
        default=None,
        description="The dtype in which scales are stored: torch.uint8 for the MX formats, torch.float8_e4m3fn for "
        "NVFP4. Left out, scales have the dtype of the weight.",
    )
    zp_dtype: Annotated[str | None, Nullable(DTypeName())] = Field(
        default=None, description="The dtype of zero points. It follows from type and num_bits; leave it out."
    )
    observer: Annotated[str | None, Nullable(Text())] = Field(
        default=None, description="How calibration finds the range of static activations, for example minmax."
    )
    observer_kwargs: Annotated[frozendict[str, Any], Anything()] = Field(
        default=frozendict(), description="Settings of the observer."
    )

    @classmethod
    def rules(cls, fields: dict[str, Any], place: str, report: Report) -> None:
        _check_width(fields, place, report)
        _settle_strategy(fields, place, report)
        _check_strategy(fields, place, report)
        _check_dynamic(fields, place, report)
        _settle_ordering(fields, place, report)
        _settle_zero_point(fields, place, report)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file: the keys that every reader of today knows, and others only where they say
        something."""
        written = {
            "num_bits": self.num_bits,
            "type": self.type.value,
            "symmetric": self.symmetric,
            "strategy": self.strategy.value,
            "group_size": self.group_size,
            "dynamic": self.dynamic,
        }
        optional = {
            "block_structure": self.block_structure,
            "actorder": self.actorder,
            "scale_dtype": self.scale_dtype,
            "zp_dtype": self.zp_dtype,
            "observer": self.observer,
            "observer_kwargs": self.observer_kwargs or None,
        }
        return written | {key: thaw(value) for key, value in optional.items() if value is not None}


def _check_width(fields: Mapping[str, Any], place: str, report: Report) -> None:
    if not {"num_bits", "type"} <= fields.keys():
        return
    bits = fields["num_bits"]
    if fields["type"] is QuantizationType.FLOAT:
        if bits not in _FLOAT_BITS:
            report.error(child(place, "num_bits"), f"must be 4, 6 or 8 for type float, not {show(bits)}")
    elif not 1 <= bits <= 8:
        # Wider integers than can be run are in checkpoints; what has no bits at all can only break arithmetic.
        tell = report.doubt if 1 <= bits <= _WIDEST else report.error
        tell(child(place, "num_bits"), f"must be 1 to 8 for type int, not {show(bits)}")


def _settle_strategy(fields: dict[str, Any], place: str, report: Report) -> None:
    """Put the strategy that follows from the group size in the place of none."""
    size = fields.get("group_size", INVALID)
    if size == 0:
        # Nothing was ever grouped by zero, but a file whose strategy needs no group size may say so.
        needed = fields.get("strategy") in (None, *_GROUPED)
        say = report.error if needed else report.doubt
        say(child(place, "group_size"), "must be positive, or -1 for one scale per channel, not 0")
        fields["group_size"] = size = None
        if needed:
            del fields["group_size"]
            size = INVALID
    if "strategy" in fields and fields["strategy"] is None:
        if size is INVALID:
            del fields["strategy"]
        elif size is None:
            fields["strategy"] = QuantizationStrategy.TENSOR
        else:
            fields["strategy"] = QuantizationStrategy.GROUP if size > 0 else QuantizationStrategy.CHANNEL


def _check_strategy(fields: dict[str, Any], place: str, report: Report) -> None:
    if "strategy" not in fields:
        return
    strategy = fields["strategy"]
    if "group_size" in fields:
        size = fields["group_size"]
        if strategy in _GROUPED:
            if size is None or size < 1:
                found = "" if size is None else f", not {show(size)}"
                report.error(child(place, "group_size"), f"must be a positive integer for strategy {strategy}{found}")
        elif size is not None and size > 0:
            report.error(
                child(place, "group_size"),
                f"{show(size)} goes with strategy group or tensor_group, not with {strategy}",
            )
        else:
            fields["group_size"] = None
    if "block_structure" in fields:
        block = fields["block_structure"]
        if strategy is QuantizationStrategy.BLOCK and block is None:
            report.error(child(place, "block_structure"), "must be [rows, columns] for strategy block")
        elif strategy is not QuantizationStrategy.BLOCK and block is not None:
            report.error(child(place, "block_structure"), f"goes with strategy block, not with {strategy}")


def _check_dynamic(fields: Mapping[str, Any], place: str, report: Report) -> None:
    if not {"strategy", "dynamic"} <= fields.keys():
        return
    strategy, dynamic = fields["strategy"], fields["dynamic"]
    if dynamic == "local":
        if strategy is not QuantizationStrategy.TENSOR_GROUP:
            report.error(child(place, "dynamic"), f'"local" goes with strategy tensor_group, not with {strategy}')
    elif dynamic and strategy not in _DYNAMIC:
        report.error(
            child(place, "dynamic"),
            f"true goes with the strategies {', '.join(_DYNAMIC)}, not with {strategy}",
        )
    elif not dynamic and strategy is QuantizationStrategy.TOKEN:
        report.error(child(place, "dynamic"), "must be true for strategy token, whose scales belong to one input")


def _settle_ordering(fields: dict[str, Any], place: str, report: Report) -> None:
    """An order of columns means something only where columns have scales of their own."""
    if fields.get("actorder") is None or "strategy" not in fields:
        return
    if fields["strategy"] is not QuantizationStrategy.GROUP:
        report.doubt(child(place, "actorder"), f"goes with strategy group, not with {fields['strategy']}")
        fields["actorder"] = None


def _settle_zero_point(fields: dict[str, Any], place: str, report: Report) -> None:
    """Checkpoints spell out a dtype that follows from type and width; only another one says something."""
    if not {"symmetric", "type", "num_bits", "zp_dtype"} <= fields.keys() or fields["zp_dtype"] is None:
        return
    bits = fields["num_bits"]
    implied = "torch.int8" if bits <= 8 else "torch.int16" if bits <= 16 else "torch.int32"
    if fields["type"] is QuantizationType.FLOAT:
        implied = "torch.float8_e4m3fn"
    if fields["symmetric"] or fields["zp_dtype"] == implied:
        fields["zp_dtype"] = None
    else:
        report.doubt(
            child(place, "zp_dtype"),
            f"zero points of these values are {implied}, not {fields['zp_dtype']}; leave it out",
        )
