"""Finds and loads the native libraries, once. Without one the references run, and :func:`backend_info` says why.

Set ``COMPRESSED_FORMAT_DISABLE_NATIVE=1`` before the first import to run on the references alone, or
``COMPRESSED_FORMAT_ISA`` to one of :data:`INSTRUCTION_SETS` to run the kernels for no more than these instructions.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import compressed_format
from compressed_format.errors import ConfigError

__all__ = ["backend_info", "load_libraries", "native_library"]

DISABLE_VARIABLE = "COMPRESSED_FORMAT_DISABLE_NATIVE"
ISA_VARIABLE = "COMPRESSED_FORMAT_ISA"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx")
"""From the least to the most; each includes those before it. ``csrc/cpu/isa.cpp`` says what they consist of."""
LIBRARY_NAME = "libcompressed_format_cpu" + (".dll" if os.name == "nt" else ".so")


@dataclass(frozen=True)
class Library:
    """What became of a native library: its file if it is loaded, or else the reason why it is not."""

    path: Path | None = None
    reason: str | None = None
    instructions: str | None = None
    kernels: tuple[str, ...] = ()


# Read once: an op must not change its kernels halfway through a program.
_disabled = os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")
_libraries: dict[str, Library] = {}


def load_libraries() -> None:
    """Load what can be loaded. Called once, by the package ``ops``, after the schemas of all ops are defined.

    Raises :class:`ConfigError` for a :data:`ISA_VARIABLE` that is none of :data:`INSTRUCTION_SETS`.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        raise ConfigError(f"{ISA_VARIABLE} is {wanted!r}; there are {', '.join(INSTRUCTION_SETS)}")
    if "cpu" not in _libraries:
        _libraries["cpu"] = _load(compressed_format.__path__)


def native_library() -> Path | None:
    """The file of the loaded CPU library, or ``None`` where the references run."""
    return _libraries["cpu"].path


def backend_info() -> dict[str, Any]:
    """Which native libraries and kernels are there, and why not, as plain values that can be printed or logged."""
    kernels: dict[str, list[str]] = {}
    for device, library in _libraries.items():
        for kernel in library.kernels:
            op, _, problem = kernel.partition(": ")
            kernels.setdefault(op, []).append(f"{device}: {problem}")
    return {
        "torch": str(torch.__version__),
        "cpu": {
            "architecture": platform.machine(),
            "instructions": _libraries["cpu"].instructions,
            "threads": torch.get_num_threads(),
        },
        "libraries": {
            device: {"path": None if library.path is None else str(library.path), "reason": library.reason}
            for device, library in _libraries.items()
        },
        "kernels": kernels,
    }


def _load(folders: Iterable[str]) -> Library:
    if _disabled:
        return Library(reason=f"disabled by {DISABLE_VARIABLE}")
    # An editable install spreads the package over two folders: the sources', and the one the build installs into.
    searched = [Path(folder) for folder in folders]
    path = next((folder / LIBRARY_NAME for folder in searched if (folder / LIBRARY_NAME).is_file()), None)
    if path is None:
        places = ", ".join(str(folder) for folder in searched)
        return Library(reason=f"not built: there is no {LIBRARY_NAME} in {places}")
    try:
        if _is_cut_short(path):
            return Library(reason=f"cannot be loaded: {path} is cut short")
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
        kernels, instructions = library.compressed_format_kernels, library.compressed_format_isa
    except (OSError, AttributeError) as error:  # AttributeError: a library, but not this one
        # torch wraps the loader's own message, which is the one that says what is wrong with the file.
        return Library(reason=f"cannot be loaded: {error.__cause__ or error}")
    kernels.restype = instructions.restype = ctypes.c_char_p
    return Library(path=path, instructions=instructions().decode(), kernels=tuple(kernels().decode().splitlines()))


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file is shorter than its header says; mapping it would end the process, not raise an error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False  # not a 64-bit little-endian ELF file: the system's loader says what it makes of it
    # The table of sections is the last thing in the file: where it begins, how large an entry is, and how many.
    (begin,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < int(begin) + int(size) * int(count)
