"""Dense weights out of packed ones: the native op against compressed_tensors, and against what memory can do.

Every candidate runs in turn, in one process, so that whatever else the machine does falls on all alike; each figure is
the median of its rounds. ``fill`` and ``copy`` are torch's own, into memory that is there already and into memory that
is new, as every result of an op is: what it costs to get it from the system is a part of the job.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as peer_dequantize

from compressed_format import bitpack, ops

ROUNDS = 11
SHAPE = (14336, 4096)
SLAB_ROWS = 256
"""What streaming jobs hold at once: 2 MB."""
BAR = 12.0
"""GB/s of bfloat16 output, for the first three."""
Candidates = dict[str, Callable[[], object]]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(candidates: Candidates) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, function in candidates.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def in_slabs(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, *layout: int) -> None:
    """A weight in parts of some rows each, as streaming jobs take it: the memory for one part serves the next."""
    for top in range(0, codes.shape[0], SLAB_ROWS):
        rows = slice(top, top + SLAB_ROWS)
        of_rows = None if zero_point is None else zero_point[rows]
        ops.dequantize(codes[rows], scale[rows], of_rows, None, None, *layout)


def integers(bits: int, group_size: int | None, symmetric: bool = True) -> Candidates:
    """Ours and the peer's, packed below 8 bits; their results are compared first."""
    rows, columns = SHAPE
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, SHAPE, dtype=torch.int8)
    groups = 1 if group_size is None else columns // group_size
    scale = (torch.rand(rows, groups) / 100 + 0.001).to(torch.bfloat16)
    zero_point = None if symmetric else torch.randint(-half, half, scale.shape, dtype=torch.int8)
    stored = bitpack.pack_codes(codes, bits) if bits < 8 else codes
    args = QuantizationArgs(
        num_bits=bits,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=symmetric,
    )
    block = columns if group_size is None else group_size
    layout = (bits, columns, 1, block)
    ours = partial(ops.dequantize, stored, scale, zero_point, None, None, *layout)
    slabs = partial(in_slabs, stored, scale, zero_point, *layout)

    def peer() -> torch.Tensor:
        unpacked = unpack_from_int32(stored, bits, torch.Size(SHAPE)) if bits < 8 else stored
        return peer_dequantize(unpacked, scale, zero_point, args)

    assert torch.equal(ours(), peer())
    return {"native": ours, "in slabs": slabs, "peer": peer}


def floats() -> Candidates:
    codes = torch.randn(SHAPE).to(torch.float8_e4m3fn)
    scale = (torch.rand(SHAPE[0], 1) / 100 + 0.001).to(torch.bfloat16)
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    layout = (8, SHAPE[1], 1, SHAPE[1])
    ours = partial(ops.dequantize, codes, scale, None, None, None, *layout)
    peer = partial(peer_dequantize, codes, scale, None, args)
    assert torch.equal(ours(), peer())
    return {"native": ours, "in slabs": partial(in_slabs, codes, scale, None, *layout), "peer": peer}


def main() -> None:
    info = ops.backend_info()
    if ops.native_library() is None:
        raise SystemExit(f"no native library: {info['libraries']['cpu']['reason']}")
    print(f"torch {info['torch']}, {info['cpu']}, {SHAPE[0]} x {SHAPE[1]} to bfloat16")
    dense = torch.randn(SHAPE).to(torch.bfloat16)
    target = torch.empty_like(dense)
    ceilings: Candidates = {
        "fill": lambda: target.fill_(1),
        "copy": lambda: target.copy_(dense),
        "fill, new memory": lambda: torch.ones_like(dense),
        "copy, new memory": lambda: dense.clone(),
    }
    for name, median in medians(ceilings).items():
        print(f"{name:30} {median * 1e3:8.2f} ms {dense.nbytes / median / 1e9:8.2f} GB/s written")
    print(f"\n{'':30} {'ms':>8} {'GB/s out':>9} {'in slabs':>9} {'peer ms':>8} {'faster by':>10}")
    works: dict[str, tuple[Callable[[], Candidates], float | None]] = {
        "int4 group 128": (lambda: integers(4, 128), BAR),
        "int8 channel": (lambda: integers(8, None), BAR),
        "FP8 channel": (floats, BAR),
        "int4 group 128 asymmetric": (lambda: integers(4, 128, symmetric=False), None),
        "int3 group 128": (lambda: integers(3, 128), None),
        "int6 channel": (lambda: integers(6, None), None),
    }
    for name, (make, bar) in works.items():
        found = medians(make())
        rate = dense.nbytes / found["native"] / 1e9
        verdict = "" if bar is None else f"  {'pass' if rate >= bar else 'MISSED'} (bar {bar:g} GB/s)"
        peer = found["peer"]
        ratio = f"{peer / found['native']:.1f} x"
        slabs = f"{dense.nbytes / found['in slabs'] / 1e9:9.2f}"
        ours = f"{found['native'] * 1e3:8.2f} {rate:9.2f} {slabs}"
        print(f"{name:30} {ours} {peer * 1e3:8.1f} {ratio:>10}{verdict}", flush=True)


if __name__ == "__main__":
    main()
