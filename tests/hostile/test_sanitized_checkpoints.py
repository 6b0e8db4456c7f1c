"""The hostile checkpoints once more, with a native library that ends the process at the first bad access."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.case import Case
from tests.hostile.test_hostile_checkpoints import CASES
from tests.hostile.warm import ROOT, WarmProcess

pytestmark = pytest.mark.long
COMPILER = os.environ.get("CXX", "c++")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library, built with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    options = [
        "-DCOMPRESSED_FORMAT_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    cmake = Path(sys.executable).with_name("cmake")
    subprocess.run([cmake, "-S", ROOT / "csrc", "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", folder], check=True, capture_output=True)
    assert (folder / "libcompressed_format_cpu.so").is_file()
    return folder


@pytest.fixture(scope="module")
def sanitized(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    runtimes = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        # The last one is no sanitizer: address sanitizing wants to see it before it wraps what it throws.
        found = subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        runtimes.append(found.stdout.strip())
    environment = {
        "LD_PRELOAD": ":".join(runtimes),
        # Python keeps what it has until it ends; what leaks are the interpreter's own objects.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "SANITIZED_LIBRARY": str(library),
    }
    with WarmProcess(tmp_path_factory.mktemp("bases"), environment) as process:
        yield process


def test_the_sanitized_library_is_in_use(sanitized: WarmProcess, library: Path) -> None:
    assert sanitized.library == str(library / "libcompressed_format_cpu.so")


@pytest.mark.parametrize("case", CASES, ids=[case.name[:60] for case in CASES])
def test_no_bad_access(case: Case, sanitized: WarmProcess, tmp_path: Path) -> None:
    folder = sanitized.copy(case, tmp_path)
    found = {name: sanitized.ask(name, folder, case) for name in (*case.refused_by, *case.loads_with)}
    assert all(answer["typed"] for answer in found.values()), found
