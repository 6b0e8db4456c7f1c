"""``QuantizationConfig``: the whole of what a model's ``config.json`` says about its compression."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from frozendict import frozendict
from pydantic import Field

from compressed_format.config.args import QuantizationArgs
from compressed_format.config.formats import infer_format
from compressed_format.config.groups import Groups, move_sparsity, settle_formats
from compressed_format.config.json_text import parse_json, read_bytes, repeated_keys
from compressed_format.config.kinds import Anything, Choice, ListOf, Nullable, Number, Text, thaw
from compressed_format.config.model import Model, Object, read_fields
from compressed_format.config.patterns import Target
from compressed_format.config.presets import PRESETS, find_preset
from compressed_format.config.report import INVALID, Report, child, options, show
from compressed_format.config.scheme import QuantizationScheme, check_activations, format_kind
from compressed_format.config.sparsity import MoESparsityConfig, SparsityConfig
from compressed_format.config.transform import TransformConfig
from compressed_format.config.words import CompressionFormat, QuantizationStatus
from compressed_format.errors import CheckpointError, ConfigError, Problem

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FORMAT_VERSION", "QUANT_METHOD", "QuantizationConfig"]

FORMAT_VERSION = "0.20.0"
"""The release of the format that the bytes written by this library follow."""

QUANT_METHOD = "compressed-tensors"


@dataclass(frozen=True)
class _Method(Text):
    """A kind: the name of this format among all that ``quantization_config`` may hold."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, str):
            spelled = value.lower().replace("_", "-") if report.lenient else value
            if spelled == QUANT_METHOD:
                return QUANT_METHOD
            if report.lenient:
                report.warn(place, f"must be {show(QUANT_METHOD)}, not {show(value)}; it is read as such")
                return QUANT_METHOD
        report.error(place, f"must be {show(QUANT_METHOD)}, not {show(value)}")
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"const": QUANT_METHOD}


@dataclass(frozen=True)
class _TopFormat:
    """A kind: the format of all groups that have none of their own, or that they differ."""

    choice: Choice

    def read(self, value: Any, place: str, report: Report) -> Any:
        known = isinstance(value, str) and value.lower() in [word.value for word in CompressionFormat]
        if report.lenient and isinstance(value, str) and not known:
            # "fakequant" is what configs say that have never been saved with a model
            if value.lower() != "fakequant":
                report.warn(place, f"{options(value, self.choice.allowed())}; it is ignored")
            return None
        return self.choice.read(value, place, report)

    def schema(self) -> dict[str, Any]:
        return self.choice.schema()


class QuantizationConfig(Model):
    """Which modules of a model are compressed, and how. Frozen and hashable.

    Authors come in through :meth:`from_file`, :meth:`from_dict` and :meth:`preset`, or construct one from
    :class:`QuantizationScheme` objects; all are strict. Files of existing models come in through
    :meth:`from_checkpoint`. Whatever is wrong, one :class:`~compressed_format.errors.ConfigError` lists it all.

    Once constructed, every scheme in ``config_groups`` has a ``format``, and ``format`` is the one they share, not
    counting ``dense``: ``mixed-precision`` if they differ, ``dense`` if there is none. A group's own ``format``
    decides; then a top-level ``format`` that was given; then the rest of the group (see
    :func:`~compressed_format.config.formats.infer_format`). What groups ask for by ``sparsity: "2:4"`` has moved to
    ``sparsity_config``.
    """

    derived = frozenset({"extra", "unknown"})

    config_groups: Annotated[frozendict[str, QuantizationScheme], Groups()] = Field(
        default=frozendict(),
        description="The groups of modules by name. A group named like a preset may be just the list of its targets.",
    )
    format: Annotated[CompressionFormat, Nullable(_TopFormat(format_kind(mixed=True)))] = Field(
        default=None,  # type: ignore[assignment]  # settled by the rules below
        description="How the tensors of groups without a format of their own are stored; left out, it follows from "
        "the groups. mixed-precision says that they differ.",
    )
    ignore: Annotated[tuple[str, ...], Nullable(ListOf(Target()), instead=())] = Field(
        default=(), description="Modules that stay as they are although a target names them."
    )
    kv_cache_scheme: Annotated[QuantizationArgs | None, Nullable(Object(QuantizationArgs, check_activations))] = Field(
        default=None, description="How cached keys and values are quantized; null leaves them as they are."
    )
    sparsity_config: Annotated[SparsityConfig | None, Nullable(Object(SparsityConfig), or_empty=True)] = Field(
        default=None, description="Which modules are sparse. Groups with sparsity 2:4 write it."
    )
    transform_config: Annotated[TransformConfig | None, Nullable(Object(TransformConfig), or_empty=True)] = Field(
        default=None, description="Rotations of weights and activations."
    )
    moe_sparsity_config: Annotated[MoESparsityConfig | None, Nullable(Object(MoESparsityConfig), or_empty=True)] = (
        Field(default=None, description="How many experts each layer has kept.")
    )
    quant_method: Annotated[str, _Method()] = Field(
        default=QUANT_METHOD, description="The name of the format among all that may stand in a config.json."
    )
    quantization_status: Annotated[QuantizationStatus, Choice(QuantizationStatus)] = Field(
        default=QuantizationStatus.COMPRESSED, description="How far the stored modules have come; compressed."
    )
    global_compression_ratio: Annotated[float | None, Nullable(Number())] = Field(
        default=None, description="By how much the model has shrunk; for information only."
    )
    version: Annotated[str | None, Nullable(Text())] = Field(
        default=FORMAT_VERSION, description="The release of the format that the stored tensors follow."
    )
    extra: Annotated[frozendict[str, Any], Anything()] = Field(
        default=frozendict(), description="Top-level keys of a checkpoint that mean nothing here; written back."
    )
    unknown: Annotated[frozendict[str, Any], Anything()] = Field(
        default=frozendict(),
        description="Empty keys inside groups that nobody here knows, by JSON path; kept, but not written back, "
        "because every reader refuses a key that it does not know there.",
    )

    @classmethod
    def rules(cls, fields: dict[str, Any], place: str, report: Report) -> None:
        for key in fields.get("extra", ()):
            if key in cls.model_fields and key not in cls.derived:
                report.error(child(child(place, "extra"), key), "is a key of its own, not an extra one")
        sparsity = fields.get("sparsity_config")
        if sparsity is not None and sparsity.format is CompressionFormat.DENSE:
            # Older releases say so of models without sparsity, and servers refuse what is not empty.
            fields["sparsity_config"] = None
        move_sparsity(fields, place, report)
        settle_formats(fields, place, report)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """The config in a hand-written JSON file, which holds just the ``quantization_config`` object.

        Raises :class:`~compressed_format.errors.ConfigError` for what is wrong in it, with file, line and column
        where it is no JSON, and :class:`~compressed_format.errors.CheckpointError` if it cannot be read.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(problems=[Problem("", f"a config file must be a path, not {show(path)}")])
        source = Path(path)
        raw = parse_json(read_bytes(source), str(source))
        report = Report()
        repeated_keys(raw, "", report)
        return cls._authored(raw, report, str(source))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """The config that a ``quantization_config`` object of an author describes; everything with a default may be
        missing. Raises :class:`~compressed_format.errors.ConfigError` for everything that is wrong."""
        return cls._authored(mapping, Report(), "")

    @classmethod
    def preset(cls, name: str) -> Self:
        """The config that quantizes every Linear by one of :data:`PRESETS`; the name may be in any case.

        Nothing is ignored: ``preset("W4A16").replace(ignore=("lm_head",))`` leaves the output layer alone.
        """
        scheme = find_preset(name)
        if scheme is None:
            raise ConfigError(problems=[Problem("preset", options(name, PRESETS))])
        return cls(config_groups=frozendict({"group_0": scheme}))

    @classmethod
    def from_checkpoint(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], *, allow_unknown: bool = False
    ) -> tuple[Self, tuple[Problem, ...]]:
        """The config of an existing model, as any release from 0.9 on wrote it, and warnings about it.

        ``source`` is a model's folder, its ``config.json``, a file with just the ``quantization_config`` object, or
        the content of either as a mapping. What keeps the tensors from being decoded is a
        :class:`~compressed_format.errors.ConfigError`; what merely means nothing is a warning. Unknown top-level keys
        are kept in ``extra``, empty ones inside a group in ``unknown``. One with a value inside a group is an error,
        because it may change what the tensors mean; ``allow_unknown=True`` turns that into a warning.
        """
        from compressed_format.config.checkpoint import config_of_checkpoint

        return config_of_checkpoint(cls, source, allow_unknown=allow_unknown)

    @classmethod
    def _authored(cls, raw: Any, report: Report, source: str) -> Self:
        """The config that a parsed hand-written object describes."""
        if not isinstance(raw, Mapping):
            report.error("", f"a config must be an object, not {show(raw)}")
            report.finish(source)
        raw = {key: value for key, value in raw.items() if key != "$schema"}
        if "config_groups" not in raw and not any(
            raw.get(key) for key in ("kv_cache_scheme", "sparsity_config", "transform_config")
        ):
            report.error("config_groups", "is missing: without groups of modules nothing is compressed")
        return cls._read(raw, report, source, cls.derived)

    @classmethod
    def _read(cls, raw: Mapping[Any, Any], report: Report, source: str, hidden: frozenset[str]) -> Self:
        """The config in an object, after raising everything that is wrong with it."""
        fields = read_fields(cls, raw, "", report, hidden=hidden)
        report.finish(source)
        return cast("Self", cls.model_construct(**fields))

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed; the changes are checked like an author's.

        A new ``format`` without new ``config_groups`` becomes the format of every group with weights.
        """
        current = dict(self) | {"format": None}  # it follows from the groups
        if "format" in fields and "config_groups" not in fields:
            current["config_groups"] = frozendict(
                {name: scheme.model_copy(update={"format": None}) for name, scheme in self.config_groups.items()}
            )
        return self._replaced(fields, current)

    def format_of(self, scheme: QuantizationScheme) -> CompressionFormat:
        """The format of the tensors of a scheme.

        It is the scheme's own format, which every scheme of this config has. For another scheme it is this config's
        format if that says something about it, else the one that follows from the scheme. ``mixed-precision`` and
        ``dense`` say nothing about a scheme with weights; a scheme without is always ``dense``.
        """
        if scheme.format is not None:
            return scheme.format
        if scheme.weights is None:
            return CompressionFormat.DENSE
        if self.format not in (CompressionFormat.MIXED_PRECISION, CompressionFormat.DENSE):
            return self.format
        return infer_format(scheme.weights, scheme.input_activations)

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` object of a model's ``config.json``.

        Valid for the releases 0.17 to 0.20 of the format and for what serves it: a format in every group, no key that
        an older reader refuses, ``{}`` for a sparsity or transform config that is not there.
        """

        def written(part: Any, absent: Any) -> Any:
            return absent if part is None else part.to_dict()

        known = {
            "config_groups": {name: scheme.to_dict() for name, scheme in self.config_groups.items()},
            "format": self.format.value,
            "global_compression_ratio": self.global_compression_ratio,
            "ignore": list(self.ignore),
            "kv_cache_scheme": written(self.kv_cache_scheme, None),
            "moe_sparsity_config": written(self.moe_sparsity_config, None),
            "quant_method": self.quant_method,
            "quantization_status": self.quantization_status.value,
            "sparsity_config": written(self.sparsity_config, {}),
            "transform_config": written(self.transform_config, {}),
        }
        if self.version is not None:
            known["version"] = self.version
        extra: dict[str, Any] = thaw(self.extra)
        return known | extra

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; a :class:`~compressed_format.errors.CheckpointError` if that fails."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        try:
            Path(path).write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(problems=[Problem(str(path), f"cannot be written: {reason}")]) from error
