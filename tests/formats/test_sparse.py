"""``sparse-bitmask`` and ``sparse-24-bitmask``: literal bytes, pruning, and bitmasks that lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressed_format.bitmask import expand_bitmask, pack_bitmask
from compressed_format.config import CompressionFormat
from compressed_format.errors import FormatError
from compressed_format.formats import SPARSITY_FORMATS, prune_2_of_4
from tests.checks import assert_same_bits, hexadecimal

BITMASK = SPARSITY_FORMATS[CompressionFormat.SPARSE_BITMASK]
BITMASK_24 = SPARSITY_FORMATS[CompressionFormat.SPARSE_24_BITMASK]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def values(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).to(torch.float32).to(dtype)


def test_literal_bytes_of_a_bitmask() -> None:
    weight = torch.tensor([[0, 5, 0, 0, 0, 0, 0, -6, 7, 0], [0] * 10, [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]], dtype=torch.int8)
    tensors = BITMASK.encode(weight)
    assert {name: hexadecimal(tensor) for name, tensor in tensors.items()} == {
        "shape": "0300000000000000" + "0a00000000000000",
        "compressed": "05fa07" + "0102",
        # Columns 1 and 7 of the first byte, column 8 is bit 0 of the second; then columns 0 and 9.
        "bitmask": "8201" + "0000" + "0102",
        "row_offsets": "0000000000000000" + "0300000000000000" + "0300000000000000",
    }
    assert_same_bits(BITMASK.decode(tensors), weight)


def test_literal_bytes_of_a_2_of_4_bitmask() -> None:
    weight = torch.tensor([[0, 3, 0, -4, 5, 0, 0, 6], [7, 8, 0, 0, 0, 0, 9, -9]], dtype=torch.int8)
    tensors = BITMASK_24.encode(weight)
    assert {name: hexadecimal(tensor) for name, tensor in tensors.items()} == {
        "shape": "0200000000000000" + "0800000000000000",
        "compressed": "03fc0506" + "070809f7",
        "bitmask": "9a" + "c3",  # 1001 1010 and 1100 0011, the first column in the lowest bit
    }
    assert tensors["shape"].shape == (2, 1)
    assert tensors["compressed"].shape == (2, 4)
    assert_same_bits(BITMASK_24.decode(tensors), weight)


@given(rows=st.integers(0, 6), columns=st.integers(0, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_a_bitmask_holds_any_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    weight = values((rows, columns), dtype, seed)
    tensors = BITMASK.encode(weight)
    for name, spec in BITMASK.tensor_specs((rows, columns)).items():
        assert spec.problem(tensors[name].dtype, tuple(tensors[name].shape)) is None, name
    assert_same_bits(BITMASK.decode(tensors), weight)
    assert tensors["compressed"].numel() == (weight.to(torch.float32) != 0).sum()


@given(rows=st.integers(0, 6), quads=st.integers(0, 9), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_a_2_of_4_bitmask_holds_what_was_pruned(rows: int, quads: int, dtype: torch.dtype, seed: int) -> None:
    pruned = prune_2_of_4(values((rows, quads * 4), torch.float32, seed)).to(dtype)
    tensors = BITMASK_24.encode(pruned)
    for name, spec in BITMASK_24.tensor_specs((rows, quads * 4)).items():
        assert spec.problem(tensors[name].dtype, tuple(tensors[name].shape)) is None, name
    assert_same_bits(BITMASK_24.decode(tensors), pruned)


def test_the_smallest_int8_has_a_magnitude() -> None:
    weight = torch.tensor([[-128, 0, 1, 0]], dtype=torch.int8)
    assert_same_bits(BITMASK_24.decode(BITMASK_24.encode(weight)), weight)


def test_pruning_keeps_the_two_largest_and_the_left_of_equals() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, 4.0, -4.0, 4.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 0.0]])
    expected = [[0.0, -3.0, 2.0, 0.0, 4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 0.0]]
    assert prune_2_of_4(weight).tolist() == expected
    with pytest.raises(FormatError, match="row 0, column 0 on"):
        BITMASK_24.encode(weight)
    assert BITMASK_24.encode(prune_2_of_4(weight))["compressed"].tolist() == [[-3, 2, 4, 4], [0, 0, 1, 2]]


def test_the_zeros_that_fill_up_are_those_of_the_files_that_exist() -> None:
    """A value at each place, at none, and at each two: which bits are set beside those was left to torch's topk."""
    places = [[i for i in range(4) if pattern >> i & 1] for pattern in range(16)]
    quads = [kept for kept in places if len(kept) <= 2]
    weight = torch.zeros(len(quads), 4)
    for row, kept in enumerate(quads):
        weight[row, kept] = 1.0
    mask = BITMASK_24.encode(weight)["bitmask"].flatten().tolist()
    assert mask == [0b1100, 0b0101, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0b1100, 0b1001, 0b1010, 0b1100]
    wide = weight.repeat(10, 16)
    chosen = wide.unflatten(-1, (-1, 4)).topk(2, dim=-1).indices
    expected = torch.zeros(110, 16, 4, dtype=torch.bool).scatter_(-1, chosen, True).flatten(-2)
    assert_same_bits(BITMASK_24.encode(wide)["bitmask"], pack_bitmask(expected))


def test_bits_of_a_mask_and_back() -> None:
    mask = torch.tensor([True, False, False, True, False, False, False, False, False, True])
    packed = pack_bitmask(mask)
    assert packed.tolist() == [0b00001001, 0b00000010]
    expanded = expand_bitmask(torch.tensor([1.0, 2.0, 3.0]), packed.unsqueeze(0), 10)
    assert expanded.tolist() == [[1.0, 0, 0, 2.0, 0, 0, 0, 0, 0, 3.0]]


def test_a_weight_that_is_not_2_of_4() -> None:
    weight = torch.zeros(4, 12)
    weight[2, 4:7] = 1.0
    with pytest.raises(FormatError, match=r"^lin: is not 2:4: more than two .* from row 2, column 4 on are not zero"):
        BITMASK_24.encode(weight, place="lin")


@pytest.mark.parametrize("call", [BITMASK_24.encode, prune_2_of_4])
def test_columns_that_are_no_multiple_of_four(call: object) -> None:
    with pytest.raises(FormatError, match=r"^lin: has 6 columns, which is no multiple of 4"):
        call(torch.zeros(2, 6), place="lin")


@pytest.mark.parametrize("format", [BITMASK, BITMASK_24])
def test_weights_that_are_no_matrix(format: object) -> None:
    with pytest.raises(FormatError, match=r"^lin: has shape \[2, 4, 4\]; sparse formats hold matrices only"):
        format.encode(torch.zeros(2, 4, 4), place="lin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": None}, r"lin\.shape: is missing, expected int64 \[2\]"),
        ({"shape": torch.tensor([[2], [8]])}, r"lin\.shape: has dtype torch\.int64 and shape \[2, 1\], expected int64"),
        ({"shape": torch.tensor([2.0, 8.0])}, r"lin\.shape: has dtype torch\.float32"),
        ({"shape": torch.tensor([2, -3])}, r"lin\.shape: says \[2, -3\]"),
        ({"shape": torch.tensor([1 << 43, 8])}, r"lin\.bitmask: has shape \[2, 1\], expected \[8796093022208, 1\]"),
        ({"shape": torch.tensor([2, 1 << 43])}, r"lin\.bitmask: has shape \[2, 1\], expected \[2, 1099511627776\]"),
        ({"bitmask": None}, r"lin\.bitmask: is missing"),
        ({"bitmask": torch.zeros(2, 1)}, r"lin\.bitmask: has dtype float32, expected uint8"),
        ({"bitmask": torch.zeros(2, 1, dtype=torch.uint8)}, r"lin\.bitmask: has 0 bits set for the 3 values"),
        ({"compressed": None}, r"lin\.compressed: is missing"),
        ({"compressed": torch.zeros(4)}, r"lin\.bitmask: has 3 bits set for the 4 values of compressed"),
        ({"compressed": torch.zeros(3, dtype=torch.int64)}, r"lin\.compressed: has dtype int64"),
        ({"row_offsets": torch.tensor([0, 1])}, r"lin\.row_offsets: contradicts the bitmask"),
        ({"row_offsets": torch.tensor([0])}, r"lin\.row_offsets: has shape \[1\], expected \[2\]"),
    ],
)
def test_bitmasks_that_contradict_their_values(changes: dict[str, torch.Tensor | None], message: str) -> None:
    weight = torch.tensor([[0, 1.0, 0, 0, 2.0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0, 0, 0]])
    tensors = {name: value for name, value in (BITMASK.encode(weight) | changes).items() if value is not None}
    with pytest.raises(FormatError, match=f"^{message}"):
        BITMASK.decode(tensors, place="lin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": torch.tensor([2, 8])}, r"lin\.shape: .*expected int64 \[2, 1\]"),
        ({"bitmask": torch.tensor([[0x33], [0x47]], dtype=torch.uint8)}, r"lin\.bitmask: .*row 1, columns 0 to 3"),
        ({"bitmask": torch.tensor([[0x33], [0x13]], dtype=torch.uint8)}, r"lin\.bitmask: has 7 bits set for the 8"),
        ({"compressed": torch.zeros(2, 3)}, r"lin\.compressed: has shape \[2, 3\], expected \[2, 4\]"),
    ],
)
def test_bitmasks_that_are_not_2_of_4(changes: dict[str, torch.Tensor], message: str) -> None:
    tensors = BITMASK_24.encode(torch.tensor([[1.0, 2.0, 0, 0, 3.0, 4.0, 0, 0]] * 2)) | changes
    with pytest.raises(FormatError, match=f"^{message}"):
        BITMASK_24.decode(tensors, place="lin")


def test_columns_whose_quads_run_over_row_ends() -> None:
    """Older releases cut the whole weight into fours; with six columns, some of them span two rows."""
    weight = torch.tensor([[1.0, 2.0, 0, 0, 0, 3.0], [4.0, 0, 5.0, 0, 6.0, 0]])
    tensors = BITMASK.encode(weight)
    stored = {
        "shape": torch.tensor([[2], [6]]),
        "compressed": tensors["compressed"].reshape(2, 3),
        "bitmask": tensors["bitmask"],
    }
    assert_same_bits(BITMASK_24.decode(stored), weight)
