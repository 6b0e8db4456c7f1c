"""Finding and loading the native library. These tests fail where it is not built: building it is part of testing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from regex import _regex

import compressed_format
from compressed_format import bitpack, ops
from compressed_format.ops import extension

# Prints what a fresh interpreter finds. With a folder as its argument, that is where the package comes from: the hook
# of an editable install, which answers before the path does, is taken out first.
PROGRAM = """
import json, sys

if len(sys.argv) > 1:
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in type(finder).__name__
                        and "Redirecting" not in type(finder).__name__]
    sys.path.insert(0, sys.argv[1])

import torch
import compressed_format
from compressed_format import bitpack, ops

codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 3)[:, :41]
print(json.dumps({
    "package": compressed_format.__path__[0],
    "path": ops.native_library() and str(ops.native_library()),
    "info": ops.backend_info(),
    "kernel": torch._C._dispatch_has_kernel_for_dispatch_key("compressed_format::pack_codes", "CPU"),
    "right": [torch.equal(ops.pack_codes(codes, bits), bitpack.pack_codes(codes, bits)) for bits in range(4, 9)],
}))
"""


def fresh_interpreter(folder: Path | None = None, **environment: str) -> dict[str, Any]:
    # -I: the folder in which the tests run holds the package's sources, which must not be found by accident.
    command = [sys.executable, "-I", "-c", PROGRAM, *([] if folder is None else [str(folder)])]
    variables = {name: value for name, value in os.environ.items() if name != "COMPRESSED_FORMAT_DISABLE_NATIVE"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=variables | environment)
    assert output.stderr == ""
    found = json.loads(output.stdout)
    assert found["right"] == [True] * 5
    assert folder is None or Path(found["package"]) == folder / "compressed_format"
    return found


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package's Python files, and no native library."""
    (source,) = (Path(folder) for folder in compressed_format.__path__ if (Path(folder) / "errors.py").is_file())
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dll")
    shutil.copytree(source, tmp_path / "compressed_format", ignore=ignored)
    return tmp_path


def built_library() -> Path:
    path = ops.native_library()
    assert path is not None, ops.backend_info()["libraries"]
    return path


def test_library_is_loaded() -> None:
    info = ops.backend_info()
    assert info["libraries"] == {"cpu": {"path": str(built_library()), "reason": None}}
    assert info["kernels"]["pack_codes"] == ["cpu: int8 codes of 1 to 8 bits"]
    assert info["torch"] == torch.__version__
    assert info["cpu"]["architecture"]


def test_info_is_plain_and_belongs_to_the_caller() -> None:
    info = ops.backend_info()
    assert json.loads(json.dumps(info)) == info
    info["libraries"].clear()
    info["kernels"].clear()
    assert ops.backend_info() != info


def test_every_kernel_in_the_library_is_registered() -> None:
    for op in ops.backend_info()["kernels"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"compressed_format::{op}", "CPU")
        assert hasattr(torch.ops.compressed_format, f"{op}_reference")


def test_every_width_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    definition = bitpack.pack_codes
    monkeypatch.setattr(bitpack, "pack_codes", lambda codes, bits: (packed.append(bits), definition(codes, bits))[1])
    assert built_library()
    codes = torch.zeros(2, 40, dtype=torch.int8)
    for bits in range(1, 9):
        ops.pack_codes(codes, bits)
    assert packed == []
    torch.ops.compressed_format.pack_codes_reference(codes, 4)
    assert packed == [4]


def test_loading_again_changes_nothing() -> None:
    before = ops.backend_info()
    extension.load_libraries()
    assert ops.backend_info() == before


@pytest.mark.parametrize("value", ["1", "true"])
def test_disabled(value: str) -> None:
    found = fresh_interpreter(COMPRESSED_FORMAT_DISABLE_NATIVE=value)
    assert found["path"] is None
    assert not found["kernel"]
    assert found["info"]["kernels"] == {}
    library = {"path": None, "reason": "disabled by COMPRESSED_FORMAT_DISABLE_NATIVE"}
    assert found["info"]["libraries"] == {"cpu": library}


@pytest.mark.parametrize("value", ["", "0"])
def test_not_disabled(value: str) -> None:
    found = fresh_interpreter(COMPRESSED_FORMAT_DISABLE_NATIVE=value)
    assert found["path"] == str(built_library())
    assert found["kernel"]


def test_missing(package: Path) -> None:
    found = fresh_interpreter(package)
    assert found["path"] is None
    assert not found["kernel"]
    reason = found["info"]["libraries"]["cpu"]["reason"]
    assert reason.startswith("not built: there is no libcompressed_format_cpu.")
    assert reason.endswith(f" in {package / 'compressed_format'}")


def test_present_in_a_copy_of_the_package(package: Path) -> None:
    copied = shutil.copy(built_library(), package / "compressed_format")
    found = fresh_interpreter(package)
    assert found["path"] == str(copied)
    assert found["kernel"]


def test_truncated(package: Path) -> None:
    path = package / "compressed_format" / built_library().name
    path.write_bytes(built_library().read_bytes()[:-1])
    found = fresh_interpreter(package)
    assert found["path"] is None
    assert not found["kernel"]
    assert found["info"]["libraries"]["cpu"]["reason"] == f"cannot be loaded: {path} is cut short"


@pytest.mark.parametrize("kept", [0, 10, 63, 64, 100, 5000, -1000, -1])
def test_truncated_anywhere(tmp_path: Path, kept: int) -> None:
    path = tmp_path / built_library().name
    path.write_bytes(built_library().read_bytes()[:kept])
    library = extension._load([str(tmp_path)])
    assert library.path is None
    assert library.reason is not None
    assert library.reason.startswith(f"cannot be loaded: {path}")  # and then what is wrong with it


def test_not_a_library(tmp_path: Path) -> None:
    path = tmp_path / built_library().name
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 10)
    library = extension._load([str(tmp_path)])
    assert library.path is None
    assert library.reason is not None
    assert library.reason.startswith(f"cannot be loaded: {path}")


def test_another_library(tmp_path: Path) -> None:
    shutil.copy(_regex.__file__, tmp_path / built_library().name)
    library = extension._load([str(tmp_path)])
    assert library.path is None
    assert "compressed_format_kernels" in str(library.reason)


def test_a_library_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / built_library().name
    shutil.copy(built_library(), path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    library = extension._load([str(tmp_path)])
    assert library.path is None
    assert str(library.reason).startswith("cannot be loaded: ")
    assert "Permission denied" in str(library.reason)


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    library = extension._load([str(tmp_path), str(built_library().parent)])
    assert library.path == built_library()
    library = extension._load([str(tmp_path), str(tmp_path / "absent")])
    assert library.reason == f"not built: there is no {built_library().name} in {tmp_path}, {tmp_path / 'absent'}"


def test_disabled_before_anything_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_disabled", True)
    library = extension._load([str(built_library().parent)])
    assert library == extension.Library(reason="disabled by COMPRESSED_FORMAT_DISABLE_NATIVE")
