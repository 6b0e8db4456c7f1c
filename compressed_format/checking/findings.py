"""What a check finds: a stable code, how bad it is, where it is, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from compressed_format.config.words import Word
from compressed_format.errors import Problem

__all__ = ["Code", "Finding", "Report", "Severity"]


class Severity(Word):
    """How bad a finding is.

    ``ERROR``: it does not load, or is wrong without saying so. ``WARNING``: it can be used, but not everywhere, or not
    as one might expect. ``NOTE``: worth knowing, nothing to do.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Code:
    """One kind of finding. ``code`` never changes its meaning and is never used for anything else.

    ``consumer`` is the software, with the release whose rules these are, that alone minds; empty if all do.
    """

    code: str
    title: str
    severity: Severity
    meaning: str
    remedy: str
    consumer: str = ""

    @property
    def way_out(self) -> str:
        """:attr:`remedy` as the end of a sentence."""
        return self.remedy[0].lower() + self.remedy[1:].removesuffix(".")

    def at(self, place: str, message: str) -> Finding:
        """A finding of this kind. What to do is in ``message``, or else it is :attr:`remedy`."""
        return Finding(self.code, self.severity, place, message)

    def of(self, problem: Problem) -> Finding:
        """A finding of this kind out of a problem that an error listed."""
        return self.at(problem.place, problem.message)


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    ``code`` is a key of :data:`~compressed_format.checking.table.CODES`; ``place`` is a JSON path, a module's or a
    tensor's name, or a file; ``message`` says what was found there, what is allowed and the way out.
    """

    code: str
    severity: Severity
    place: str
    message: str

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        return f"{self.severity} {self.code} {where}{self.message}"

    def to_dict(self) -> dict[str, str]:
        """The finding as JSON: ``code``, ``severity``, ``place`` and ``message``."""
        return {"code": self.code, "severity": self.severity.value, "place": self.place, "message": self.message}


@dataclass(frozen=True)
class Report:
    """Everything that a check of ``path`` found, errors first.

    ``unreadable`` says that nothing there could be opened, so that nothing was checked.
    """

    path: str | os.PathLike[str]
    findings: tuple[Finding, ...]
    unreadable: bool = False

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What does not load, or is wrong without saying so."""
        return self._of(Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What can be used, but not everywhere, or not as one might expect."""
        return self._of(Severity.WARNING)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is worth knowing, and nothing more."""
        return self._of(Severity.NOTE)

    @property
    def ok(self) -> bool:
        """Whether there is nothing worse than a note."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0: nothing worse than a note. 1: at least one warning or error. 2: nothing could be opened at all."""
        if self.unreadable:
            return 2
        return 1 if self.errors or self.warnings else 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON: ``path``, ``ok``, ``exit_code``, the number of ``errors``, ``warnings`` and ``notes``,
        and the ``findings``."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "exit_code": self.exit_code,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "notes": len(self.notes),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity is severity)
