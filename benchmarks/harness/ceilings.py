"""What the machine can do at most, measured: reading and copying memory, and multiplying bfloat16.

A loop of loads and one of ``vdpbf16ps`` on registers, in C++ that is compiled for this machine when it is needed.
Without a compiler, or on a processor without that instruction, torch's ``sum`` and its product take their place.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from harness.measuring import Candidate, medians

__all__ = ["describe_machine", "peak", "read_rate", "reader"]

READ_BYTES = 1 << 29
"""More than is rotated of weights, and more than any cache holds."""
STEPS = 20_000_000
PRODUCT = 2048


@cache
def loops() -> ctypes.CDLL | None:
    """The two loops, or ``None`` where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ceilings.so"
        source = Path(__file__).with_name("ceilings.cpp")
        options = ["-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        made = subprocess.run([compiler, *options, source, "-o", target], capture_output=True, text=True)
        if made.returncode:  # another processor, which has no vectors of this kind
            return None
        library = ctypes.CDLL(str(target))
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.read_memory.restype = ctypes.c_uint64
    library.multiply_bfloat16.argtypes = [ctypes.c_uint64, ctypes.POINTER(ctypes.c_float)]
    library.multiply_bfloat16.restype = ctypes.c_double
    return library


@cache
def memory() -> torch.Tensor:
    return torch.ones(READ_BYTES // 4)  # float32: torch adds up integers at a fraction of the rate


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads())


def reader() -> Candidate:
    """Reads :data:`READ_BYTES` with as many threads as torch has; a byte is one time of its work.

    Which of the two ways is faster is found out once: what is slower does not show what memory can do.
    """
    ways = {"sum": Candidate(memory().sum, READ_BYTES)}
    if loops() is not None:
        ways["loads"] = Candidate(read_in_parts, READ_BYTES)
    return ways[fastest_way()]


@cache
def fastest_way() -> str:
    ways = {"sum": Candidate(memory().sum)}
    if loops() is not None:
        ways["loads"] = Candidate(read_in_parts)
    found = medians(ways, seconds=0.6)
    return min(found, key=found.__getitem__)


def read_in_parts() -> None:
    """Each thread its share."""
    library = loops()
    assert library is not None
    begin, threads = memory().data_ptr(), torch.get_num_threads()
    part = READ_BYTES // threads // 64 * 64
    list(pool().map(lambda number: library.read_memory(begin + number * part, part), range(threads)))


def read_rate() -> float:
    """Bytes a second."""
    return 1 / medians({"read": reader()}, seconds=0.8)["read"]


def copy_rate() -> float:
    """Bytes a second, those read and those written."""
    source = memory()[: READ_BYTES // 8]
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": Candidate(lambda: target.copy_(source))}, seconds=0.6)["copy"]


@cache
def peak() -> tuple[float, str]:
    """bfloat16 operations a second on all threads, and what of."""
    library = loops()
    if library is not None and multiply(library, 1000)[0]:
        threads = torch.get_num_threads()
        rates = []
        for _ in range(3):
            done = list(pool().map(lambda _: multiply(library, STEPS), range(threads)))
            rates.append(sum(operations / seconds for operations, seconds in done))
        return max(rates), "vdpbf16ps on registers"
    left = torch.randn(PRODUCT, PRODUCT).bfloat16()
    found = medians({"product": Candidate(lambda: left @ left)}, seconds=1.0)["product"]
    return 2 * PRODUCT**3 / found, f"torch's product of {PRODUCT} x {PRODUCT}"


def multiply(library: ctypes.CDLL, steps: int) -> tuple[float, float]:
    sink = ctypes.c_float()
    begin = time.perf_counter()
    operations: float = library.multiply_bfloat16(steps, sink)
    return operations, time.perf_counter() - begin


def describe_machine() -> str:
    """A line on what runs, and one on what it can do at most."""
    from compressed_format import ops

    info = ops.backend_info()
    cpu, library = info["cpu"], info["libraries"]["cpu"]
    native = f"kernels for {cpu['instructions']}" if library["path"] else f"no kernels ({library['reason']})"
    operations, of_what = peak()
    return (
        f"torch {info['torch']}, {cpu['threads']} threads, {native}\n"
        f"reading {read_rate() / 1e9:.1f} GB/s ({fastest_way()}), copying {copy_rate() / 1e9:.1f} GB/s (read + write), "
        f"bfloat16 {operations / 1e9:.0f} GFLOP/s ({of_what})"
    )
