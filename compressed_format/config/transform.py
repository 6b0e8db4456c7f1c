"""What a config says about rotations of weights and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from frozendict import frozendict
from pydantic import Field

from compressed_format.config.kinds import Boolean, Choice, DTypeName, Integer, Kind, ListOf, Nullable
from compressed_format.config.model import Model, Object
from compressed_format.config.patterns import Target
from compressed_format.config.report import INVALID, Report, child, show
from compressed_format.config.words import TransformLocation, TransformType

__all__ = ["Named", "TransformArgs", "TransformConfig", "TransformScheme"]


@dataclass(frozen=True)
class Named:
    """A kind: an object whose keys are free names and whose values are all of one model."""

    model: type[Model]

    def read(self, value: Any, place: str, report: Report) -> Any:
        if not isinstance(value, Mapping):
            report.error(place, f"must be an object, not {show(value)}")
            return INVALID
        members = {}
        for key, member in value.items():
            if not isinstance(key, str):
                report.error(place, f"the keys of an object are strings, not {show(key)}")
                continue
            read = self.kind_of(key, member).read(member, child(place, key), report)
            if read is not INVALID:
                members[str.__str__(key)] = read
        return frozendict(members)

    def kind_of(self, key: str, value: Any) -> Kind:  # for those whose members differ
        """The kind of one member of the object."""
        return Object(self.model)

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": Object(self.model).schema()}


class TransformArgs(Model):
    """Where one transform is applied."""

    targets: Annotated[tuple[str, ...], ListOf(Target(), single=True)] = Field(
        description="The modules that are transformed, as in a group."
    )
    location: Annotated[TransformLocation, Choice(TransformLocation)] = Field(
        description="Which tensor of the module is transformed."
    )
    inverse: Annotated[bool, Boolean()] = Field(
        default=False, description="Whether the inverse of the matrix is applied."
    )
    ignore: Annotated[tuple[str, ...], ListOf(Target(), single=True)] = Field(
        default=(), description="Modules that are not transformed although a target names them."
    )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file."""
        return {
            "targets": list(self.targets),
            "location": self.location.value,
            "inverse": self.inverse,
            "ignore": list(self.ignore),
        }


class TransformScheme(Model):
    """One transform: a matrix and the places it is applied at."""

    type: Annotated[TransformType, Choice(TransformType)] = Field(description="Which matrix is multiplied by.")
    apply: Annotated[tuple[TransformArgs, ...], ListOf(Object(TransformArgs))] = Field(
        default=(), description="The places the matrix is applied at."
    )
    randomize: Annotated[bool, Boolean()] = Field(
        default=False, description="Whether each place has a random matrix of its own."
    )
    requires_grad: Annotated[bool, Boolean()] = Field(default=False, description="Whether the matrix is trained.")
    head_dim: Annotated[int | None, Nullable(Integer())] = Field(
        default=None, description="The size of the square blocks on the diagonal, where the matrix consists of such."
    )
    precision: Annotated[str, DTypeName()] = Field(
        default="torch.float32", description="The dtype in which activations are transformed."
    )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file."""
        return {
            "type": self.type.value,
            "apply": [args.to_dict() for args in self.apply],
            "randomize": self.randomize,
            "requires_grad": self.requires_grad,
            "head_dim": self.head_dim,
            "precision": self.precision,
        }


class TransformConfig(Model):
    """The transforms of a model."""

    config_groups: Annotated[frozendict[str, TransformScheme], Named(TransformScheme)] = Field(
        description="The transforms by name; the names are part of the names of their tensors."
    )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a file."""
        return {"config_groups": {name: scheme.to_dict() for name, scheme in self.config_groups.items()}}
