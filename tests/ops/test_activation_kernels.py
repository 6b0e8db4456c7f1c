"""The native kernels that round activations, quantize weights and store sparse ones,
on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compressed_format import ops
from compressed_format.ops.extension import INSTRUCTION_SETS, ISA_VARIABLE

_HERE = ops.backend_info()["cpu"]["instructions"]

pytestmark = pytest.mark.skipif(_HERE is None, reason="there is no native library")


@pytest.mark.parametrize(
    "program", ["activation_checks", "quantize_checks", "quantized_linear_checks", "span_checks", "sparse_checks"]
)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_kernels_against_the_definition(program: str, instructions: str) -> None:
    if INSTRUCTION_SETS.index(instructions) > INSTRUCTION_SETS.index(_HERE):
        pytest.skip(f"this machine has no {instructions}")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.ops.{program}"],
        env={**os.environ, ISA_VARIABLE: instructions},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [instructions]
