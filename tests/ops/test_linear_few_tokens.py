"""The linear op for few tokens: its error against the exact product, at every edge of a weight and of memory."""

from __future__ import annotations

import pytest
import torch

from compressed_format import bitpack
from compressed_format.bitmask import pack_bitmask
from tests.ops.processes import run_tests

linear = torch.ops.compressed_format.linear.default
dequantize = torch.ops.compressed_format.dequantize_reference.default

LEVELS = ("portable", "avx2", "avx512")
KINDS = [*range(1, 9), "int8", "float8"]


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    memory = torch.frombuffer(bytearray(data.numel() + 1), dtype=torch.uint8)
    memory[1:] = data
    odd = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1, count=tensor.numel())
    return odd.reshape(tensor.shape)


def weight_of(kind, rows, columns, group, zero_points, scale_dtype, block_rows=1):
    """The arguments of the op that describe a random weight, and its layout."""
    bits = kind if isinstance(kind, int) else 8
    block_columns = group or max(columns, 1)
    if kind == "float8":
        weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, columns), dtype=torch.int8)
        weight = codes if kind == "int8" else bitpack.pack_codes(codes, bits)
    shape = (-(-rows // block_rows), -(-columns // block_columns))
    scale = (torch.rand(shape) * 0.02 + 0.001).to(scale_dtype)
    zero_point = None
    if zero_points != "none" and kind != "float8":
        zero_point = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
        if zero_points == "packed":
            zero_point = bitpack.pack_codes(zero_point.T.contiguous(), bits).T.contiguous()
    return [weight, scale, zero_point, None, None], [bits, columns, block_rows, block_columns]


def errors(x, tensors, bias, layout):
    """The root of the mean square error of the op, and that of the dense layer, against the float64 product."""
    weight, scale, zero_point, *rest = tensors
    dense = dequantize(*tensors, *layout)
    exact = dequantize(weight, scale.double(), zero_point, *rest, *layout)
    y = x.double() @ exact.T
    if bias is not None:
        y = y + bias.double()
    ours = linear(x, *tensors, bias, *layout)
    theirs = torch.nn.functional.linear(x, dense.to(x.dtype), bias)
    assert ours.shape == theirs.shape
    assert ours.dtype == x.dtype
    return (ours.double() - y).square().mean().sqrt().item(), (theirs.double() - y).square().mean().sqrt().item()


def check(x, tensors, bias, layout):
    ours, theirs = errors(x, tensors, bias, layout)
    # What both round alike, the result, is nearly all of the error where sums are short; float32 sums of few terms
    # differ by chance.
    floor = 2e-7 * x.double().square().mean().sqrt().item() if x.dtype == torch.float32 else 0.0
    assert ours <= 1.1 * theirs + floor, (ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_points", ["none", "int8", "packed"])
def test_error_against_the_exact_product(kind, dtype, zero_points):
    torch.manual_seed(1)
    for rows, columns, group, tokens in [(133, 512, 128, 1), (70, 416, 32, 3), (67, 448, 64, 13), (66, 331, 0, 6)]:
        tensors, layout = weight_of(kind, rows, columns, group, zero_points, torch.bfloat16)
        check(torch.randn(tokens, columns).to(dtype), tensors, None, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_columns(kind):
    torch.manual_seed(2)
    for columns in [*range(1, 70), 127, 128, 129, 191, 193]:
        tensors, layout = weight_of(kind, 37, columns, 32 if columns % 2 else 64, "int8", torch.float32)
        x = torch.randn(2, columns)
        exact = dequantize(tensors[0], tensors[1].double(), *tensors[2:], *layout)
        magnitude = x.abs().double() @ exact.abs().T
        difference = (linear(x, *tensors, None, *layout).double() - x.double() @ exact.T).abs()
        # Terms with zero points cancel only after they were summed: up to three times the largest code each.
        assert (difference <= 2e-6 * (magnitude + x.abs().sum() * 400 * tensors[1].max())).all()


@pytest.mark.parametrize("tokens", range(1, 29))
def test_every_number_of_tokens(tokens):
    torch.manual_seed(3)
    tensors, layout = weight_of(4, 37, 384, 128, "int8", torch.bfloat16)
    x = torch.randn(tokens, 384, dtype=torch.bfloat16)
    check(x, tensors, None, layout)


@pytest.mark.parametrize("zero_points", ["none", "int8", "packed"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_that_name_their_groups(scale_dtype, zero_points):
    torch.manual_seed(8)
    # One group, and tables of one, two and four registers, and in memory; more groups than a table has room for.
    for kind, columns, group in [(4, 70, 70), (3, 200, 32), (8, 520, 16), (4, 1500, 16), (5, 1500, 8), (4, 2100, 2)]:
        tensors, layout = weight_of(kind, 41, columns, group, zero_points, scale_dtype)
        tensors[3] = (torch.randperm(columns) // group).to(torch.int32)
        x, bias = torch.randn(20, columns), torch.randn(41)
        odd = [None if tensor is None else at_odd_address(tensor) for tensor in tensors]
        for tokens in (1, 2, 3, 4, 5, 20):
            for dtype in (torch.float32, torch.bfloat16):
                part, added = x[:tokens].to(dtype), bias.to(dtype)
                check(part, tensors, added, layout)
                assert torch.equal(linear(part, *odd, added, *layout), linear(part, *tensors, added, *layout))


def test_a_scale_that_is_no_number_spoils_its_group_only():
    torch.manual_seed(9)
    tensors, layout = weight_of(4, 3, 70, 35, "none", torch.bfloat16)
    tensors[3] = torch.ones(70, dtype=torch.int32)
    tensors[1][1, 0] = tensors[1][2, 1] = torch.inf
    for tokens in (1, 20):
        y = linear(torch.ones(tokens, 70).bfloat16(), *tensors, None, *layout)
        assert y[:, :2].isfinite().all()
        assert not y[:, 2].isfinite().any()


def test_memory_at_odd_addresses_and_strides():
    torch.manual_seed(4)
    for kind in KINDS:
        tensors, layout = weight_of(kind, 35, 300, 64, "int8", torch.float16)
        x = torch.randn(3, 300).bfloat16()
        bias = torch.randn(35).bfloat16()
        expected = linear(x, *tensors, bias, *layout)
        odd = [None if tensor is None else at_odd_address(tensor) for tensor in tensors]
        assert torch.equal(linear(at_odd_address(x), *odd, at_odd_address(bias), *layout), expected)
        wide = torch.full((3, 311), torch.nan, dtype=x.dtype)
        wide[:, 5:305] = x
        wide_codes = torch.cat([tensors[0]] * 2, dim=1)[:, : tensors[0].shape[1]]
        assert torch.equal(linear(wide[:, 5:305], wide_codes, *tensors[1:], bias, *layout), expected)


def test_scales_of_blocks_and_of_the_whole_weight():
    torch.manual_seed(5)
    x = torch.randn(2, 300).bfloat16()
    for kind in (4, "int8", "float8"):
        tensors, layout = weight_of(kind, 150, 300, 128, "none", torch.float32, block_rows=64)
        check(x, tensors, None, layout)
        tensors[1] = torch.tensor([0.0123])
        check(x, tensors, torch.randn(150).bfloat16(), layout)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_values_and_half_of_them(weight_dtype, dtype):
    torch.manual_seed(7)
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}[dtype]
    for columns in (4, 28, 32, 36, 60, 64, 100, 260):
        order = torch.rand(21, columns).unflatten(-1, (-1, 4)).argsort(-1).flatten(-2)
        kept = torch.randn(21, columns // 2).to(weight_dtype)
        halves = [at_odd_address(kept), None, None, None, pack_bitmask(order < 2)]
        plain = [at_odd_address(torch.randn(21, columns).to(weight_dtype)), None, None, None, None]
        x, bias = torch.randn(5, columns).to(dtype), torch.randn(21).to(dtype)
        for tensors in (halves, plain):
            layout = [8, columns, 1, columns]
            exact = x.double() @ dequantize(*tensors, *layout).double().T + bias.double()
            for tokens in range(1, 6):
                y = linear(x[:tokens], *tensors, bias, *layout).double()
                assert (y - exact[:tokens]).norm() <= tolerance * exact[:tokens].norm()


def test_values_of_float8_are_exact():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(256, 1)
    one = torch.ones(1, 1)
    y = linear(one, codes, torch.ones(1), None, None, None, None, 8, 1, 1, 1)
    assert torch.equal(y[0].nan_to_num(12345.0), codes.float()[:, 0].nan_to_num(12345.0))


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(6)
    threads = torch.get_num_threads()
    try:
        for kind in (3, 4, "int8", "float8"):
            for tokens in (1, 5, 16):
                tensors, layout = weight_of(kind, 1027, 640, 128, "int8", torch.bfloat16)
                x = torch.randn(tokens, 640).bfloat16()
                results = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(linear(x, *tensors, None, *layout))
                assert torch.equal(*results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    """The level is read once a process; a level that the machine lacks runs the highest that it has."""
    run_tests(level, __file__, "not instruction_set")
