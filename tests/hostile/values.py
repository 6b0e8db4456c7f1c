"""Tensors whose bytes contradict their format, or ask for memory that nobody has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from tests.hostile.case import SCALES, VALUES, Case
from tests.models import edit_config, edit_tensors, read_config, read_tensors

__all__ = ["VALUE_CASES"]

LARGE = 2**62
Edit = Callable[[torch.Tensor], torch.Tensor]


def tensor(name: str, edit: Edit) -> Callable[[Path], None]:
    """One tensor becomes another."""

    def spoil(folder: Path) -> None:
        edit_tensors(folder, **{name: edit(read_tensors(folder)[name])})

    return spoil


def filled(name: str, value: float, index: int = 3) -> Callable[[Path], None]:
    """One value of a tensor becomes another."""

    def edit(found: torch.Tensor) -> torch.Tensor:
        found.view(-1)[index] = value
        return found

    return tensor(name, edit)


def g_idx(make: Callable[[int], torch.Tensor]) -> Callable[[Path], None]:
    """Columns in the order of groups that GPTQ wrote."""

    def spoil(folder: Path) -> None:
        groups = read_config(folder)["quantization_config"]["config_groups"]
        groups["group_0"]["weights"]["actorder"] = "group"
        edit_config(folder, quantization_config={"config_groups": groups})
        edit_tensors(folder, **{"lin.weight_g_idx": make(128)})

    return spoil


SHAPES = [
    Case(
        f"weight_shape: {list(sizes)}",
        tensor("lin.weight_shape", lambda _, sizes=sizes: torch.tensor(sizes)),
        "weight_shape|weight_packed",
        VALUES,
        base="grouped",
    )
    for sizes in (
        (LARGE, 4),
        (LARGE, LARGE),
        (-64, 128),
        (64, -128),
        (64, 129),
        (0, 0),
        (64, 128, 1),
        (2**63 - 1, 2**63 - 1),
    )
]

PACKED = [
    Case(
        "a word too few", tensor("lin.weight_packed", lambda t: t[:, :-1].contiguous()), "", VALUES, base="three bits"
    ),
    Case("a word too many", tensor("lin.weight_packed", lambda t: t.repeat(1, 2)), "", VALUES, base="grouped"),
    Case("packed in float", tensor("lin.weight_packed", lambda t: t.float()), "dtype", VALUES, base="grouped"),
    Case("packed without rows", tensor("lin.weight_packed", lambda t: t[:0]), "", VALUES, base="grouped"),
    Case("packed in three dimensions", tensor("lin.weight_packed", lambda t: t[None]), "", VALUES, base="grouped"),
    Case(
        "a column of scales too few",
        tensor("lin.weight_scale", lambda t: t[:, 1:].contiguous()),
        "",
        VALUES,
        base="grouped",
    ),
    Case("scales of one dimension", tensor("lin.weight_scale", lambda t: t.view(-1)), "", VALUES, base="grouped"),
    Case("scales that are integers", tensor("lin.weight_scale", lambda t: t.int()), "dtype", VALUES, base="grouped"),
    Case("a scale: NaN", filled("lin.weight_scale", math.nan), "nan|NaN", SCALES, ("fill",), base="grouped"),
    Case("a scale: infinite", filled("lin.weight_scale", math.inf), "inf", SCALES, ("fill",), base="grouped"),
    Case("a scale: zero", filled("lin.weight_scale", 0.0), "scale", ("check",), base="grouped"),
    Case("a scale: negative", filled("lin.weight_scale", -1.0), "scale", ("check",), base="grouped"),
    Case("a scale of int8: NaN", filled("lin.weight_scale", math.nan), "nan|NaN", SCALES, ("fill",), base="int8"),
    Case(
        "zero points too few",
        tensor("lin.weight_zero_point", lambda t: t[1:].contiguous()),
        "",
        VALUES,
        base="asymmetric",
    ),
    Case(
        "zero points in int64", tensor("lin.weight_zero_point", lambda t: t.long()), "dtype", VALUES, base="asymmetric"
    ),
    Case(
        "zero points out of range",
        tensor("lin.weight_zero_point", lambda _: torch.full((64, 4), 100, dtype=torch.int8)),
        "zero_point",
        VALUES,
        base="asymmetric",
    ),
]

COLUMNS = [
    Case(
        "g_idx: a group too far",
        g_idx(lambda n: torch.arange(n, dtype=torch.int32) // 32 + 1),
        "g_idx",
        VALUES,
        base="grouped",
    ),
    Case(
        "g_idx: 2**31 - 1",
        g_idx(lambda n: torch.full((n,), 2**31 - 1, dtype=torch.int32)),
        "g_idx",
        VALUES,
        base="grouped",
    ),
    Case("g_idx: -2", g_idx(lambda n: torch.full((n,), -2, dtype=torch.int32)), "g_idx", VALUES, base="grouped"),
    Case("g_idx: too short", g_idx(lambda n: torch.zeros(n - 1, dtype=torch.int32)), "g_idx", VALUES, base="grouped"),
]

SPARSE = [
    Case("2:4: all bits", tensor("lin.bitmask", lambda t: torch.full_like(t, 255)), "bitmask", VALUES, base="2:4"),
    Case("2:4: no bits", tensor("lin.bitmask", torch.zeros_like), "bitmask", VALUES, base="2:4"),
    Case(
        "2:4: four of eight", tensor("lin.bitmask", lambda t: torch.full_like(t, 0x0F)), "bitmask", VALUES, base="2:4"
    ),
    Case(
        "2:4: FP8 NaN",
        tensor("lin.compressed", lambda t: torch.full_like(t.view(torch.uint8), 127).view(t.dtype)),
        "",
        ("check",),
        base="2:4",
    ),
    Case(
        "2:4: a shape of terabytes",
        tensor("lin.shape", lambda _: torch.tensor([[LARGE], [LARGE]])),
        "shape",
        VALUES,
        base="2:4",
    ),
    Case(
        "2:4: a negative shape",
        tensor("lin.shape", lambda _: torch.tensor([[-64], [-128]])),
        "shape",
        VALUES,
        base="2:4",
    ),
    Case("bitmask: more bits than values", filled("lin.bitmask", 255), "bitmask", VALUES, base="bitmask"),
    Case("bitmask: fewer bits than values", filled("lin.bitmask", 0), "bitmask", VALUES, base="bitmask"),
    Case("row offsets: past the end", filled("lin.row_offsets", LARGE), "row_offsets", VALUES, base="bitmask"),
    Case("row offsets: negative", filled("lin.row_offsets", -1), "row_offsets", VALUES, base="bitmask"),
    Case(
        "bitmask: a shape of terabytes",
        tensor("lin.shape", lambda _: torch.tensor([LARGE, 8])),
        "shape|bitmask",
        VALUES,
        base="bitmask",
    ),
    Case(
        "bitmask: a shape without rows",
        tensor("lin.shape", lambda _: torch.tensor([0, 128])),
        "",
        VALUES,
        base="bitmask",
    ),
]


def _marlin(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The 2:4 layout of older releases, of a weight [64, 128], changed."""

    def spoil(folder: Path) -> None:
        tensors = {
            "lin.weight_packed": torch.zeros(4, 128, dtype=torch.int32),
            "lin.scale_packed": torch.ones(4, 64, dtype=torch.float16),
            "lin.meta": torch.full((4, 128), 0x4444, dtype=torch.int16),
        }
        edit(tensors)
        edit_tensors(folder, ("lin.weight_packed", "lin.weight_scale", "lin.weight_shape"), **tensors)
        groups = read_config(folder)["quantization_config"]["config_groups"]
        groups["group_0"]["format"] = "marlin-24"
        edit_config(folder, quantization_config={"config_groups": groups, "format": "marlin-24"})

    return spoil


MARLIN = [
    Case("marlin-24: as it should be", _marlin(lambda _: None), refused_by=(), loads_with=("fill",), base="grouped"),
    Case(
        "marlin-24: two values in one column", _marlin(lambda t: t["lin.meta"].zero_()), "meta", VALUES, base="grouped"
    ),
    Case(
        "marlin-24: meta too small",
        _marlin(lambda t: t.update({"lin.meta": t["lin.meta"][:3].contiguous()})),
        "meta",
        VALUES,
        base="grouped",
    ),
    Case(
        "marlin-24: a scale infinite",
        _marlin(lambda t: t["lin.scale_packed"].fill_(math.inf)),
        "scale",
        VALUES,
        base="grouped",
    ),
    Case(
        "marlin-24: what cannot be tiled",
        _marlin(lambda t: t.update({"lin.weight_packed": torch.zeros(1, 1, dtype=torch.int32)})),
        "weight_packed",
        VALUES,
        base="grouped",
    ),
]

VALUE_CASES = [*SHAPES, *PACKED, *COLUMNS, *SPARSE, *MARLIN]
