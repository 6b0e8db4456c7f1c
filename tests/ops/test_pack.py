"""compressed_format::pack_codes: native kernel, reference and fake agree, in results and in refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_format import bitpack, ops
from compressed_format.errors import OpArgumentError

native = torch.ops.compressed_format.pack_codes.default
reference = torch.ops.compressed_format.pack_codes_reference.default


def random_codes(shape: tuple[int, ...], bits: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.int32
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


def test_literal_bytes() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 7]], dtype=torch.int8)
    packed = ops.pack_codes(codes, 4)
    assert packed.view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0x0F, 0x00, 0x00]]


shapes = st.lists(st.integers(0, 5), max_size=3).flatmap(lambda head: st.integers(0, 70).map(lambda n: (*head, n)))


@given(shape=shapes, bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_equals_the_definition(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    expected = bitpack.pack_codes(codes, bits)
    assert_same(native(codes, bits), expected)
    assert_same(reference(codes, bits), expected)


@given(rows=st.integers(1, 4), size=st.integers(1, 70), offset=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_memory_of_any_alignment(rows: int, size: int, offset: int, seed: int) -> None:
    storage = random_codes((offset + rows * size,), seed=seed)
    codes = storage[offset:].view(rows, size)
    assert_same(native(codes, 4), bitpack.pack_codes(codes.clone(), 4))


@given(shape=st.tuples(*[st.integers(1, 20)] * 3), order=st.permutations(range(3)), step=st.integers(1, 3))
def test_memory_in_any_order(shape: tuple[int, ...], order: list[int], step: int) -> None:
    codes = random_codes(shape).permute(order)[..., ::step]
    assert_same(native(codes, 4), bitpack.pack_codes(codes.contiguous(), 4))


def test_broadcast_memory() -> None:
    codes = random_codes((1, 21)).expand(6, 21)
    assert_same(native(codes, 4), bitpack.pack_codes(codes.contiguous(), 4))


# The first is shared out among threads within a row, the second within rows whose last word is not full.
@pytest.mark.parametrize("shape", [(1, 1_000_001), (1003, 1003), (512, 2048)])
def test_work_shared_among_threads(shape: tuple[int, ...]) -> None:
    codes = random_codes(shape)
    assert_same(native(codes, 4), bitpack.pack_codes(codes, 4))


def test_codes_out_of_range_lose_their_high_bits() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    assert_same(native(codes, 4), bitpack.pack_codes(codes, 4))


def test_input_is_left_alone() -> None:
    codes = random_codes((3, 19))
    before = codes.clone()
    native(codes, 4)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("op", [native, reference])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(3, 17), (2, 3, 16), (0, 5), (5, 0)])
def test_opcheck(op: torch._ops.OpOverload, bits: int, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(op, (random_codes(shape, bits), bits))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    def program(codes: torch.Tensor) -> torch.Tensor:
        return ops.pack_codes(codes.neg(), 4) ^ 1

    codes = random_codes((4, 33))
    compiled = torch.compile(program, fullgraph=True, backend=backend)
    assert torch.equal(compiled(codes), program(codes))


BAD_ARGUMENTS = [
    (torch.zeros(8), 4, "codes must be torch.int8, not torch.float32"),
    (torch.zeros(8, dtype=torch.uint8), 4, "codes must be torch.int8, not torch.uint8"),
    (torch.zeros((), dtype=torch.int8), 4, "codes must have at least one dimension"),
    (torch.zeros(8, dtype=torch.int8), 0, "bits must lie in 1 to 8, not 0"),
    (torch.zeros(8, dtype=torch.int8), 9, "bits must lie in 1 to 8, not 9"),
]


@pytest.mark.parametrize(("codes", "bits", "message"), BAD_ARGUMENTS)
@pytest.mark.parametrize("op", [native, reference, ops.pack_codes])
@pytest.mark.parametrize("place", ["cpu", "meta", "fake", "inference"])
def test_bad_arguments(op: torch._ops.OpOverload, place: str, codes: torch.Tensor, bits: int, message: str) -> None:
    if place == "fake":
        mode = FakeTensorMode()
        codes = mode.from_tensor(codes)
    elif place == "inference":
        # Tensors made in inference mode have no autograd keys: checks that hung on those would be passed over.
        mode = torch.inference_mode()
        with mode:
            codes = codes.clone()
    else:
        mode = torch.no_grad()
        codes = codes.to(place)
    with mode, pytest.raises(OpArgumentError, match=f"pack_codes: {message}"):
        op(codes, bits)


@pytest.mark.cuda
def test_cuda_runs_the_reference() -> None:
    codes = random_codes((5, 37))
    packed = ops.pack_codes(codes.cuda(), 4)
    assert packed.is_cuda
    assert_same(packed.cpu(), bitpack.pack_codes(codes, 4))
