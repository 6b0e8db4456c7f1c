"""The base of all parts of a config: frozen models that read themselves completely, whatever is wrong.

pydantic alone stops at the first rule across fields that fails and leaves such rules out where a field is wrong.
Here every field is read by its :class:`~compressed_format.config.kinds.Kind`, then the rules across fields see all
fields that are right, so that one report holds everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from compressed_format.config.kinds import Kind
from compressed_format.config.report import INVALID, Report, child, show

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Model", "Object", "Rule", "kind_of", "read_fields"]

Rule = Callable[[dict[str, Any], str, Report], None]
"""Checks the fields of one object against each other: ``rule(fields, place, report)``.

``fields`` holds what is right, defaults included; a field that has been reported is missing. A rule may replace a
value by its canonical form.
"""


class Model(BaseModel):
    """A frozen part of a config. Constructing one checks it as an author's; what is wrong is a ``ConfigError``."""

    # pydantic's own validators would never run, so none is built; that is a third of the time an import takes.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)

    authors_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that stand in hand-written configs and never in a checkpoint."""
    derived: ClassVar[frozenset[str]] = frozenset()
    """Fields that are no key of any file."""

    def __init__(self, /, **data: Any) -> None:
        report = Report()
        fields = read_fields(type(self), data, "", report, hidden=frozenset())
        report.finish()
        read = type(self).model_construct(**fields)
        for slot in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(self, slot, getattr(read, slot))

    @classmethod
    def rules(cls, fields: dict[str, Any], place: str, report: Report) -> None:
        """The rules across the fields of this model, see :data:`Rule`."""

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed; the changes are checked like an author's."""
        return self._replaced(fields, dict(self))

    def _replaced(self, changes: Mapping[str, Any], current: Mapping[str, Any]) -> Self:
        """A copy of ``current`` with ``changes``. What does not change may come from a lenient reading, and stays."""
        report = Report()
        fields = read_fields(type(self), changes, "", report, hidden=frozenset(), current=current)
        report.finish()
        return cast("Self", type(self).model_construct(**fields))


@dataclass(frozen=True)
class Object:
    """A kind: an object that is read as ``model``; ``rule`` adds what its role in the parent demands."""

    model: type[Model]
    rule: Rule | None = None

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, self.model):
            if self.rule is not None:
                self.rule(dict(value), place, report)
            return value
        if not isinstance(value, Mapping):
            report.error(place, f"must be an object, not {show(value)}")
            return INVALID
        before = len(report.errors)
        fields = read_fields(self.model, value, place, report)
        if self.rule is not None:
            self.rule(fields, place, report)
        return self.model.model_construct(**fields) if len(report.errors) == before else INVALID

    def schema(self) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.model.__name__}"}


def kind_of(field: FieldInfo) -> Kind:
    """The kind in the annotation of a field."""
    kind: Kind = field.metadata[0]
    return kind


def read_fields(
    model: type[Model],
    raw: Mapping[Any, Any],
    place: str,
    report: Report,
    *,
    hidden: frozenset[str] | None = None,
    current: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The right fields of one object, after reporting the others.

    ``hidden`` are the fields that are no keys; by default those of which the model says so. ``current`` holds values
    that stand in for those that are missing, before their defaults.
    """
    if hidden is None:
        hidden = model.derived | (model.authors_only if report.lenient else frozenset())
    known = {name: field for name, field in model.model_fields.items() if name not in hidden}
    for key, value in raw.items():
        if not isinstance(key, str):
            report.error(place, f"the keys of an object are strings, not {show(key)}")
        elif key not in known:
            report.unknown_key(child(place, key), key, value, known)
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in known and name in raw:
            value = kind_of(field).read(raw[name], child(place, name), report)
            if value is not INVALID:
                fields[name] = value
        elif name in current:
            fields[name] = current[name]
        elif field.is_required() and name in known:
            report.error(child(place, name), f"is missing: {field.description}")
        else:
            fields[name] = field.get_default(call_default_factory=True)
    model.rules(fields, place, report)
    return fields
