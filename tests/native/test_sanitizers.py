"""The native kernels, which know no torch, in small programs built with the compiler's sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["pack"])
def test_kernel_under_sanitizers(kernel: str, tmp_path: Path) -> None:
    program = tmp_path / kernel
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [Path(__file__).with_name(f"{kernel}_driver.cpp"), ROOT / "csrc" / "cpu" / kernel / f"{kernel}.cpp"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, "-I", ROOT / "csrc", *sources, "-o", program], check=True)
    finished = subprocess.run([program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
