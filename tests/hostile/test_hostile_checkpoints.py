"""Every hostile checkpoint ends in an error of this library that says what is wrong, at once and in little memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    with WarmProcess(tmp_path_factory.mktemp("bases")) as process:
        yield process


@pytest.mark.parametrize("case", CASES, ids=[case.name[:60] for case in CASES])
def test_hostile_checkpoint(case: Case, warm: WarmProcess, tmp_path: Path) -> None:
    folder = warm.copy(case, tmp_path)
    wrong = []
    for entry_point in (*case.refused_by, *case.loads_with):
        found = warm.ask(entry_point, folder, case)
        if not found["typed"]:
            wrong.append((entry_point, found))
        elif entry_point in case.loads_with and found["error"] is not None:
            wrong.append((entry_point, found))
        elif entry_point in case.refused_by and (found["error"] is None or not re.search(case.words, found["message"])):
            wrong.append((entry_point, found))
        elif found["seconds"] > SECONDS or found["bytes"] > BYTES or len(found["message"]) > 500_000:
            wrong.append((entry_point, found | {"message": found["message"][:500]}))
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong)
    assert not (folder / "marker").exists(), "code or a pickle in the checkpoint was run"
