"""The native kernels, which know no torch, in small programs: under sanitizers, and on processors of long ago.

Each ``<kernel>_driver.cpp`` compares a kernel with a definition of its own, in several threads, for tensors without a
byte to spare.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"
DRIVERS = sorted(path.stem for path in FOLDER.glob("*_driver.cpp"))
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


def build(folder: Path, **options: str) -> Path:
    settings = {"COMPRESSED_FORMAT_DRIVERS": str(FOLDER), "Python_EXECUTABLE": sys.executable, **options}
    cmake, ninja = (Path(sys.executable).with_name(name) for name in ("cmake", "ninja"))
    arguments = [f"-DCMAKE_MAKE_PROGRAM={ninja}", *(f"-D{name}={value}" for name, value in settings.items())]
    subprocess.run([cmake, "-S", CSRC, "-B", folder, "-G", "Ninja", *arguments], check=True, capture_output=True)
    built = subprocess.run([cmake, "--build", folder], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs as users' libraries are built."""
    return build(tmp_path_factory.mktemp("released"), CMAKE_BUILD_TYPE="Release")


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"CMAKE_BUILD_TYPE": "None", "COMPRESSED_FORMAT_SANITIZE": request.param}
    return build(tmp_path_factory.mktemp("sanitized"), **options)


def run(*command: str | Path, **environment: str) -> None:
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=600
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_under_sanitizers(driver: str, isa: str, sanitized: Path) -> None:
    run(sanitized / driver, COMPRESSED_FORMAT_ISA=isa)


# The first has nothing beyond SSE 4.2, the second AVX2 and nothing beyond: an instruction that has leaked into what
# runs there ends the program.
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_on_an_older_processor(driver: str, processor: str, released: Path) -> None:
    emulator = shutil.which("qemu-x86_64")
    assert emulator is not None, "the emulator qemu-x86_64 is missing: install the package qemu-user"
    run(emulator, "-cpu", processor, released / driver)


def test_no_function_is_shared_between_instruction_sets(released: Path) -> None:
    objects = [path for path in released.rglob("*.o") if path.name.split(".")[0] in ("avx2", "avx512", "amx")]
    assert objects
    for path in objects:
        listed = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout
        # Weak symbols: the linker keeps one of each name, whichever instructions it was compiled for.
        shared = [line for line in listed.splitlines() if line[17:19] in ("W ", "V ", "u ")]
        assert not shared, f"{path}: {shared}"
