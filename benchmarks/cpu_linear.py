"""Linear layers on the CPU, straight from packed weights: against torch, ggml, and what the machine can do at most.

    python benchmarks/cpu_linear.py [--ggml FOLDER] [--record FILE] [--seconds 2] [WORD ...]

Only lines with all of the words run, as in ``W4A16 M=1`` or ``14336x4096 M=64``. A line is a scheme, the shape of a
weight (out x in), and a number of tokens. All candidates of a line run in turns (``harness/measuring.py`` says how),
each on weights that come to more than 400 MB and are used one after the other, on activations of bfloat16.

Rivals: ``bf16`` is torch's dense product; ``int4pack``, ``int8pack`` and ``_int_mm`` are torch's kernels for
quantized weights, the last one for activations that somebody else has quantized; ``Q4_0`` (repacked), ``Q4_K`` and
``Q8_0`` are ggml's, which quantize activations to 8 bits. ``make ggml`` builds it, ``--ggml`` names another build.
Without one its times are those of ``results/cpu_rivals.json``, scaled by ``bf16`` on the same line; ``--record`` writes
such a file. Each candidate's result is held against the dense product before it is timed.

Shares are of what is measured in the same run: bytes a second of weights, scales and zero points, of what reading
alone reaches in its turns on the same line; and operations, of the peak of bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from harness.bars import Bar, Cost, Report
from harness.ceilings import describe_machine, peak, reader
from harness.ggml import Ggml, Weights, find_ggml
from harness.measuring import Candidate, copies_to_rotate, medians, rotated

from compressed_format import bitpack, ops
from compressed_format.activations import WHOLE_TOKEN
from compressed_format.bitmask import pack_bitmask

LARGE, SQUARE = (14336, 4096), (4096, 4096)
RECORDED = Path(__file__).with_name("results") / "cpu_rivals.json"
CHECKED_TOKENS = 4
"""What of a result is held against the dense product."""
TOLERANCE = 0.02
"""Relative RMS: a few roundings to bfloat16, far below what any wrong order of elements gives."""
OURS, DENSE, READ = "ours", "bf16", "read"
INT4_GROUP = 128
ACTIVATIONS_OF_INT8 = (8, False, True, WHOLE_TOKEN)
ACTIVATIONS_OF_FLOAT8 = (8, True, True, WHOLE_TOKEN)
FLOAT8_BLOCK = 128
ACTIVATIONS_OF_FLOAT8_BLOCKS = (8, True, True, FLOAT8_BLOCK)
"""Bits, whether they are floats, whether they are symmetric, and what shares a scale."""

Tensors = tuple[torch.Tensor | None, ...]


@dataclass
class Packed:
    """A weight of a scheme: the tensors of the file, how they are laid out, and what they mean."""

    tensors: Tensors
    layout: tuple[int, int, int, int]
    activations: tuple[int, bool, bool, int] | None = None

    @cached_property
    def dense(self) -> torch.Tensor:
        return ops.dequantize(*self.tensors, *self.layout, torch.bfloat16)

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors if tensor is not None)

    @cached_property
    def copies(self) -> list[Tensors]:
        return [
            tuple(tensor if tensor is None else tensor.clone() for tensor in self.tensors)
            for _ in range(copies_to_rotate(self.nbytes))
        ]

    def product(self, input: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        if self.activations is None:
            return ops.linear(input, *tensors, None, *self.layout)
        return ops.quantized_linear(input, None, None, *self.activations, *tensors, None, *self.layout)

    def rounded(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` as the scheme multiplies it."""
        return input if self.activations is None else ops.fake_quantize(input, None, None, *self.activations)


def scales(rows: int, columns: int) -> torch.Tensor:
    return (torch.rand(rows, columns) / 100 + 0.001).to(torch.bfloat16)


def packed_integers(
    bits: int, group: int | None, shape: tuple[int, int], activations: tuple[int, bool, bool, int] | None = None
) -> Packed:
    rows, columns = shape
    group = group or columns
    words = torch.randint(-(2**31), 2**31, (rows, bitpack.packed_words(columns, bits)), dtype=torch.int32)
    return Packed((words, scales(rows, columns // group), None, None, None), (bits, columns, 1, group), activations)


def integers_of_both(shape: tuple[int, int]) -> Packed:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    return Packed((codes, scales(shape[0], 1), None, None, None), (8, shape[1], 1, shape[1]), ACTIVATIONS_OF_INT8)


def floats(activations: tuple[int, bool, bool, int] | None, shape: tuple[int, int]) -> Packed:
    codes = (torch.randn(shape) * 32).to(torch.float8_e4m3fn)
    return Packed((codes, scales(shape[0], 1), None, None, None), (8, shape[1], 1, shape[1]), activations)


def floats_by_block(shape: tuple[int, int]) -> Packed:
    rows, columns = shape
    codes = (torch.randn(shape) * 32).to(torch.float8_e4m3fn)
    of_blocks = scales(rows // FLOAT8_BLOCK, columns // FLOAT8_BLOCK)
    layout = (8, columns, FLOAT8_BLOCK, FLOAT8_BLOCK)
    return Packed((codes, of_blocks, None, None, None), layout, ACTIVATIONS_OF_FLOAT8_BLOCKS)


def half_of_values(shape: tuple[int, int]) -> Packed:
    """Two values of every four, anywhere among them."""
    order = torch.rand(shape).unflatten(-1, (-1, 4)).argsort(-1).flatten(-2)
    values = torch.randn(shape[0], shape[1] // 2).to(torch.bfloat16)
    return Packed((values, None, None, None, pack_bitmask(order < 2)), (8, shape[1], 1, shape[1]))


# torch's own kernels: each makes what is multiplied by out of a weight, and multiplies. ------------------------------

Multiply = Callable[[torch.Tensor, object], torch.Tensor]


def dense(packed: Packed) -> tuple[list[object], Multiply]:
    return copies_of(packed.dense), lambda input, weight: torch.nn.functional.linear(input, weight)


def int4pack(packed: Packed) -> tuple[list[object], Multiply]:
    words, scale = packed.tensors[:2]
    assert words is not None
    assert scale is not None
    # It subtracts 8 from codes, and adds a zero point after that.
    codes = ops.unpack_codes(words, 4, packed.layout[1], False).to(torch.int32) + 8
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return copies_of(weight), lambda input, weight: product(input, weight, INT4_GROUP, both)


def int8pack(packed: Packed) -> tuple[list[object], Multiply]:
    words, scale = packed.tensors[:2]
    assert words is not None
    assert scale is not None
    codes = ops.unpack_codes(words, 8, packed.layout[1], False)
    return copies_of(codes), lambda input, weight: torch._weight_int8pack_mm(input, weight, scale.flatten())


def int_mm(packed: Packed) -> tuple[list[object], Multiply]:
    return copies_of(bytes_of(packed)), lambda input, weight: torch._int_mm(input, weight.t())


def bytes_of(packed: Packed) -> torch.Tensor:
    """Codes as ``_int_mm`` takes them, a byte each; it leaves the scales to others."""
    codes = packed.tensors[0]
    assert codes is not None
    bits, columns = packed.layout[:2]
    return codes if codes.dtype == torch.int8 else ops.unpack_codes(codes, bits, columns, False)


def copies_of(weight: torch.Tensor) -> list[object]:
    return [weight.clone() for _ in range(copies_to_rotate(weight.nbytes))]


TORCH = {DENSE: dense, "int4pack": int4pack, "int8pack": int8pack, "_int_mm": int_mm}

# Lines ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Want:
    """At least ``bound`` of the best of ``rivals``, or of the rate of reading."""

    bound: float
    rivals: tuple[str, ...]

    def bar(self, work: str, found: dict[str, float], cost: Cost, scaled: Collection[str]) -> Bar | None:
        times = {name: found[name] for name in self.rivals if name in found}
        if not times:
            return None
        best = min(times, key=times.__getitem__)
        ratio = times[best] / found[OURS]
        if best == READ:
            return Bar(work, "of the read rate", 100 * ratio * cost.nbytes, 100 * self.bound, "%", cost=cost)
        what = best if len(self.rivals) == 1 else f"the best of {', '.join(self.rivals)}"
        note = ", ".join([best] * (len(self.rivals) > 1) + ["scaled"] * (best in scaled))
        return Bar(work, what, ratio, self.bound, note=note, cost=cost)


@dataclass(frozen=True)
class Family:
    """A scheme: its weight, the rivals that do the same, and what is wanted, by number of tokens and shape."""

    name: str
    make: Callable[[tuple[int, int]], Packed]
    rivals: tuple[str, ...]
    wants: dict[int, dict[tuple[int, int], tuple[Want, ...]]]


def both(*wants: Want) -> dict[tuple[int, int], tuple[Want, ...]]:
    return {SQUARE: wants, LARGE: wants}


INT4_RIVALS = (DENSE, "int4pack", "Q4_0", "Q4_K")
MANY = (64, 256, 1024)
FAMILIES = (
    Family(
        "W4A16",
        partial(packed_integers, 4, INT4_GROUP),
        INT4_RIVALS,
        {
            1: {
                SQUARE: (Want(0.85, (READ,)), Want(1.1, ("int4pack", "Q4_0", "Q4_K"))),
                LARGE: (Want(0.92, (READ,)), Want(1.0, ("Q4_0",))),
            },
            4: both(Want(1.4, INT4_RIVALS)),
            16: both(Want(1.1, INT4_RIVALS)),
            **{tokens: both(Want(0.95, (DENSE,)), Want(2.5, ("int4pack",))) for tokens in MANY},
        },
    ),
    Family(
        "W8A16",
        partial(packed_integers, 8, None),
        (DENSE, "int8pack", "Q8_0"),
        {1: {LARGE: (Want(0.85, (READ,)),)}},
    ),
    Family(
        "W8A8",
        integers_of_both,
        (DENSE, "_int_mm"),
        {1: {LARGE: (Want(0.85, (READ,)),)}, **{tokens: both(Want(1.0, ("_int_mm",))) for tokens in MANY}},
    ),
    Family("FP8 weight-only", partial(floats, None), (DENSE,), {1: {LARGE: (Want(0.85, (READ,)),)}}),
    Family(
        "FP8 W8A8",
        partial(floats, ACTIVATIONS_OF_FLOAT8),
        (DENSE,),
        {1: {LARGE: (Want(0.85, (READ,)),)}, **{tokens: both(Want(0.85, (DENSE,))) for tokens in MANY}},
    ),
    Family(
        "W4A8",
        partial(packed_integers, 4, INT4_GROUP, activations=ACTIVATIONS_OF_INT8),
        (DENSE, "_int_mm"),
        {1: both(), **{tokens: both(Want(1.0, ("_int_mm",))) for tokens in (64, 256)}},
    ),
    Family(
        "block FP8",
        floats_by_block,
        (DENSE,),
        {1: both(), **{tokens: both(Want(0.85, (DENSE,))) for tokens in (64, 256)}},
    ),
    Family("W3A16", partial(packed_integers, 3, INT4_GROUP), (DENSE,), {1: {LARGE: (Want(0.7, (READ,)),)}}),
    Family("2:4 bf16", half_of_values, (DENSE,), {1: both(Want(1.6, (DENSE,)))}),
)


@dataclass
class Benchmark:
    words: list[str]
    ggml: Ggml | None
    seconds: float
    report: Report = field(default_factory=lambda: Report("linear layers on the CPU"))
    recorded: dict[str, dict[str, float]] = field(default_factory=dict)
    """Microseconds of rivals, by shape and tokens."""

    def run(self) -> None:
        for family in FAMILIES:
            for shape in (SQUARE, LARGE):
                wanted = {
                    tokens: wants[shape]
                    for tokens, wants in family.wants.items()
                    if shape in wants
                    and all(
                        word in self.title(family, shape, tokens).split(" ") or word == family.name
                        for word in self.words
                    )
                }
                if wanted:
                    self.run_weight(family, shape, wanted)
        self.report.finish()

    @staticmethod
    def title(family: Family, shape: tuple[int, int], tokens: int) -> str:
        return f"{family.name} {shape[0]}x{shape[1]} M={tokens}"

    def run_weight(self, family: Family, shape: tuple[int, int], wanted: dict[int, tuple[Want, ...]]) -> None:
        torch.manual_seed(0)
        packed = family.make(shape)
        of_torch = {name: TORCH[name](packed) for name in family.rivals if name in TORCH}
        of_ggml = {}
        if self.ggml is not None:
            of_ggml = {n: Weights(self.ggml, n, packed.dense) for n in family.rivals if n not in TORCH}
        for tokens, wants in wanted.items():
            input = torch.randn(tokens, shape[1]).to(torch.bfloat16)
            candidates = self.candidates(packed, of_torch, of_ggml, input)
            candidates[READ] = reader()
            found = medians(candidates, self.seconds)
            key = f"{shape[0]}x{shape[1]} M={tokens}"
            scaled = self.scaled(key, found, family)
            self.recorded.setdefault(key, {}).update(
                {name: round(found[name] * 1e6, 1) for name in found if name not in (OURS, READ)}
            )
            operations = 2 * tokens * packed.dense.numel()
            cost = Cost(found[OURS], packed.nbytes, operations, 1 / found[READ], peak()[0])
            rivals = [f"{name} {time * 1e6:.0f}" for name, time in found.items() if name not in (OURS, READ)]
            rivals += [f"{name} {time * 1e6:.0f} (scaled)" for name, time in scaled.items()]
            title = self.title(family, shape, tokens)
            self.report.line(
                f"{title}: {found[OURS] * 1e6:.0f} us, {cost.bytes_rate} of {cost.reading / 1e9:.1f} read, "
                f"{cost.operations_rate} of the peak; {', '.join(rivals)}"
            )
            for want in wants:
                bar = want.bar(title, {**found, **scaled}, cost, scaled)
                if bar is not None:
                    self.report.add(bar)

    def candidates(
        self,
        packed: Packed,
        of_torch: dict[str, tuple[list[object], Multiply]],
        of_ggml: dict[str, Weights],
        input: torch.Tensor,
    ) -> dict[str, Candidate]:
        """Each of them, once its result has been found to be right."""
        some = input[:CHECKED_TOKENS]
        both = torch.cat((some, packed.rounded(some))).float()
        expected, of_rounded = (both @ packed.dense.float().T).chunk(2)
        check(OURS, packed.product(input, packed.tensors), of_rounded)
        candidates = {OURS: rotated(partial(packed.product, input), packed.copies)}
        for name, (weights, multiply) in of_torch.items():
            operand = input
            if name == "_int_mm":
                operand = torch.randint(-127, 128, input.shape, dtype=torch.int8)
                of_codes = operand[:CHECKED_TOKENS].float() @ bytes_of(packed).float().T
                check(name, multiply(operand, weights[0]), of_codes)
            else:
                check(name, multiply(operand, weights[0]), expected)
            candidates[name] = rotated(partial(multiply, operand), weights)
        for name, copies in of_ggml.items():
            assert self.ggml is not None
            candidates[name] = self.ggml.candidate(copies, input, expected)
        return candidates

    def scaled(self, key: str, found: dict[str, float], family: Family) -> dict[str, float]:
        """What rivals that are not here would take, if torch's dense product is any measure of the machine."""
        if not RECORDED.is_file():
            return {}
        recorded = json.loads(RECORDED.read_text()).get(key, {})
        missing = [name for name in family.rivals if name not in found and name in recorded]
        return {name: recorded[name] / recorded[DENSE] * found[DENSE] for name in missing}


def check(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((result[: len(expected)].float() - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"the result of {name} differs from the dense product by {error:.3f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description="Linear layers on the CPU against torch and ggml.")
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="a build of ggml, if not build/ggml")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where to write the times of rivals")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure a line")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    benchmark = Benchmark(options.words, find_ggml(options.ggml), options.seconds)
    benchmark.report.line(describe_machine())
    if benchmark.ggml is None:
        benchmark.report.line(
            f"ggml is not here (`make ggml` builds it): its times are those of {RECORDED.name} over those of torch's "
            "dense product there, times that of this run, on each line"
        )
    benchmark.run()
    if options.record:
        options.record.write_text(json.dumps(benchmark.recorded, indent=2) + "\n")


if __name__ == "__main__":
    main()
