"""Targets and ignore entries as strings: exact names, classes, and patterns behind ``re:``.

A pattern means what Python's ``re.match`` makes of it, anchored at the start only. It runs in the ``regex`` module,
which can be stopped; where the two read a pattern differently, it is rewritten to mean the same.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex  # type: ignore[import-untyped]

from compressed_format.config.kinds import Text
from compressed_format.config.report import INVALID, Report, show
from compressed_format.errors import Problem, TargetError

__all__ = ["PREFIX", "PatternTable", "Target", "is_pattern", "pattern_problem"]

PREFIX = "re:"
_LONGEST = 10_000
_LARGEST = 20_000
"""Nodes of a compiled pattern: ``regex`` writes out what ``{n}`` repeats, nested ones as their product."""
_LARGEST_CONFIG = 100_000
_SIZE_OF_ONE = 50
_SECONDS_PER_MATCH = 0.25
_SECONDS_PER_TABLE = 0.25
_SECONDS_PER_TARGET = 5e-5
"""What matching one pattern against one name may take, as a mean, beyond what the table has: ten times as long as
those that people write."""
_QUANTIFIER = re.compile(r"\{(\d*)(,\d*)?\}", re.ASCII)
_BACK_REFERENCE = re.compile(r"\\[1-9]|\(\?\(")
# What stands in patterns and neither in names of modules nor of classes.
_LOOKS_LIKE_PATTERN = re.compile(r"[*^$\\\[\](){}|+?]")


def is_pattern(target: str) -> bool:
    """Whether a target or ignore entry is a pattern."""
    return target.startswith(PREFIX)


@dataclass(frozen=True)
class Target(Text):
    """A kind: a module's name, a class's name, or a pattern behind ``re:``."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        target = super().read(value, place, report)
        if target is INVALID:
            return INVALID
        if is_pattern(target):
            report.pattern_size += len(target) + _SIZE_OF_ONE
            if report.pattern_size > _LARGEST_CONFIG:
                report.error(
                    place,
                    "is one pattern too many: all patterns of a config together may take no more than "
                    f"{_LARGEST_CONFIG} characters, counting {_SIZE_OF_ONE} for each; name single modules instead",
                )
                return INVALID
            problem = pattern_problem(target.removeprefix(PREFIX))
            if problem is not None:
                report.doubt(place, f"{show(target)} is no valid pattern, so it matches nothing: {problem}")
        elif not target:
            report.doubt(place, "is empty and matches at most the model itself")
        elif _LOOKS_LIKE_PATTERN.search(target):
            report.doubt(
                place, f"{show(target)} can be no name of a module or class; did you mean {show(PREFIX + target)}?"
            )
        return target

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^(re:|[^*^$\\\[\](){}|+?]+$)"}


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern (without ``re:``) cannot be used, or ``None``."""
    if len(pattern) > _LONGEST:
        return f"it has {len(pattern)} characters, more than {_LONGEST}"
    try:
        _compile_re(pattern)
        if _most_nodes(pattern) > _LARGEST:
            return "its {n} repeat too much; write * or + instead"
        _compile(pattern)
    except (re.error, regex.error) as error:
        return str(error)
    except (RecursionError, OverflowError, MemoryError, ValueError):  # ValueError: a count of thousands of digits
        return "it is too complex"
    return None


def _compile_re(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        # "possible nested set": _as_python_reads_it keeps today's meaning
        warnings.simplefilter("ignore")
        return re.compile(pattern)


def _most_nodes(pattern: str) -> int:
    """No fewer than ``regex`` makes of a pattern: each ``{n}`` is taken to repeat everything before it."""
    nodes = end = 0
    for quantifier in _QUANTIFIER.finditer(pattern):
        nodes += quantifier.start() - end
        nodes *= max(1, int(quantifier[1] or 0))
        end = quantifier.end()
    return nodes + len(pattern) - end


def _compile(pattern: str) -> Any:
    return regex.compile(_as_python_reads_it(pattern), flags=regex.VERSION0)


def _as_python_reads_it(pattern: str) -> str:
    """Escape what ``regex`` would take for its own extensions: ``{e<2}`` (fuzzy matching), ``[[:alpha:]]``."""
    written = []
    in_class = class_start = False
    index = 0
    while index < len(pattern):
        symbol = pattern[index]
        step = 1
        if symbol == "\\":
            step = 2
        elif in_class:
            if symbol == "[":
                symbol = "\\["
            elif symbol == "]" and not class_start:
                in_class = False
            class_start = class_start and symbol == "^"
        elif symbol == "[":
            in_class = class_start = True
        elif symbol == "{" and not _QUANTIFIER.match(pattern, index):
            symbol = "\\{"
        if step == 2:
            class_start = False
            symbol = pattern[index : index + 2]
        written.append(symbol)
        index += step
    return "".join(written)


class PatternTable:
    """Patterns in a fixed order; finds the first that matches a name.

    Patterns that can stand side by side are joined into one alternation, so that a name costs one call however many
    there are. ``targets`` carry their ``re:``; invalid ones, which checkpoints may hold, match nothing.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.targets = tuple(target for target in targets if pattern_problem(target.removeprefix(PREFIX)) is None)
        self._spent = 0.0
        self._matches = 0
        self._latest: tuple[str | None, str | None] = (None, None)
        self._units: list[tuple[Callable[..., Any], tuple[str, ...]]] = []
        self._single: dict[str, Callable[..., Any]] = {}
        joined: list[str] = []
        for target in self.targets:
            pattern = target.removeprefix(PREFIX)
            self._single[target] = _compile(pattern).match
            if _can_be_joined(pattern):
                joined.append(target)
            else:
                self._join(joined)
                joined = []
                self._units.append((self._single[target], (target,)))
        self._join(joined)

    def _join(self, targets: list[str]) -> None:
        if len(targets) == 1:
            self._units.append((self._single[targets[0]], tuple(targets)))
        elif targets:
            # The empty named group behind each alternative tells which one it was.
            parts = [
                f"(?:{_as_python_reads_it(target.removeprefix(PREFIX))})(?P<_{index}>)"
                for index, target in enumerate(targets)
            ]
            self._units.append((regex.compile("|".join(parts), flags=regex.VERSION0).match, tuple(targets)))

    def first(self, name: str) -> str | None:
        """The first target of the table that matches ``name``."""
        latest, result = self._latest
        if latest != name:
            result = self._first(name)
            self._latest = (name, result)
        return result

    def _first(self, name: str) -> str | None:
        for match, targets in self._units:
            found = self._run(match, targets, name)
            if found is not None:
                return targets[0] if len(targets) == 1 else targets[int(found.lastgroup[1:])]
        return None

    def matches(self, target: str, name: str) -> bool:
        """Whether one target of the table matches ``name``."""
        return self._run(self._single[target], (target,), name) is not None

    def _run(self, match: Callable[..., Any], targets: tuple[str, ...], name: str) -> Any:
        # Time of this thread, not of a clock: a machine that is busy elsewhere makes no pattern bad.
        start = time.thread_time()
        try:
            found = match(name, timeout=_SECONDS_PER_MATCH)
        except TimeoutError:
            if len(targets) == 1:
                raise TargetError(problems=[_too_slow(targets[0], name)]) from None
            for target in targets:
                self._run(self._single[target], (target,), name)
            raise TargetError(problems=[_too_slow(", ".join(targets), name)]) from None
        self._spent += time.thread_time() - start
        self._matches += len(targets)
        if self._spent > _SECONDS_PER_TABLE + _SECONDS_PER_TARGET * self._matches:
            raise TargetError(problems=[_too_slow(", ".join(targets), name)])
        return found


def _too_slow(target: str, name: str) -> Problem:
    return Problem(
        target,
        f"takes too long to match against {show(name)}; nested repetitions such as (a+)+ cause this, write it "
        "without them",
    )


def _can_be_joined(pattern: str) -> bool:
    """Whether a pattern means the same as one alternative of many: it numbers, names and switches nothing."""
    compiled = _compile_re(pattern)
    return compiled.flags == re.UNICODE and not compiled.groupindex and not _BACK_REFERENCE.search(pattern)
