"""The reader as the oracle: whatever cannot be decoded has an error, and no damage ends in an exception."""

from __future__ import annotations

import json
import random
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest

from compressed_format import CompressedFormatError, CompressedFormatWarning, check, open_checkpoint
from compressed_format.checking import CONSUMERS
from tests.checking.checkpoints import GROUPS, save
from tests.checks import GOLDEN

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1, "BOOL": 1, "C64": 8}
SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "k_scale",
            "shape", "bitmask", "compressed", "row_offsets", "meta", "scale_packed", "output_scale")  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 3, 4, 8, 33, 2**70, 1e308, "", "Linear", "lm_head", "re:.*", "re:(", [], {}, [1], "float", "int",
    "group", "channel", "tensor", "block", "token", [16, 16], "0.17.1", "dense", "pack-quantized", "marlin-24",
    "nvfp4-pack-quantized", "sparse-24-bitmask", "int-quantized", "float-quantized",
)  # fmt: skip
CASES = 250


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    saved = [save(folder / str(index), group) for index, group in enumerate(GROUPS)]
    golden = [path.parent for path in GOLDEN.glob("*/*/config.json")]
    return saved + sorted(golden)


@pytest.mark.parametrize("seed", range(2))
def test_what_cannot_be_decoded_has_an_error(seed: int, sources: list[Path], tmp_path: Path) -> None:
    chance = random.Random(seed)
    decoded = refused = 0
    for case in range(CASES):
        damage(chance.choice(sources), tmp_path, chance)
        report = check(tmp_path, consumers=CONSUMERS if case % 2 else ())
        json.dumps(report.to_dict())
        check(tmp_path, quick=True)
        problem = decoding_problem(tmp_path)
        if problem is None:
            decoded += 1
        elif not any(finding.code == "CF210" for finding in report.notes):  # formats that nobody here decodes
            refused += 1
            assert report.errors, f"seed {seed}, case {case}: {problem}"
    assert decoded > CASES // 10
    assert refused > CASES // 10


def decoding_problem(folder: Path) -> CompressedFormatError | None:
    """What the reader says of the modules that are compressed; anything but this library's errors is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompressedFormatWarning)
            for module in open_checkpoint(folder).modules.values():
                weight = module.tensors.get("weight")
                dense = module.tensors.keys() <= {"weight", "bias"} and (weight is None or weight.dtype == "float32")
                if module.assignment is not None and not dense:
                    module.dense()
    except CompressedFormatError as error:
        return error
    return None


def damage(source: Path, folder: Path, chance: random.Random) -> None:
    """A copy of a checkpoint with some of its config, header and bytes changed."""
    config = json.loads((source / "config.json").read_text())
    for _ in range(chance.choice([0, 0, 1, 2])):
        config = changed(config, chance)
    data = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.choice([0, 1, 1, 2])):
        name = chance.choice(names)
        if name not in header:
            continue
        if chance.random() < 0.3:
            renamed = f"{chance.choice(names).rpartition('.')[0]}.{chance.choice(SUFFIXES)}"
            header[renamed] = header.pop(name)
        else:
            header[name] = reshaped(header[name], chance)
    for _ in range(chance.choice([0, 1, 50])):
        body[chance.randrange(len(body))] = chance.randrange(256)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


def reshaped(entry: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The same bytes as another dtype and shape."""
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    dtype = chance.choice([name for name, width in SIZES.items() if size % width == 0])
    count = size // SIZES[dtype]
    rows = chance.choice([rows for rows in range(1, 200) if count % rows == 0])
    columns = count // rows
    shape = chance.choice([[count], [rows, columns], [columns, rows], [1, count], [1, rows, columns]])
    return {"dtype": dtype, "shape": shape, "data_offsets": entry["data_offsets"]}


def changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with one of its parts replaced or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        rest = {name: member for name, member in value.items() if name != key}
        return rest if chance.random() < 0.1 else rest | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        return [changed(value[0], chance), *value[1:]]
    return chance.choice(JUNK)


def test_columns_in_an_order_that_the_config_does_not_announce(tmp_path: Path) -> None:
    """weight_g_idx counts wherever it is: check warns of it, and the reader follows it."""
    source = GOLDEN / "v0.14.0.1_legacy" / "pack4_group8_gidx"
    shutil.copytree(source, tmp_path / "m")
    expected = open_checkpoint(source).modules["lin"].dense()
    text = (source / "config.json").read_text()
    assert '"actorder": "group"' in text
    (tmp_path / "m" / "config.json").write_text(text.replace('"actorder": "group"', '"actorder": null'))
    assert [finding.code for finding in check(tmp_path / "m").warnings] == ["CF206"]
    assert (open_checkpoint(tmp_path / "m").modules["lin"].dense() == expected).all()
