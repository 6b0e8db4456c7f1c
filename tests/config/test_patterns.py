"""Patterns mean what Python's ``re.match`` makes of them, alone and side by side, and cannot hang."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressed_format.config import patterns
from compressed_format.config.patterns import PatternTable, pattern_problem
from compressed_format.errors import TargetError

# Pieces that Python and the regex module read differently, among others.
PIECES = [
    *"ab1.{}[]()|*+?^$e<=,-:&~# ",
    *("\\d", "\\.", "\\w", "\\b", "\\1", "\\{", "\\A", "\\Z", "\\s", "(?:", "(?i)", "(?i:", "(?x)", "(?P<n>", "(?P=n)"),
    *(
        "(?=",
        "(?!",
        "(?#c)",
        "(?(1)",
        "{1,2}",
        "{,2}",
        "{,}",
        "{}",
        "{e}",
        "{e<=1}",
        "[[:alpha:]]",
        "[^]",
        "[]a]",
        "[a-b]",
    ),
    *("--", "&&", "||", "*?", "++"),
]
PATTERNS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
NAMES = st.text("ab1.e{}[]A:<-&, ", max_size=7)


def _python(pattern: str, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.match(pattern, name) is not None


@given(st.lists(PATTERNS, min_size=1, max_size=4, unique=True), st.lists(NAMES, max_size=6))
def test_patterns_are_pythons(found: list[str], names: list[str]) -> None:
    valid = [pattern for pattern in found if pattern_problem(pattern) is None]
    table = PatternTable(["re:" + pattern for pattern in valid])
    for name in names:
        matching = ["re:" + pattern for pattern in valid if _python(pattern, name)]
        assert table.first(name) == (matching[0] if matching else None)
        assert [target for target in table.targets if table.matches(target, name)] == matching


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(", "unterminated"), ("a**", "multiple repeat"), ("[", "unterminated"), (r"\p{L}", "bad escape"), ("(?R)", "")],
)
def test_invalid_patterns(pattern: str, words: str) -> None:
    problem = pattern_problem(pattern)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize(
    "pattern",
    ["(a{9999}){9999}", "a{1000000}", "(a{5000,}){5000,}", "(?x)(a{1000}) #(\n{1000}", "(a{1000})(?#(){1000}"],
)
def test_patterns_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(patterns, "_compile", lambda _: pytest.fail("compiled all the same"))
    assert pattern_problem(pattern) == "its {n} repeat too much; write * or + instead"


def test_repetitions_of_reasonable_size() -> None:
    assert pattern_problem(r"model\.layers\.\d{1,2}\.experts\.[0-9a-f]{8}-[0-9a-f]{4}") is None
    assert PatternTable([r"re:a{3}\.\d{2,}$"]).first("aaa.10") == r"re:a{3}\.\d{2,}$"


def test_the_end_is_not_anchored() -> None:
    table = PatternTable(["re:.*q_proj", "re:"])
    assert table.first("model.q_proj_norm") == "re:.*q_proj"
    assert table.first("model") == "re:"


def test_switches_and_numbers_stay_in_their_pattern() -> None:
    table = PatternTable(["re:(?i)MODEL$", "re:(a)\\1$", "re:(b|c)\\.x$", "re:d", "re:(?P<n>e)(?P=n)$"])
    found = [table.first(name) for name in ("model", "aa", "c.x", "d", "ee", "C.X", "D", "f")]
    assert found == [*table.targets, None, None, None]


@pytest.mark.parametrize("others", [[], ["re:b"]], ids=["alone", "joined"])
def test_patterns_that_take_too_long(monkeypatch: pytest.MonkeyPatch, others: list[str]) -> None:
    monkeypatch.setattr(patterns, "_SECONDS_PER_MATCH", 0.01)
    table = PatternTable(["re:(a|aa)+(a|aa)+(a|aa)+$", *others])
    with pytest.raises(TargetError, match=r"re:\(a\|aa\).*takes too long to match against"):
        table.first("a" * 5000 + "b")


def test_patterns_that_take_too_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS_PER_TABLE", -1.0)
    with pytest.raises(TargetError, match="takes too long"):
        PatternTable(["re:a", "re:b"]).first("c")
