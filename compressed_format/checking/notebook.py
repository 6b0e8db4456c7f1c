"""Collects findings; what is true of many places alike is said once."""

from __future__ import annotations

from collections.abc import Iterable

from compressed_format.checking.findings import Code, Finding, Severity
from compressed_format.errors import CompressedFormatError, Problem

__all__ = ["Notebook"]

_ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}


class Notebook:
    """Findings while they are made."""

    def __init__(self) -> None:
        self._found: list[Finding] = []
        self._alike: dict[tuple[Code, str], list[str]] = {}

    def add(self, code: Code, place: str, message: str) -> None:
        """One finding of its own."""
        self._found.append(code.at(place, message))

    def add_all(self, findings: Iterable[Finding]) -> None:
        """Findings that were made elsewhere."""
        self._found.extend(findings)

    def add_error(self, code: Code, error: CompressedFormatError) -> None:
        """A finding for each problem of an error."""
        problems = error.problems or (Problem("", error.message),)
        self._found.extend(code.of(problem) for problem in problems)

    def alike(self, code: Code, place: str, message: str) -> None:
        """Something that may be true of many places: one finding, at the first of them."""
        self._alike.setdefault((code, message), []).append(place)

    def findings(self) -> tuple[Finding, ...]:
        """What was found, errors first, else in the order in which it was."""
        folded = [
            code.at(places[0], message + (f" (the same in {len(places) - 1} more)" if len(places) > 1 else ""))
            for (code, message), places in self._alike.items()
        ]
        found = dict.fromkeys([*self._found, *folded])
        return tuple(sorted(found, key=lambda finding: _ORDER[finding.severity]))
