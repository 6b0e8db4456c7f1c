"""Random weights through the native ops and their references, for one set of instructions: run as a program.

The instructions are chosen once in a process, by COMPRESSED_FORMAT_ISA, so that each set needs one of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys

import torch

from compressed_format import bitpack, ops
from compressed_format.bitmask import pack_bitmask

native = torch.ops.compressed_format
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
COLUMNS = (1, 5, 8, 31, 64, 65, 127, 128, 256, 1000, 1024, 1100, 2051)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits are equal; those of values that are not a number may differ."""
    bits = torch.int16 if expected.element_size() == 2 else torch.int32
    differ = found.contiguous().view(bits) != expected.contiguous().view(bits)
    both_nan = found.isnan() & expected.isnan()
    return found.dtype == expected.dtype and found.shape == expected.shape and not bool((differ & ~both_nan).any())


def misaligned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values at an odd address."""
    if tensor is None or tensor.numel() == 0:
        return tensor
    data = tensor.contiguous().view(-1).view(torch.uint8)
    memory = torch.frombuffer(bytearray(data.numel() + 65), dtype=torch.uint8)
    start = (1 - memory.data_ptr()) % 64
    memory[start : start + data.numel()] = data
    return torch.frombuffer(memory.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)


def at_the_end_of_a_page(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values right before memory that must not be read, as the last tensor of a mapped file has it."""
    if tensor is None or tensor.numel() == 0:
        return tensor
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    address = libc.mmap(None, pages + mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    assert libc.mprotect(address + pages, mmap.PAGESIZE, 0) == 0
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(address + pages - tensor.nbytes)
    placed = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    placed.view(-1).view(torch.uint8).copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return placed


def blocks(chosen: random.Random, rows: int, columns: int) -> tuple[int, int]:
    strategies = [
        (1, chosen.choice([1, 3, 16, 32, 64, 100, 128])),
        (1, columns),
        (rows, columns),
        (chosen.choice([1, 2, 5]), chosen.choice([3, 16, 128])),
    ]
    return chosen.choice(strategies)


def scales(chosen: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    scale = torch.randn(shape) * 10 ** chosen.uniform(-6, 3)
    kind = chosen.random()
    if kind < 0.15:  # products that are subnormal numbers, or round to zero
        scale = torch.randn(shape) * 10 ** chosen.uniform(-40, -36)
    elif kind < 0.25:
        scale.view(-1)[0] = chosen.choice([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3e38, -65504.0])
    return scale.to(chosen.choice(FLOATS))


def random_weight(chosen: random.Random) -> tuple[object, ...]:
    """The arguments of ``dequantize`` but the last one."""
    rows, columns = chosen.choice([1, 2, 3, 7, 33]), chosen.choice(COLUMNS)
    kind = chosen.choice(["packed", "packed", "int8", "float8", "plain"])
    bits = chosen.randint(1, 8) if kind == "packed" else 8
    block_rows, block_columns = blocks(chosen, rows, columns)
    whole = (block_rows, block_columns) == (rows, columns) and chosen.random() < 0.5
    shape = (1,) if whole else (-(-rows // block_rows), -(-columns // block_columns))
    scale: torch.Tensor | None = scales(chosen, shape)
    zero_point = g_idx = bitmask = None
    half = 1 << (bits - 1)
    if kind == "plain":
        weight, scale = torch.randn(rows, columns).to(chosen.choice(FLOATS)), None
    elif kind == "float8":
        weight = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    else:
        weight = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
        if chosen.random() < 0.5:
            zero_point = torch.randint(-half, half, shape, dtype=torch.int8)
            if not whole and chosen.random() < 0.6:
                zero_point = bitpack.pack_codes(zero_point.T.contiguous(), bits).T.contiguous()
    if scale is not None and block_rows == 1 and chosen.random() < 0.2:
        g_idx = torch.randint(0, shape[-1], (columns,), dtype=torch.int32)
    if kind == "packed":
        weight = bitpack.pack_codes(weight, bits)
    elif columns % 4 == 0 and chosen.random() < 0.4:
        # Half of a row's places, mostly anywhere: where they lie within four is not for a kernel to check.
        places = torch.rand(rows, columns).argsort(dim=1) < columns // 2
        if chosen.random() < 0.3:
            places = torch.rand(rows, columns) < 0.5
        bitmask = pack_bitmask(places)
        values = weight.view(torch.uint8)[places] if kind == "float8" else weight[places]
        even = int(places.sum(dim=1).unique().numel()) == 1 and values.numel() == rows * columns // 2
        weight = values.view(rows, columns // 2) if even else values
        weight = weight.view(torch.float8_e4m3fn) if kind == "float8" else weight
    tensors = [weight, scale, zero_point, g_idx, bitmask]
    place = chosen.choice([misaligned, at_the_end_of_a_page, lambda tensor: tensor])
    tensors = [place(tensor) for tensor in tensors]
    return (*tensors, bits, columns, block_rows, block_columns)


def check_weight(chosen: random.Random) -> None:
    arguments = random_weight(chosen)
    dtype = chosen.choice([None, *FLOATS])
    expected = native.dequantize_reference(*arguments, dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same(native.dequantize(*arguments, dtype), expected), arguments
    rows = expected.shape[0]
    indices = torch.randint(0, rows, (chosen.randint(0, 5), 2), dtype=chosen.choice([torch.int32, torch.int64]))
    found = native.embedding(indices, *arguments)
    assert same(found, native.embedding_reference(indices, *arguments)), arguments


def check_part_of_rows_and_columns(chosen: random.Random) -> None:
    """As tensor-parallel ranks and readers of ranges hold them: with the stride of the whole."""
    codes = torch.randint(-8, 8, (9, 192), dtype=torch.int8)
    scale = scales(chosen, (9, 6))
    packed = bitpack.pack_codes(codes, 4)
    group = chosen.randrange(5)
    words = slice(group * 4, group * 4 + 8)
    part = (packed[2:7, words], scale[2:7, group : group + 2].contiguous(), None, None, None, 4, 64, 1, 32)
    assert same(native.dequantize(*part, None), native.dequantize_reference(*part, None))


def check_unpacking(chosen: random.Random) -> None:
    bits, size = chosen.randint(1, 8), chosen.choice([0, *COLUMNS])
    shape = chosen.choice([(), (0,), (1,), (3,), (2, 3)])
    word_aligned = chosen.random() < 0.3
    words = bitpack.word_aligned_words(size, bits) if word_aligned else bitpack.packed_words(size, bits)
    packed = torch.randint(-(2**31), 2**31, (*shape, words), dtype=torch.int32)
    stored = chosen.choice([misaligned, at_the_end_of_a_page])(packed)
    expected = native.unpack_codes_reference(packed, bits, size, word_aligned)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = native.unpack_codes(stored, bits, size, word_aligned)
        assert found.shape == (*shape, size)
        assert torch.equal(found, expected), (bits, size, shape, word_aligned)


def check_large(chosen: random.Random) -> None:
    """Enough for several threads."""
    rows, columns = 300, 2056
    codes = torch.randint(-16, 16, (rows, columns), dtype=torch.int8)
    scale = scales(chosen, (rows, columns // 8))
    arguments = (bitpack.pack_codes(codes, 5), scale, None, None, None, 5, columns, 1, 8)
    expected = native.dequantize_reference(*arguments, torch.bfloat16)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same(native.dequantize(*arguments, torch.bfloat16), expected)


def main(seed: int, count: int) -> None:
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        check_weight(chosen)
        check_unpacking(chosen)
    for _ in range(20):
        check_part_of_rows_and_columns(chosen)
    check_large(chosen)
    print(ops.backend_info()["cpu"]["instructions"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
