"""Dense weights out of packed ones: the native op against compressed_tensors, and against what memory can do.

    python benchmarks/cpu_dequantize.py [WORD ...]

All candidates of a line take turns; results are compared first. ``WORD`` selects lines by what they are called, as in
``int4``. Every result of an op is new memory, and what it costs to get that from the system is a part of the job: so
``copy`` and ``fill``, which are torch's, are shown for memory that is there already and for memory that is new.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as peer_dequantize
from harness.bars import Bar, Cost, Report
from harness.ceilings import describe_machine, reader
from harness.measuring import Candidate, medians

from compressed_format import bitpack, ops

SHAPE = (14336, 4096)
SLAB_ROWS = 256
"""What streaming jobs hold at once: 2 MB."""
BAR = 12.0
"""GB/s of bfloat16 output, for the first three."""
Candidates = dict[str, Callable[[], object]]


def in_slabs(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, *layout: int) -> None:
    """A weight in parts of some rows each, as streaming jobs take it: the memory for one part serves the next."""
    for top in range(0, codes.shape[0], SLAB_ROWS):
        rows = slice(top, top + SLAB_ROWS)
        of_rows = None if zero_point is None else zero_point[rows]
        ops.dequantize(codes[rows], scale[rows], of_rows, None, None, *layout)


def integers(bits: int, group_size: int | None, symmetric: bool = True) -> tuple[Candidates, int]:
    """Ours and the peer's, packed below 8 bits, and the bytes that they read."""
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
    nbytes = sum(tensor.nbytes for tensor in (stored, scale, zero_point) if tensor is not None)
    return {"native": ours, "in slabs": slabs, "peer": peer}, nbytes


def floats() -> tuple[Candidates, int]:
    codes = torch.randn(SHAPE).to(torch.float8_e4m3fn)
    scale = (torch.rand(SHAPE[0], 1) / 100 + 0.001).to(torch.bfloat16)
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    layout = (8, SHAPE[1], 1, SHAPE[1])
    ours = partial(ops.dequantize, codes, scale, None, None, None, *layout)
    peer = partial(peer_dequantize, codes, scale, None, args)
    assert torch.equal(ours(), peer())
    slabs = partial(in_slabs, codes, scale, None, *layout)
    return {"native": ours, "in slabs": slabs, "peer": peer}, codes.nbytes + scale.nbytes


def main() -> None:
    torch.manual_seed(0)
    report = Report("unpack + dequantize")
    report.line(describe_machine())
    dense = torch.randn(SHAPE).to(torch.bfloat16)
    target = torch.empty_like(dense)
    ceilings: Candidates = {
        "fill": lambda: target.fill_(1),
        "copy": lambda: target.copy_(dense),
        "fill, new memory": lambda: torch.ones_like(dense),
        "copy, new memory": lambda: dense.clone(),
    }
    found = medians({name: Candidate(function) for name, function in ceilings.items()})
    written = (f"{name} {dense.nbytes / seconds / 1e9:.2f} GB/s" for name, seconds in found.items())
    report.line(f"written: {'; '.join(written)}")
    works: dict[str, tuple[Callable[[], tuple[Candidates, int]], float | None]] = {
        "int4 group 128": (lambda: integers(4, 128), BAR),
        "int8 channel": (lambda: integers(8, None), BAR),
        "FP8 channel": (floats, BAR),
        "int4 group 128 asymmetric": (lambda: integers(4, 128, symmetric=False), None),
        "int3 group 128": (lambda: integers(3, 128), None),
        "int6 channel": (lambda: integers(6, None), None),
    }
    for name, (make, bar) in works.items():
        if not all(word in name for word in sys.argv[1:]):
            continue
        functions, stored = make()
        found = medians({**{what: Candidate(function) for what, function in functions.items()}, "read": reader()})
        read = 1 / found.pop("read")
        rate = {what: dense.nbytes / seconds / 1e9 for what, seconds in found.items()}
        report.line(
            f"{name}: {rate['native']:.2f} GB/s out, in slabs {rate['in slabs']:.2f}, "
            f"compressed-tensors {rate['peer']:.2f} ({rate['native'] / rate['peer']:.1f} times slower)"
        )
        if bar is not None:
            cost = Cost(found["native"], stored + dense.nbytes, reading=read)
            report.add(Bar(f"unpack + dequantize {name}", "of bf16 output", rate["native"], bar, "GB/s", cost=cost))
    report.finish()


if __name__ == "__main__":
    main()
