"""The kernels of ``expert_linear``: each expert's rows are those of ``linear``, bit for bit, however they are made."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from compressed_format import bitpack, ops
from tests.checks import assert_same_bits
from tests.ops.processes import run_tests

LEVELS = ("portable", "avx2", "avx512", "amx")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# What a stack is made of: codes, bits, zero points, and how many rows and columns share a scale.
STACKS: dict[str, dict[str, Any]] = {
    **{f"packed {bits}": {"bits": bits, "block": (1, 32)} for bits in range(1, 9)},
    "packed 4 by 128": {"block": (1, 128)},
    "packed 4 asymmetric": {"block": (1, 64), "zero_points": "int8"},
    "packed 3 asymmetric": {"bits": 3, "block": (1, 32), "zero_points": "packed"},
    "packed 4 reordered": {"block": (1, 32), "g_idx": True},
    "packed 4 tensor": {"block": None},
    "int8 channel": {"codes": "int8", "block": (1, 4096), "zero_points": "int8"},
    "float8 block": {"codes": "float8", "block": (16, 128)},
    "float8 tensor": {"codes": "float8", "block": None},
    "int8 2:4": {"codes": "int8", "block": (1, 4096), "bitmask": True},
    "plain": {"codes": "plain"},
    "plain 2:4": {"codes": "plain", "bitmask": True},
}
every_stack = pytest.mark.parametrize("kind", list(STACKS))


class Stack(NamedTuple):
    tensors: tuple[torch.Tensor | None, ...]  # each with a first dimension of experts
    layout: tuple[int, int, int, int]

    def of(self, expert: int) -> list[Any]:
        """What ``linear`` takes after its input."""
        return [*(None if tensor is None else tensor[expert] for tensor in self.tensors), None, *self.layout]


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    data = bytearray(1) + bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(data, dtype=tensor.dtype, offset=1).reshape(tensor.shape)


def stack_of(
    experts: int,
    rows: int,
    columns: int,
    *,
    codes: str = "packed",
    bits: int = 4,
    block: tuple[int, int] | None = (1, 1),
    zero_points: str = "",
    g_idx: bool = False,
    bitmask: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Stack:
    """Random weights, every tensor of which begins at an odd address."""
    generator = torch.Generator().manual_seed(rows + columns)
    bits = bits if codes == "packed" else 8

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (experts, *shape), generator=generator)

    stored = columns // 2 if bitmask else columns
    weight: torch.Tensor
    if codes == "packed":
        weight = integers(-(2**31), 2**31, rows, bitpack.packed_words(columns, bits)).to(torch.int32)
    elif codes == "int8":
        weight = integers(-128, 128, rows, stored).to(torch.int8)
    else:
        weight = torch.randn(experts, rows, stored, generator=generator) * 4
        weight = weight.to(torch.float8_e4m3fn if codes == "float8" else torch.bfloat16)
    places = None
    if bitmask:  # any two of four, of which a byte has two fours
        pairs = torch.tensor([3, 5, 6, 9, 10, 12])
        fours = pairs[integers(0, 6, rows, -(-columns // 4))]
        fours = torch.nn.functional.pad(fours, (0, fours.shape[-1] % 2))
        places = at_odd_address((fours[..., ::2] + 16 * fours[..., 1::2]).to(torch.uint8))
    if codes == "plain":
        return Stack((at_odd_address(weight), None, None, None, places), (8, columns, 1, 1))
    grid = (1,) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    scale = (torch.rand(experts, *grid, generator=generator) * 0.02 + 0.01).to(scale_dtype)
    zero_point = None
    if zero_points == "int8":
        zero_point = at_odd_address(integers(-(2 ** (bits - 1)), 2 ** (bits - 1), *grid).to(torch.int8))
    elif zero_points == "packed":
        words = (bitpack.packed_words(grid[0], bits), grid[1])
        zero_point = at_odd_address(integers(-(2**31), 2**31, *words).to(torch.int32))
    groups = at_odd_address(integers(0, grid[1], columns).to(torch.int32)) if g_idx else None
    tensors = (at_odd_address(weight), at_odd_address(scale), zero_point, groups, places)
    return Stack(tensors, (bits, columns, *(block or (rows, columns))))


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def routes(tokens: int, slots: int, experts: int) -> torch.Tensor:
    """To any of the experts, or to none; some of them get nothing where there are few tokens."""
    return torch.randint(0, experts + 1, (tokens, slots), generator=torch.Generator().manual_seed(tokens + slots))


def one_by_one(input: torch.Tensor, experts: torch.Tensor, stack: Stack) -> torch.Tensor:
    weight = stack.tensors[0] if stack.tensors[4] is None else stack.tensors[4]
    assert weight is not None
    output = input.new_zeros((*experts.shape, weight.shape[1]))
    for expert in range(len(weight)):
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            output[tokens, slots] = ops.linear(input[tokens], *stack.of(expert))
    return output


def check(input: torch.Tensor, experts: torch.Tensor, stack: Stack) -> None:
    output = ops.expert_linear(input, experts, *stack.tensors, *stack.layout)
    assert_same_bits(output, one_by_one(input, experts, stack), f"{list(input.shape)}, {experts.tolist()}")


@every_stack
def test_each_expert_computes_what_linear_does(kind: str) -> None:
    for (rows, columns), dtype in zip([(33, 128), (70, 332), (5, 64)], FLOATS, strict=True):
        stack = stack_of(4, rows, columns, **STACKS[kind])
        for tokens, slots in [(1, 1), (1, 4), (2, 2), (7, 2), (40, 2), (130, 3)]:
            check(inputs(tokens, columns, dtype), routes(tokens, slots, 4), stack)


def test_the_native_kernel_is_what_runs() -> None:
    """Two references would agree, too."""
    stack = stack_of(4, 64, 256, **STACKS["packed 4 by 128"])
    input, experts = inputs(40, 256, torch.float32), routes(40, 2, 4)
    reference = torch.ops.compressed_format.expert_linear_reference.default
    assert not torch.equal(
        ops.expert_linear(input, experts, *stack.tensors, *stack.layout),
        reference(input, experts, *stack.tensors, *stack.layout),
    )


@pytest.mark.parametrize(
    "experts",
    [
        [[0], [0], [0], [0], [0]],  # neighbours, and all outputs in their places
        [[0], [1], [0], [1], [0]],  # equally far apart, outputs are not
        [[0], [0], [1], [0], [0]],  # neither
        [[0, 0], [1, 1], [0, 0], [1, 1], [2, 0]],  # a token twice to the same expert
        [[3, 3], [3, 3], [3, 3], [3, 3], [3, 3]],  # to nobody
        [[3, 3], [2, 3], [3, 3], [3, 2], [2, 2]],
    ],
)
def test_wherever_rows_lie(experts: list[list[int]]) -> None:
    stack = stack_of(3, 37, 192, **STACKS["packed 4 asymmetric"])
    for dtype in FLOATS:
        check(inputs(5, 192, dtype), torch.tensor(experts), stack)


def test_inputs_and_stacks_of_every_stride() -> None:
    stack = stack_of(6, 35, 192, **STACKS["packed 4 asymmetric"])
    odd = Stack(tuple(None if tensor is None else tensor[1::2] for tensor in stack.tensors), stack.layout)
    input, experts = inputs(9, 192), routes(9, 2, 3)
    expected = one_by_one(input, experts, odd)
    wide = torch.full((9, 200), torch.nan, dtype=input.dtype)
    wide[:, 5:197] = input
    for given in (at_odd_address(input), wide[:, 5:197], input.T.contiguous().T, input.flip(0).flip(0)):
        for index in (experts, experts.T.contiguous().T, at_odd_address(experts)):
            assert_same_bits(ops.expert_linear(given, index, *odd.tensors, *odd.layout), expected)
    one = inputs(1, 192)
    check(one.expand(9, 192), experts, odd)


def test_more_tokens_than_one_job_takes() -> None:
    """An expert's tokens are then split, and experts run in batches; what each computes has nothing to do with that."""
    stack = stack_of(3, 24, 64, **STACKS["int8 channel"])
    for tokens in (1024, 1025, 2100):
        input = inputs(tokens, 64)
        experts = torch.tensor([0, 3]).repeat(tokens, 1)
        experts[::2, 1] = 1
        output = ops.expert_linear(input, experts, *stack.tensors, *stack.layout)
        for first in range(0, tokens, 1024):
            expected = ops.linear(input[first : first + 1024], *stack.of(0))
            assert_same_bits(output[first : first + 1024, 0], expected)
        assert output[1::2, 1].count_nonzero() == 0
        for first in range(0, tokens, 2048):
            expected = ops.linear(input[first : first + 2048 : 2], *stack.of(1))
            assert_same_bits(output[first : first + 2048 : 2, 1], expected)


def test_batches_of_experts() -> None:
    """More rows to copy than are held at once."""
    stack = stack_of(40, 2000, 32, **STACKS["packed 4"])
    tokens = 300
    experts = torch.arange(tokens * 40).reshape(tokens, 40) * 7 % 40
    check(inputs(tokens, 32, torch.float32), experts, stack)


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        for kind in ("packed 4 by 128", "packed 3 asymmetric", "int8 channel", "float8 block", "plain"):
            stack = stack_of(5, 515, 512, **STACKS[kind])
            for tokens, slots in ((1, 2), (6, 2), (70, 3)):
                arguments = (inputs(tokens, 512), routes(tokens, slots, 5), *stack.tensors, *stack.layout)
                results = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(ops.expert_linear(*arguments))
                assert_same_bits(*results)
    finally:
        torch.set_num_threads(threads)


def test_groups_of_any_expert_that_do_not_exist() -> None:
    """They would be read from memory that is no scale; an expert that nobody is routed to may have any."""
    stack = stack_of(3, 16, 64, **STACKS["packed 4 reordered"])
    g_idx = stack.tensors[3]
    assert g_idx is not None
    for group in (2, 2**31 - 1, -3, -(2**31)):
        g_idx[1, 5] = group
        with pytest.raises((IndexError, RuntimeError)):
            ops.expert_linear(inputs(1, 64), torch.tensor([[1]]), *stack.tensors, *stack.layout)
        check(inputs(1, 64), torch.tensor([[0, 2]]), stack)


def test_nothing_to_compute() -> None:
    stack = stack_of(3, 16, 64, **STACKS["packed 4"])
    for tokens, slots in ((0, 2), (3, 0)):
        output = ops.expert_linear(inputs(tokens, 64), routes(tokens, slots, 3), *stack.tensors, *stack.layout)
        assert output.shape == (tokens, slots, 16)
    empty = (torch.zeros(3, 0, 8, dtype=torch.int32), torch.zeros(3, 0, 1), None, None, None, 4, 64, 1, 64)
    assert ops.expert_linear(inputs(2, 64), routes(2, 2, 3), *empty).shape == (2, 2, 0)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    """The level is read once a process; a level that the machine lacks runs the highest that it has."""
    tests = "what_linear_does or wherever_rows_lie or every_stride"
    run_tests(level, __file__, tests)
