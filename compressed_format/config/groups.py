"""The groups of a config: reading them, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frozendict import frozendict

from compressed_format.config.formats import infer_format, infer_format_of_file, misfit
from compressed_format.config.kinds import Kind, ListOf
from compressed_format.config.model import Object
from compressed_format.config.patterns import PREFIX, Target
from compressed_format.config.presets import PRESETS, find_preset, nearest_preset
from compressed_format.config.report import INVALID, Report, child, show
from compressed_format.config.scheme import QuantizationScheme
from compressed_format.config.sparsity import SparsityConfig
from compressed_format.config.transform import Named
from compressed_format.config.words import CompressionFormat, QuantizationStatus

__all__ = ["Groups", "move_sparsity", "settle_formats"]

_F = CompressionFormat


@dataclass(frozen=True)
class _Preset:
    """A kind: the targets of a group that is named after a preset."""

    name: str

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, str):
            report.error(place, f"must be an object, or a list of targets; did you mean [{show(value)}]?")
            return INVALID
        preset = find_preset(self.name)
        if preset is None:
            guess = nearest_preset(self.name)
            hint = f"did you mean {guess}?" if guess else f"the presets are {', '.join(PRESETS)}"
            report.error(place, f"a group that is a list of targets is named after a preset, {hint}")
        elif not value:
            report.doubt(place, "is empty, so the group applies to nothing")
        targets = ListOf(Target()).read(value, place, report)
        if preset is None or targets is INVALID:
            return INVALID
        return preset.model_copy(update={"targets": targets})

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": Target().schema(), "minItems": 1}


class Groups(Named):
    """A kind: groups by name; a list of targets is the preset that the group is named after."""

    def __init__(self) -> None:
        super().__init__(QuantizationScheme)

    def kind_of(self, key: str, value: Any) -> Kind:
        return _Preset(key) if isinstance(value, (str, list, tuple)) else Object(QuantizationScheme)

    def schema(self) -> dict[str, Any]:
        names = "|".join("".join(f"[{c}{c.lower()}]" if c.isalpha() else c for c in name) for name in PRESETS)
        scheme = Object(QuantizationScheme).schema()
        targets = _Preset("").schema()
        return {
            "type": "object",
            "properties": {
                name: {
                    "description": f"The modules that the preset {name} applies to, or a group of another kind.",
                    "anyOf": [targets, scheme],
                }
                for name in PRESETS
            },
            "patternProperties": {f"^({names})$": {"anyOf": [targets, scheme]}},
            "additionalProperties": scheme,
        }


def settle_formats(fields: dict[str, Any], place: str, report: Report) -> None:
    """Give every group its format, and the config the one that follows from them."""
    if not {"config_groups", "format"} <= fields.keys():
        return
    groups: Mapping[str, QuantizationScheme] = fields["config_groups"]
    given: CompressionFormat | None = fields["format"]
    settled = {}
    for name, scheme in groups.items():
        if scheme.format is not None:
            settled[name] = scheme
            continue
        chosen = _format_of_group(scheme, given, fields.get("quantization_status"), report)
        reason = misfit(chosen, scheme.weights)
        group = child(child(place, "config_groups"), name)
        if reason is not None and chosen is given:
            report.doubt(child(place, "format"), f"{show(chosen)} {reason} ({group})")
        elif reason is not None:
            report.doubt(child(group, "weights"), f"no format fits: {show(chosen)}, the nearest one, {reason}")
        settled[name] = scheme.model_copy(update={"format": chosen})
    fields["config_groups"] = frozendict(settled)
    found = {scheme.format for scheme in settled.values()} - {_F.DENSE}
    fields["format"] = found.pop() if len(found) == 1 else _F.MIXED_PRECISION if found else _F.DENSE
    if settled and given not in (None, _F.MIXED_PRECISION, fields["format"]):
        own = ", ".join(f"{name}: {scheme.format}" for name, scheme in settled.items())
        report.doubt(
            child(place, "format"), f"{show(given)} contradicts the formats of the groups ({own}); leave it out"
        )


def _format_of_group(
    scheme: QuantizationScheme,
    given: CompressionFormat | None,
    status: QuantizationStatus | None,
    report: Report,
) -> CompressionFormat:
    """The format of a group that has none of its own; ``given`` is that of the whole config."""
    if scheme.weights is None:
        return _F.DENSE
    # A model that was saved before it was compressed says "dense" and means it; one that was compressed said so of
    # the attention or the cache, and of no weight.
    means_nothing = given is _F.DENSE and report.lenient and status is QuantizationStatus.COMPRESSED
    if given not in (None, _F.MIXED_PRECISION) and not means_nothing:
        return given
    infer = infer_format_of_file if report.lenient else infer_format
    return infer(scheme.weights, scheme.input_activations)


def move_sparsity(fields: dict[str, Any], place: str, report: Report) -> None:
    """Turn ``sparsity`` of groups into the ``sparsity_config`` of the format.

    Its targets are those of the sparse groups. It ignores what the config ignores, and those targets of other groups
    that are more specific than all of the sparse ones, so that a module which another group takes from a sparse group
    is not sparse. ``global_sparsity`` is 0.5: of each target, two of every four weights are zero.
    """
    groups: Mapping[str, QuantizationScheme] = fields.get("config_groups", frozendict())
    sparse = [name for name, scheme in groups.items() if scheme.sparsity is not None]
    if not sparse:
        return
    if fields.get("sparsity_config") is not None:
        report.error(child(place, "sparsity_config"), f"stands beside sparsity of {', '.join(sparse)}; leave one out")
        return
    targets = dict.fromkeys(target for name in sparse for target in groups[name].targets)
    others = dict.fromkeys(target for name, scheme in groups.items() if name not in sparse for target in scheme.targets)
    first = min(map(_precedence, targets), default=(0, ""))
    taken = [target for target in others if _precedence(target) < first]
    fields["sparsity_config"] = SparsityConfig.model_construct(
        format=_F.SPARSE_24_BITMASK,
        targets=tuple(targets),
        ignore=tuple(dict.fromkeys([*fields.get("ignore", ()), *taken])),
        global_sparsity=0.5,
        sparsity_structure="2:4",
        registry_requires_subclass=False,
    )
    fields["config_groups"] = frozendict(
        {name: scheme.model_copy(update={"sparsity": None}) for name, scheme in groups.items()}
    )


def _precedence(target: str) -> tuple[int, str]:
    """Sorts targets by what they win over. A word without a dot is taken for a class, which any name wins over."""
    is_class = not target.startswith(PREFIX) and "." not in target
    return (2 if is_class else 1 if target.startswith(PREFIX) else 0, target)
