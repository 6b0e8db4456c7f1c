"""The native kernels that round activations, quantize weights and store sparse ones,
on every instruction set that this machine has."""

from __future__ import annotations

import pytest

from compressed_format import ops
from compressed_format.ops.extension import INSTRUCTION_SETS
from tests.ops.processes import run_python

_HERE = ops.backend_info()["cpu"]["instructions"]

pytestmark = pytest.mark.skipif(_HERE is None, reason="there is no native library")


@pytest.mark.parametrize(
    "program", ["activation_checks", "quantize_checks", "quantized_linear_checks", "span_checks", "sparse_checks"]
)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_kernels_against_the_definition(program: str, instructions: str) -> None:
    if INSTRUCTION_SETS.index(instructions) > INSTRUCTION_SETS.index(_HERE):
        pytest.skip(f"this machine has no {instructions}")
    printed = run_python(instructions, "-m", f"tests.ops.{program}")
    assert printed.split() == [instructions]
