"""A job, planned whole: which files there will be, and the units of work that fill them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from frozendict import frozendict

import compressed_format
from compressed_format.checkpoint.index import file_name_problem
from compressed_format.errors import CheckpointError, Problem

__all__ = ["Job", "Part", "Unit"]


class Unit(Protocol):
    """A piece of work that can be pickled, and that changes nothing when it is done a second time.

    ``id`` is unique in its job; ``nbytes`` is what it reads of the source, for the progress; ``files`` are the names
    of all parts that it writes to.
    """

    @property
    def id(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    def run(self, folder: Path) -> None:
        """Write spans of the files in ``folder``, by :func:`~compressed_format.checkpoint.spans.write_span`.

        They are there already, at their full sizes. No other unit writes to these spans.
        """
        ...


@dataclass(frozen=True)
class Part:
    """A file that units fill: it begins with ``header`` and has ``size`` bytes in all."""

    header: bytes
    size: int


@dataclass(frozen=True)
class Job:
    """All that is to be done, and the ``fingerprint`` of what it was planned from: JSON values by name.

    The names of ``parts`` and of ``files``, which are written when all units are done, are relative, with forward
    slashes. Raises :class:`CheckpointError` for a job that contradicts itself.
    """

    fingerprint: Mapping[str, Any]
    parts: Mapping[str, Part]
    units: Sequence[Unit]
    files: Mapping[str, bytes | Path] = field(default_factory=frozendict)

    def __post_init__(self) -> None:
        problems = tuple(self._problems())
        if problems:
            raise CheckpointError("cannot be written as a checkpoint:", problems)

    def identity(self) -> dict[str, Any]:
        """What another attempt at this job has in common with this one, as JSON."""
        plan = hashlib.sha256()
        for name, part in sorted(self.parts.items()):
            plan.update(json.dumps([name, part.size, hashlib.sha256(part.header).hexdigest()]).encode())
        for unit in self.units:
            plan.update(json.dumps([unit.id, unit.nbytes, unit.files]).encode())
        content = {
            "fingerprint": dict(self.fingerprint),
            "plan": plan.hexdigest(),
            "version": compressed_format.__version__,
        }
        identity: dict[str, Any] = json.loads(json.dumps(content))  # as it will be read again: tuples are lists
        return identity

    def _problems(self) -> Iterator[Problem]:
        names = {*self.parts, *self.files}
        for name in sorted(names):
            if reason := file_name_problem(name):
                yield Problem(repr(name), f"the name {reason}")
            elif inside := names.intersection(str(parent) for parent in Path(name).parents):
                yield Problem(name, f"{min(inside)!r} cannot be both a file and the folder of this one")
        for name in sorted(self.parts.keys() & self.files.keys()):
            yield Problem(name, "cannot be both a file of tensors and another one")
        for name, part in self.parts.items():
            if len(part.header) > part.size:
                yield Problem(name, f"its header has {len(part.header)} bytes, and the whole file {part.size}")
        for name, count in Counter(unit.id for unit in self.units).items():
            if count > 1:
                yield Problem(f"unit {name}", f"is there {count} times")
        for unit in self.units:
            if missing := set(unit.files) - self.parts.keys():
                yield Problem(f"unit {unit.id}", f"writes to {min(missing)!r}, which is not among the files of the job")
