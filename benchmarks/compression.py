"""Compressing and decompressing one weight in memory: this library, compressed-tensors, and a copy, in one process.

    python benchmarks/compression.py [rows columns]

Prints bytes of bfloat16 a second, and ratios: over compressed-tensors (higher is better), and of the rate at which
the machine copies the same bytes (the limit of anything that reads the weight once and writes less).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme as PeerScheme
from compressed_tensors.quantization.utils import calculate_qparams

from compressed_format.blocks import block_shape, to_blocks
from compressed_format.config import QuantizationConfig, QuantizationScheme
from compressed_format.formats import format_named
from compressed_format.quantization import dequantize, quantize

REPEATS = 5


def main() -> None:
    rows, columns = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (4096, 4096)
    torch.manual_seed(0)
    weight = (torch.randn(rows, columns) * 0.02).to(torch.bfloat16)
    size = weight.numel() * weight.element_size()
    copy = size / seconds(lambda: weight.clone())
    print(f"{rows} x {columns} bfloat16, {torch.get_num_threads()} threads; copy: {copy / 1e9:.1f} GB/s")
    print(f"{'preset':<14}{'':<12}{'ours':>12}{'peer':>12}{'over peer':>12}{'of a copy':>12}")
    for preset in ("W4A16", "W4A16_ASYM", "W3A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"):
        (scheme,) = QuantizationConfig.preset(preset).config_groups.values()
        for what, ours, peer in zip(
            ("compress", "decompress"), run_ours(weight, scheme), run_peer(weight, scheme), strict=True
        ):
            rates = [size / seconds(function) for function in (ours, peer)]
            print(
                f"{preset:<14}{what:<12}{rates[0] / 1e9:>7.2f} GB/s{rates[1] / 1e9:>7.2f} GB/s"
                f"{rates[0] / rates[1]:>12.2f}{rates[0] / copy:>12.3f}"
            )


def run_ours(weight: torch.Tensor, scheme: QuantizationScheme) -> tuple[Callable[[], object], Callable[[], object]]:
    entry, args = format_named(scheme.format), scheme.weights
    tensors = entry.encode(quantize(weight, args), args)
    return lambda: entry.encode(quantize(weight, args), args), lambda: dequantize(entry.decode(tensors, args), args)


def run_peer(weight: torch.Tensor, scheme: QuantizationScheme) -> tuple[Callable[[], object], Callable[[], object]]:
    written = scheme.model_dump(include={"targets", "weights", "format"}, mode="json")
    written["weights"] = {key: value for key, value in written["weights"].items() if value not in (None, {})}
    peer_scheme = PeerScheme(**written)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    blocks = to_blocks(weight, *block_shape(scheme.weights, weight.shape))

    def compress() -> dict[str, torch.Tensor]:
        scale, zero_point = calculate_qparams(blocks.amin((-3, -1)), blocks.amax((-3, -1)), peer_scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        return compressor.compress(state, peer_scheme)

    tensors = compress()
    return compress, lambda: compressor.decompress(tensors, peer_scheme)


def seconds(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
