"""The table of codes: complete, stable, and the same as its page; and what a report makes of findings."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import compressed_format.checking
from compressed_format.checking import CODES, CONSUMERS, Finding, Report, Severity, consumer_codes
from compressed_format.checking import codes as own_codes
from compressed_format.checking.table import page

PACKAGE = Path(compressed_format.checking.__file__).parent


def test_the_page_is_the_table() -> None:
    written = (PACKAGE.parents[1] / "docs" / "findings.md").read_text()
    assert written == page(), "python -m compressed_format.checking > docs/findings.md"


def test_codes_are_unique_and_well_formed() -> None:
    rows = [*own_codes.ALL, *consumer_codes.ALL]
    assert len({row.code for row in rows}) == len(rows) == len(CODES)
    for row in rows:
        assert re.fullmatch(r"CF[0-7]\d\d", row.code)
        assert bool(row.consumer) == (row.code >= "CF400")
        assert all(text == text.strip() and "|" not in text for text in (row.title, row.meaning, row.remedy))
        assert row.meaning.endswith(".")
        assert row.remedy.endswith(".")
    assert len({row.consumer for row in rows if row.consumer}) == len(CONSUMERS)


def test_every_code_is_used() -> None:
    """By its name, somewhere outside of the tables."""
    used: set[str] = set()
    for path in PACKAGE.glob("*.py"):
        if path.name not in ("codes.py", "consumer_codes.py"):
            tree = ast.parse(path.read_text())
            used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for module in (own_codes, consumer_codes):
        names = {name for name, value in vars(module).items() if isinstance(value, own_codes.Code)}
        assert names - used == set()


def test_a_report() -> None:
    findings = tuple(Finding(code, severity, "a.b", "is wrong") for code, severity in
                     (("CF201", Severity.ERROR), ("CF113", Severity.WARNING), ("CF104", Severity.NOTE)))  # fmt: skip
    report = Report(Path("m"), findings)
    assert (report.errors, report.warnings, report.notes) == (findings[:1], findings[1:2], findings[2:])
    assert json.loads(json.dumps(report.to_dict())) == {
        "path": "m", "ok": False, "exit_code": 1, "errors": 1, "warnings": 1, "notes": 1,
        "findings": [
            {"code": "CF201", "severity": "error", "place": "a.b", "message": "is wrong"},
            {"code": "CF113", "severity": "warning", "place": "a.b", "message": "is wrong"},
            {"code": "CF104", "severity": "note", "place": "a.b", "message": "is wrong"},
        ],
    }  # fmt: skip
    assert str(findings[0]) == "error CF201 a.b: is wrong"


@pytest.mark.parametrize(
    ("severities", "unreadable", "code"),
    [
        ([], False, 0),
        (["note"], False, 0),
        (["note", "warning"], False, 1),
        (["error"], False, 1),
        (["error"], True, 2),
    ],
)
def test_exit_codes(severities: list[str], unreadable: bool, code: int) -> None:
    findings = tuple(Finding("CF101", Severity(severity), "", "x") for severity in severities)
    report = Report("m", findings, unreadable)
    assert report.exit_code == code
    assert report.ok == (code == 0)
