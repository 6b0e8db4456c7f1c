"""``marlin-24``, which is read and never written: what is not one is refused."""

from __future__ import annotations

import pytest
import torch

from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.errors import FormatError, UnsupportedFormatError
from compressed_format.formats import FORMATS
from compressed_format.quantization import dequantize, quantize
from tests.checks import assert_same_bits, golden_cases, golden_tensors

MARLIN, PACK = FORMATS[CompressionFormat.MARLIN_24], FORMATS[CompressionFormat.PACK_QUANTIZED]
CHANNEL = QuantizationArgs(num_bits=4, strategy="channel")


def golden() -> dict[str, torch.Tensor]:
    return golden_tensors(golden_cases("v0.14.0.1_legacy")["marlin24_4_channel_64x256"])


def test_becomes_pack_quantized() -> None:
    decoded = MARLIN.decode(golden(), CHANNEL)
    packed = PACK.encode(decoded, CHANNEL)
    assert_same_bits(dequantize(PACK.decode(packed, CHANNEL), CHANNEL), dequantize(decoded, CHANNEL))
    assert (decoded.codes.unflatten(-1, (-1, 4)) != 0).sum(-1).max() == 2


def test_tensors_of_eight_bits_are_twice_as_wide() -> None:
    for bits in (4, 8):
        specs = MARLIN.tensor_specs((64, 256), QuantizationArgs(num_bits=bits, strategy="group", group_size=128))
        assert specs["weight_packed"].shape == (8, 32 * bits)
        assert specs["scale_packed"].shape == (2, 64)
        assert specs["meta"].shape == (8, 128)


def marlin_of_eight_bits(values: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The shuffles as they are described: tiles of 16 x 16, runs of 1024 codes, four of them a word.

    ``values`` ``[I/2, O]`` are the codes of the first two columns of each four.
    """
    packed_columns, rows = values.shape
    order = []
    for thread in range(32):
        column = thread // 4
        start = 16 * (2 * (thread % 4)) + 256 * (column // 2) + 8 * (column % 2)
        fragment = [start + 16 * offset for offset in (0, 1, 8, 9)]
        for neighbour in range(4):
            both = [place + neighbour + 4 * block for block in range(2) for place in fragment]
            order += [both[chunk + index] for chunk in (0, 4) for index in (0, 2, 1, 3)]
    tiles = values.reshape(packed_columns // 16, 16, rows // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    stored = (tiles[:, order] + 128).reshape(-1, 4)
    words = sum(stored[:, index] << (8 * index) for index in range(4)).to(torch.int32)
    return {
        "weight_packed": words.reshape(packed_columns // 16, rows * 4),
        "scale_packed": scale,
        # Index 0 and index 1, four quads to a word; whatever order its words are in.
        "meta": torch.full((packed_columns // 16, 2 * rows), 0x4444, dtype=torch.int16),
    }


def random_values(packed_columns: int, rows: int) -> torch.Tensor:
    return torch.randint(-128, 128, (packed_columns, rows), generator=torch.Generator().manual_seed(0))


def test_eight_bits_are_shuffled_in_their_own_order() -> None:
    values = random_values(64, 64)
    tensors = marlin_of_eight_bits(values, torch.ones(1, 64, dtype=torch.float16))
    quads = MARLIN.decode(tensors, QuantizationArgs(num_bits=8, strategy="channel")).codes.reshape(64, -1, 4)
    assert torch.equal(quads[..., :2].reshape(64, -1).to(torch.int64), values.T)
    assert not quads[..., 2:].any()


@pytest.mark.parametrize(("columns", "shuffled"), [(256, False), (512, True)])
def test_scales_of_small_groups_are_shuffled(columns: int, shuffled: bool) -> None:
    """Only if a group is smaller than the halved columns: each 64 scales of a group, in eights."""
    rows, groups = 128, columns // 128
    scale = torch.arange(1, groups * rows + 1, dtype=torch.float16).reshape(groups, rows)
    stored = scale
    if shuffled:
        stored = scale.reshape(-1, 64)[:, [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]]
        stored = stored.reshape(groups, rows)
    args = QuantizationArgs(num_bits=8, strategy="group", group_size=128)
    tensors = marlin_of_eight_bits(random_values(columns // 2, rows), stored)
    assert_same_bits(MARLIN.decode(tensors, args).scale, scale.T.contiguous())


def test_is_never_written() -> None:
    quantized = quantize(torch.zeros(64, 256), CHANNEL)
    with pytest.raises(UnsupportedFormatError, match=r"^lin: marlin-24 is read, not written: .*use pack-quantized"):
        MARLIN.encode(quantized, CHANNEL, place="lin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_packed": None}, r"lin\.weight_packed: is missing, expected an int32 matrix"),
        ({"weight_packed": torch.zeros(8, 128)}, r"lin\.weight_packed: has dtype torch\.float32"),
        ({"weight_packed": torch.zeros(8 * 128, dtype=torch.int32)}, r"lin\.weight_packed: .*expected an int32 matrix"),
        ({"weight_packed": torch.zeros(8, 100, dtype=torch.int32)}, r"lin\.weight_packed: .*cannot tile"),
        ({"weight_packed": torch.zeros(0, 128, dtype=torch.int32)}, r"lin\.weight_packed: .*cannot tile"),
        ({"scale_packed": None}, r"lin\.scale_packed: is missing"),
        ({"scale_packed": torch.ones(2, 64, dtype=torch.float16)}, r"lin\.scale_packed: has shape \[2, 64\]"),
        ({"scale_packed": torch.full((1, 64), torch.nan, dtype=torch.float16)}, r"lin\.scale_packed: holds nan"),
        ({"meta": torch.zeros(8, 127, dtype=torch.int16)}, r"lin\.meta: has shape \[8, 127\], expected \[8, 128\]"),
        (
            {"meta": torch.zeros(8, 128, dtype=torch.int16)},
            r"lin\.meta: puts both values of row 0, columns 0 to 3",
        ),
    ],
)
def test_tensors_that_contradict_the_format(changes: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {name: value for name, value in (golden() | changes).items() if value is not None}
    with pytest.raises(FormatError, match=f"^{message}"):
        MARLIN.decode(tensors, CHANNEL, place="lin")


@pytest.mark.parametrize(
    "args",
    [
        QuantizationArgs(num_bits=4, strategy="channel", symmetric=False),
        QuantizationArgs(num_bits=3, strategy="channel"),
        QuantizationArgs(num_bits=4, strategy="tensor"),
        QuantizationArgs(num_bits=8, type="float", strategy="channel"),
    ],
)
def test_schemes_it_never_held(args: QuantizationArgs) -> None:
    with pytest.raises(UnsupportedFormatError, match="symmetric int4 or int8 weights by channel or group only"):
        MARLIN.decode(golden(), args)
