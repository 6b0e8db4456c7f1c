"""Weights into codes, scales included: the native op against compressed_tensors, and against copying the weight.

    python benchmarks/cpu_quantize.py [WORD ...]

GB/s of bfloat16 input. Every result is new memory, as it is when a checkpoint is made; ``copy`` goes into memory that
is there already. All take turns, and codes and scales of both libraries are compared first. ``WORD`` selects lines by
what they are called, as in ``int4``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as peer_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from harness.bars import Bar, Cost, Report
from harness.ceilings import describe_machine, reader
from harness.measuring import Candidate, medians

from compressed_format import ops

SHAPE = (14336, 4096)
FAST, ODD = 8.0, 4.0
"""GB/s to reach: widths that fill bytes, and the others."""
OVER_PEER = 25.0
SECONDS = 4.0


@dataclass(frozen=True)
class Case:
    name: str
    bits: int
    bound: float
    over_peer: float | None = None
    group: int | None = 128
    kind: str = "int"
    symmetric: bool = True

    def ours(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Codes and scales, and what else there is."""
        block = self.group or SHAPE[1]
        packed = self.bits < 8
        found = ops.quantize(weight, None, None, self.bits, self.kind == "float", self.symmetric, 1, block, packed)
        return [tensor for tensor in found if tensor is not None]

    def peer(self, weight: torch.Tensor) -> list[torch.Tensor]:
        args = QuantizationArgs(
            num_bits=self.bits,
            type=self.kind,
            strategy="group" if self.group else "channel",
            group_size=self.group,
            symmetric=self.symmetric,
        )
        groups = weight.unflatten(-1, (-1, self.group)) if self.group else weight.unsqueeze(-2)
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        dtype = torch.int8 if self.kind == "int" else torch.float8_e4m3fn
        codes = peer_quantize(weight, scale, None if self.symmetric else zero_point, args, dtype=dtype)
        return [pack_to_int32(codes, self.bits) if self.bits < 8 else codes, scale]


CASES = (
    Case("int4 group 128", 4, FAST, OVER_PEER),
    Case("int4 group 128 asymmetric", 4, FAST, OVER_PEER, symmetric=False),
    Case("int8 channel", 8, FAST, OVER_PEER, group=None),
    Case("FP8 channel", 8, FAST, OVER_PEER, group=None, kind="float"),
    *(Case(f"int{bits} group 128", bits, ODD) for bits in (3, 5, 6)),
)


def main() -> None:
    torch.manual_seed(0)
    report = Report("quantize + pack")
    report.line(describe_machine())
    weight = torch.randn(SHAPE).to(torch.bfloat16)
    target = torch.empty_like(weight)
    for case in CASES:
        if not all(word in case.name for word in sys.argv[1:]):
            continue
        made = case.ours(weight)
        for ours, peers in zip(made, case.peer(weight), strict=False):
            assert torch.equal(ours.view(torch.uint8), peers.view(torch.uint8)), case.name
        candidates = {
            "ours": Candidate(partial(case.ours, weight)),
            "copy": Candidate(partial(target.copy_, weight)),
            "compressed-tensors": Candidate(partial(case.peer, weight)),
            "read": reader(),
        }
        found = medians(candidates, SECONDS)
        read = 1 / found.pop("read")
        rates = {name: weight.nbytes / seconds / 1e9 for name, seconds in found.items()}
        report.line(f"{case.name}: " + ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()))
        cost = Cost(found["ours"], weight.nbytes + sum(tensor.nbytes for tensor in made), reading=read)
        work = f"quantize + pack {case.name}"
        report.add(Bar(work, "of bf16 input", rates["ours"], case.bound, "GB/s", cost=cost))
        if case.over_peer is not None:
            ratio = rates["ours"] / rates["compressed-tensors"]
            report.add(Bar(work, "compressed-tensors", ratio, case.over_peer, cost=cost))
    report.finish()


if __name__ == "__main__":
    main()
