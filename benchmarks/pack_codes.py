"""Packing of 4-bit codes: the native op against the plain torch definition and against compressed_tensors.

All of them, and a copy of the same bytes as the machine's measure, run in turn in one process; each figure is the
median of its rounds, so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compressed_format import bitpack, ops

ROUNDS = 15


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(shape: tuple[int, int]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    target = torch.empty_like(codes)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "copy": lambda: target.copy_(codes),
        "native": lambda: ops.pack_codes(codes, 4),
        "definition": lambda: bitpack.pack_codes(codes, 4),
        "compressed_tensors": lambda: pack_to_int32(codes, 4),
    }
    expected = candidates["definition"]()
    for name in ("native", "compressed_tensors"):
        assert torch.equal(candidates[name](), expected), name

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, function in candidates.items():
            times[name].append(seconds(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{shape[0]} x {shape[1]} codes, {codes.numel() / 2**20:.1f} MiB")
    print(f"{'':20} {'ms':>9} {'GB/s read':>10} {'native is faster by':>20}")
    for name, median in medians.items():
        ratio = f"{median / medians['native']:.1f} x"
        print(f"{name:20} {median * 1e3:9.3f} {codes.numel() / median / 1e9:10.2f} {ratio:>20}")


if __name__ == "__main__":
    info = ops.backend_info()
    if ops.native_library() is None:
        raise SystemExit(f"no native library: {info['libraries']['cpu']['reason']}")
    print(f"torch {info['torch']}, {info['cpu']}")
    for shape in [(64, 64), (4096, 4096), (4096, 11008), (1021, 4091)]:
        measure(shape)
