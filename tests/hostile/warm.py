"""The other end of ``warm_process.py``: starts it, copies good checkpoints for spoiling, asks what became of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.hostile.case import Case

__all__ = ["WarmProcess"]

ROOT = Path(__file__).parents[2]


class WarmProcess:
    """A process that opens hostile checkpoints, for as long as the context lasts."""

    def __init__(self, bases: Path, environment: Mapping[str, str] | None = None) -> None:
        self.bases = bases
        # What a case costs is measured, which counting lines would multiply.
        plain = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
        self.environment = {**plain, **(environment or {})}

    def __enter__(self) -> WarmProcess:
        self.errors = (self.bases / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.hostile.warm_process", str(self.bases)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=self.environment,
        )
        self.library: str = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self.errors.close()

    def copy(self, case: Case, folder: Path) -> Path:
        """The hostile checkpoint of a case, in ``folder``."""
        hostile = folder / "model"
        shutil.copytree(self.bases / case.base, hostile)
        case.spoil(hostile)
        return hostile

    def ask(self, entry_point: str, folder: Path, case: Case) -> dict[str, Any]:
        """What came of opening a checkpoint: error, whether it is typed, message, seconds, bytes."""
        assert self._process.stdin is not None
        request = {"entry_point": entry_point, "folder": str(folder), "base": case.base}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise AssertionError(f"the warm process has ended:\n{self.errors.read()[-5000:]}")
        return json.loads(line)
