"""Processes that run on a set of instructions: it is chosen once, when the library is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compressed_format import ops
from compressed_format.ops.extension import ISA_VARIABLE

ROOT = Path(__file__).parents[2]


def run_python(instructions: str, *arguments: str | Path) -> str:
    """What Python prints with these arguments; fails with the end of it unless all went well."""
    library = ops.native_library()
    if library is None:
        pytest.skip("there is no native library")
    # The package that is tested here may be installed, with its library: it comes before the sources beside the tests,
    # and so does an empty folder, which Python would put the current one before.
    path = os.pathsep.join(map(str, (library.parents[1], ROOT)))
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, ISA_VARIABLE: instructions, "PYTHONPATH": path},
            cwd=empty,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def run_tests(instructions: str, file: str, chosen: str = "") -> None:
    """The tests of a file, in such a process."""
    found = run_python(instructions, "-c", "from compressed_format import ops; print(ops.backend_info()['cpu'])")
    assert "'instructions': None" not in found
    run_python(instructions, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", chosen)
