"""What a config says about weights that are zero, and experts that are gone."""

from __future__ import annotations

from typing import Annotated, Any

from frozendict import frozendict
from pydantic import Field

from compressed_format.config.kinds import Boolean, Choice, Integer, ListOf, Nullable, Number, Text
from compressed_format.config.model import Model
from compressed_format.config.patterns import Target
from compressed_format.config.report import Report, child, show
from compressed_format.config.words import CompressionFormat, MoESparsityMethod

__all__ = ["MoESparsityConfig", "SparsityConfig"]

_FORMATS = (CompressionFormat.DENSE, CompressionFormat.SPARSE_BITMASK, CompressionFormat.SPARSE_24_BITMASK)
_NOT_SPARSE = frozendict(
    {
        word.value: f'"{word}" is no format of sparse weights; they take {", ".join(_FORMATS)}'
        for word in CompressionFormat
        if word not in _FORMATS
    }
)


class SparsityConfig(Model):
    """Which modules hold mostly zeros, and how their other weights are stored."""

    format: Annotated[CompressionFormat, Choice(CompressionFormat, refused=_NOT_SPARSE)] = Field(
        description="How sparse weights are stored; dense stores the zeros too."
    )
    targets: Annotated[tuple[str, ...], Nullable(ListOf(Target()), instead=())] = Field(
        default=(), description="The sparse modules, as in a group."
    )
    ignore: Annotated[tuple[str, ...], Nullable(ListOf(Target()), instead=())] = Field(
        default=(), description="Modules that are not sparse although a target names them."
    )
    global_sparsity: Annotated[float | None, Nullable(Number())] = Field(
        default=0.0, description="Which part of all weights is zero; for information only."
    )
    sparsity_structure: Annotated[str | None, Nullable(Text())] = Field(
        default=None, description="The pattern of the zeros, 2:4 or unstructured; left out, it follows from the format."
    )
    registry_requires_subclass: Annotated[bool, Boolean()] = Field(
        default=False, description="Means nothing here; older readers expect it to be false."
    )

    @classmethod
    def rules(cls, fields: dict[str, Any], place: str, report: Report) -> None:
        stored = fields.get("format")
        if stored in _NOT_SPARSE:
            report.error(child(place, "format"), _NOT_SPARSE[str(stored)])
        implied = "2:4" if stored is CompressionFormat.SPARSE_24_BITMASK else "unstructured"
        structure = fields.get("sparsity_structure")
        if structure is None:
            structure = implied
        if stored is CompressionFormat.SPARSE_24_BITMASK and structure != implied:
            report.doubt(child(place, "sparsity_structure"), f'must be "2:4" for {stored}, not {show(structure)}')
        fields["sparsity_structure"] = structure

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file."""
        return {
            "format": self.format.value,
            "targets": list(self.targets),
            "ignore": list(self.ignore),
            "global_sparsity": self.global_sparsity,
            "sparsity_structure": self.sparsity_structure,
            "registry_requires_subclass": self.registry_requires_subclass,
        }


class MoESparsityConfig(Model):
    """How many experts each layer of a mixture of experts has kept."""

    method: Annotated[MoESparsityMethod, Choice(MoESparsityMethod)] = Field(
        description="What became of the others: prune removed them, novice replaced each by a constant."
    )
    num_experts: Annotated[tuple[int | None, ...], ListOf(Nullable(Integer()))] = Field(
        description="For each decoder layer the number of experts kept, or null for a layer without experts."
    )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file."""
        return {"method": self.method.value, "num_experts": list(self.num_experts)}
