"""Weights into codes: the native op against compressed_tensors, and against copying the weight.

GB/s of bfloat16 input. Every result is new memory, as it is when a checkpoint is made; ``copy`` goes into memory that
is there already.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as peer_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from compressed_format import ops

SHAPE = (14336, 4096)
FAST, ODD = 8.0, 4.0
"""GB/s to reach: widths that fill bytes, and the others."""


def seconds(function: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def peer(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """What compressed_tensors does to a symmetric weight by group or channel."""
    groups = weight.unflatten(-1, (-1, args.group_size)) if args.group_size else weight.unsqueeze(-2)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = peer_quantize(weight, scale, zero_point, args, dtype=torch.int8 if args.type == "int" else None)
    return pack_to_int32(codes, args.num_bits) if args.num_bits < 8 else codes


def main() -> None:
    torch.set_num_threads(2)
    weight = torch.randn(SHAPE).to(torch.bfloat16)
    amount = weight.numel() * 2 / 1e9
    target = torch.empty_like(weight)
    print(f"copy: {amount / seconds(partial(target.copy_, weight), 9):.2f} GB/s")
    cases = [("int", 4, 128, FAST), ("int", 8, None, FAST), ("float", 8, None, FAST)]
    cases += [("int", bits, 128, ODD) for bits in (3, 5, 6)]
    for kind, bits, group, bar in cases:
        strategy = "group" if group else "channel"
        args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, group_size=group, symmetric=True)
        block = group or SHAPE[1]
        ours = partial(ops.quantize, weight, None, None, bits, kind == "float", True, 1, block, bits < 8)
        rate = amount / seconds(ours, 9)
        theirs = amount / seconds(partial(peer, weight, args), 1)
        print(f"{kind} {bits} {strategy}: {rate:.2f} GB/s, bar {bar}; {rate / theirs:.1f} x compressed_tensors, bar 25")


if __name__ == "__main__":
    main()
