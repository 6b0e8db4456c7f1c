"""Every example runs, as a program of its own, with warnings as errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# The language model's demo warns through the packages it is built from, and takes its files' folder as an argument.
DEMO = "01_smollm2.py"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != DEMO))
def test_the_example_runs(example: str) -> None:
    assert _run(sys.executable, "-W", "error", str(EXAMPLES / example))


def test_the_demo_passes(tmp_path: Path) -> None:
    output = _run(sys.executable, str(EXAMPLES / DEMO), str(tmp_path))
    assert output.rstrip().endswith("passed")
    assert "181 modules" in output  # whose 576 input features the preset's groups of 128 do not fit
