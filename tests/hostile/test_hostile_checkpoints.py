"""Every hostile checkpoint ends in an error of this library that says what is wrong, at once and in little memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.case import Case
from tests.hostile.configs import CONFIG_CASES
from tests.hostile.files import FILE_CASES
from tests.hostile.values import VALUE_CASES
from tests.hostile.warm import WarmProcess

CASES = [*FILE_CASES, *CONFIG_CASES, *VALUE_CASES]
SECONDS = 2.0
"""Of CPU time: twice what is promised, for a machine half as fast as today's."""
BYTES = 100_000_000
LONGEST_MESSAGE = 500_000


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    with WarmProcess(tmp_path_factory.mktemp("bases")) as process:
        yield process


@pytest.mark.parametrize("case", CASES, ids=[case.name[:60] for case in CASES])
def test_hostile_checkpoint(case: Case, warm: WarmProcess, tmp_path: Path) -> None:
    folder = warm.copy(case, tmp_path)
    found = {name: warm.ask(name, folder, case) for name in (*case.refused_by, *case.loads_with)}
    wrong = {name: problem for name, answer in found.items() if (problem := _problem(case, name, answer)) is not None}
    assert not wrong, "\n".join(f"{name} {problem}: {found[name]}" for name, problem in wrong.items())
    assert not (folder / "marker").exists(), "code or a pickle in the checkpoint was run"


def _problem(case: Case, entry_point: str, answer: dict[str, Any]) -> str | None:
    if not answer["typed"]:
        return "raised what is no error of this library"
    if entry_point in case.loads_with and answer["error"] is not None:
        return "refused what is right"
    if entry_point in case.refused_by and answer["error"] is None:
        return "did not refuse it"
    if entry_point in case.refused_by and not re.search(case.words, answer["message"]):
        return f"does not say {case.words!r}"
    if answer["seconds"] > SECONDS or answer["bytes"] > BYTES or len(answer["message"]) > LONGEST_MESSAGE:
        return "took too much"
    return None
