"""Each kind of damage to a checkpoint gives exactly its finding, at its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed_format import QuantizationArgs, check, quantize
from compressed_format.bitpack import pack_codes
from compressed_format.checking import chunks
from compressed_format.checking.chunks import ChunkReader
from compressed_format.checkpoint import TensorSpec
from compressed_format.config import CompressionFormat
from compressed_format.formats import FORMATS
from compressed_format.formats.sparse import SparseBitmask
from tests.checking.checkpoints import DOWN, GROUPS, UP, found, save, with_tensor
from tests.checks import golden_cases, golden_tensors
from tests.models import edit_config, edit_tensors, read_tensors, word_aligned, write_folder

Damage = Callable[[Path], Any]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("quick", [False, True])
def test_what_is_saved_here_is_clean(tmp_path: Path, group: str, quick: bool) -> None:
    assert found(save(tmp_path / "m", group), quick=quick) == []


def put(name: str, index: Any, value: float) -> Damage:
    """Put one value into a tensor, whose dtype it is converted to."""

    def damage(folder: Path) -> None:
        def change(tensor: torch.Tensor) -> None:
            tensor[index] = torch.tensor(value).to(tensor.dtype)

        with_tensor(folder, name, change)

    return damage


def drop(name: str) -> Damage:
    return lambda folder: edit_tensors(folder, drop=(name,))


def add(name: str, tensor: torch.Tensor) -> Damage:
    return lambda folder: edit_tensors(folder, **{name: tensor})


def say(**fields: Any) -> Damage:
    """Change keys of quantization_config."""
    return lambda folder: edit_config(folder, quantization_config=fields)


def halve(name: str) -> Damage:
    return lambda folder: edit_tensors(folder, **{name: read_tensors(folder)[name].chunk(2, dim=1)[0]})


def convert(name: str, dtype: torch.dtype) -> Damage:
    return lambda folder: edit_tensors(folder, **{name: read_tensors(folder)[name].to(dtype)})


NAN = float("nan")
HEADERS = [
    ("int4", drop(f"{UP}.weight_scale"), "CF201", f"{UP}.weight_scale"),
    ("int4", drop(f"{UP}.weight_packed"), "CF201", f"{UP}.weight_packed"),
    ("int4", drop(f"{UP}.weight_shape"), "CF201", f"{UP}.weight_shape"),
    ("int4 asymmetric", drop(f"{UP}.weight_zero_point"), "CF201", f"{UP}.weight_zero_point"),
    ("float8 static", drop(f"{UP}.input_scale"), "CF201", f"{UP}.input_scale"),
    ("float8 2:4", drop(f"{UP}.compressed"), "CF201", f"{UP}.compressed"),
    ("int4", convert(f"{UP}.weight_scale", torch.int32), "CF202", f"{UP}.weight_scale"),
    ("int4", convert(f"{UP}.weight_packed", torch.int64), "CF202", f"{UP}.weight_packed"),
    ("float8", convert(f"{UP}.weight", torch.float8_e5m2), "CF202", f"{UP}.weight"),
    ("int4 asymmetric", halve(f"{UP}.weight_zero_point"), "CF203", f"{UP}.weight_zero_point"),
    ("float8", add(f"{UP}.weight_scale", torch.ones(96)), "CF203", f"{UP}.weight_scale"),
    ("float8 static", add(f"{UP}.input_scale", torch.ones(2)), "CF203", f"{UP}.input_scale"),
    ("float8 blocks", halve(f"{UP}.weight_scale"), "CF203", f"{UP}.weight_scale"),
    ("float8 2:4", halve(f"{UP}.compressed"), "CF203", f"{UP}.compressed"),
    ("int4", add(f"{UP}.weight_zero_point", torch.zeros(12, 2, dtype=torch.int32)), "CF204", f"{UP}.weight_zero_point"),
    ("int4", add(f"{UP}.weight", torch.ones(96, 64)), "CF204", f"{UP}.weight"),
    ("int4", add(f"{UP}.input_scale", torch.ones(1)), "CF204", f"{UP}.input_scale"),
    ("int4", add(f"{UP}.weight_g_idx", torch.arange(64, dtype=torch.int32) % 2), "CF206", f"{UP}.weight_g_idx"),
    ("int4", say(ignore=["lm_head", UP]), "CF114", UP),
    ("int4", say(ignore=[]), "CF115", "lm_head"),
    ("int4", say(ignore=["lm_head", "model.layers.0.mlp.op_proj"]), "CF113", "ignore"),
    ("int4", say(ignore=["lm_head", "re:.*vision.*"]), "CF113", "ignore"),
    ("int4", say(ignore=["lm_head", "model.layers.0"]), "CF113", "ignore"),
    ("int4", say(quantization_status="frozen"), "CF105", "quantization_config.quantization_status"),
    ("int4", say(version="0.21.0"), "CF106", "quantization_config.version"),
    ("int4", say(version="main"), "CF106", "quantization_config.version"),
    ("int4", say(kv_cache_scheme={"type": "float", "num_bits": 8}), "CF213", "kv_cache_scheme"),
    ("int4", add("model.layers.0.mlp.k_scale", torch.ones(1)), "CF213", "model.layers.0.mlp"),
    ("int4", add("model.layers.0.mlp.gate.weight", torch.ones(4, 64)), "CF115", "model.layers.0.mlp.gate"),
]  # fmt: skip
VALUES = [
    ("int4", put(f"{UP}.weight_scale", (3, 1), NAN), "CF301", f"{UP}.weight_scale"),
    ("int4", put(f"{UP}.weight_scale", (0, 0), 0.0), "CF301", f"{UP}.weight_scale"),
    ("float8", put(f"{UP}.weight_scale", (5, 0), -1.0), "CF301", f"{UP}.weight_scale"),
    ("float8 static", put(f"{DOWN}.input_scale", 0, float("inf")), "CF302", f"{DOWN}.input_scale"),
    ("int3 in bytes", put(f"{UP}.weight", (7, 9), 4), "CF303", f"{UP}.weight"),
    ("float8", put(f"{UP}.weight", (7, 9), NAN), "CF303", f"{UP}.weight"),
    ("float8 2:4", put(f"{UP}.compressed", (7, 9), NAN), "CF303", f"{UP}.compressed"),
    ("int3 in bytes", put(f"{UP}.weight_zero_point", 0, -5), "CF304", f"{UP}.weight_zero_point"),
    ("float8 2:4", put(f"{UP}.bitmask", (2, 3), 0b01110011), "CF306", f"{UP}.bitmask"),
    ("int4", put(f"{UP}.weight_shape", 1, 2**40), "CF308", f"{UP}.weight_shape"),
    ("int4", put(f"{UP}.weight_shape", 0, -96), "CF308", f"{UP}.weight_shape"),
    ("float8 2:4", put(f"{UP}.shape", (1, 0), 128), "CF308", f"{UP}.shape"),
]


@pytest.mark.parametrize(("group", "damage", "code", "place"), HEADERS)
@pytest.mark.parametrize("quick", [False, True])
def test_damage_that_headers_tell(
    tmp_path: Path, group: str, damage: Damage, code: str, place: str, quick: bool
) -> None:
    damage(save(tmp_path / "m", group))
    assert found(tmp_path / "m", quick=quick) == [(code, place)]


@pytest.mark.parametrize(("group", "damage", "code", "place"), VALUES)
def test_damage_that_values_tell(tmp_path: Path, group: str, damage: Damage, code: str, place: str) -> None:
    damage(save(tmp_path / "m", group))
    assert (code, place) in found(tmp_path / "m")
    assert {found_code for found_code, _ in found(tmp_path / "m")} <= {code, "CF307"}  # a wrong mask has wrong counts
    assert found(tmp_path / "m", quick=True) == []


def test_the_first_index_the_value_and_a_count_are_told(tmp_path: Path) -> None:
    save(tmp_path / "m", "int3 in bytes")
    put(f"{UP}.weight", (slice(40, 42), slice(5, None)), -7)(tmp_path / "m")
    (finding,) = check(tmp_path / "m").errors
    assert finding.message.startswith(
        f"holds -7 at index [40, 5], expected -4 to 3 for 3 bits ({2 * (64 - 5)} such values); correct num_bits"
    )


@pytest.mark.parametrize("chunk", [4, 24, 1000])
def test_parts_of_tensors_are_joined_rightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Indices and counts do not depend on how much is read at once, which may end within a row."""
    damages = [("int3 in bytes", put(f"{UP}.weight", (slice(40, 42), slice(5, None)), -7)),
               ("float8 2:4", put(f"{UP}.bitmask", (2, 3), 0b01110011)),
               ("float8", put(f"{UP}.weight_scale", (5, 0), -1.0))]  # fmt: skip
    for group, damage in damages:
        folder = save(tmp_path / group, group)
        assert found(folder) == []
        damage(folder)
        whole = check(folder)
        with monkeypatch.context() as patched:
            patched.setattr(chunks, "CHUNK_BYTES", chunk)
            assert check(folder) == whole
        assert not whole.ok


def test_one_part_of_a_tensor_is_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "m", "float8")
    sizes = []
    read = ChunkReader.read

    def recorded(self: ChunkReader, spec: TensorSpec, start: int, stop: int) -> bytearray:
        sizes.append(stop - start)
        return read(self, spec, start, stop)

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 512)
    monkeypatch.setattr(ChunkReader, "read", recorded)
    assert check(folder).ok
    assert max(sizes) == 512
    assert sum(sizes) >= 2 * 64 * 96  # all codes


def odd_rows(layout: str, version: str | None, columns: int = 13) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One module of 5 bits by channel in either layout, and its config."""
    codes = (torch.arange(4 * columns).reshape(4, columns) % 32 - 16).to(torch.int8)
    tensors = {
        "lin.weight_packed": word_aligned(codes, 5) if layout == "aligned" else pack_codes(codes, 5),
        "lin.weight_scale": torch.ones(4, 1),
        "lin.weight_shape": torch.tensor([4, columns]),
    }
    weights = {"num_bits": 5, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    config = {"config_groups": {"g": group}, "quantization_status": "compressed"}
    return tensors, config if version is None else config | {"version": version}


@pytest.mark.parametrize(
    ("layout", "version", "columns", "quick", "code", "evidence"),
    [
        (
            "aligned",
            "0.17.1",
            13,
            False,
            "CF207",
            "version 0.17.1 wrote it, and the 2 upper bits of all words are empty",
        ),
        ("aligned", "0.17.1", 13, True, "CF207", "version 0.17.1 wrote it; only its words"),
        ("aligned", None, 13, False, "CF207", "the 2 upper bits of all words are empty"),
        ("aligned", "0.20.0", 64, False, "CF207", "its rows would have another number of words"),
        ("dense", "0.17.1", 13, False, "CF208", "bits are set that the other one leaves empty"),
        ("dense", "0.18.0", 13, False, "CF208", "version 0.18.0 wrote it"),
        ("dense", "0.17.1", 64, False, "CF208", "its rows would have another number of words"),
    ],
)
def test_which_layout_odd_widths_have_and_by_what_evidence(
    tmp_path: Path, layout: str, version: str | None, columns: int, quick: bool, code: str, evidence: str
) -> None:
    tensors, config = odd_rows(layout, version, columns)
    report = check(write_folder(tmp_path, tensors, config), quick=quick)
    assert [finding.code for finding in report.findings if finding.code != "CF107"] == [code]
    (finding,) = (finding for finding in report.findings if finding.code == code)
    assert evidence in finding.message


def test_a_layout_that_only_values_tell_is_not_guessed(tmp_path: Path) -> None:
    tensors, config = odd_rows("aligned", None)
    assert [finding.code for finding in check(write_folder(tmp_path, tensors, config), quick=True).findings] == [
        "CF107"
    ]


@pytest.mark.parametrize(("layout", "first_unused"), [("aligned", 5), ("dense", 1)])
def test_padding_behind_the_last_code(tmp_path: Path, layout: str, first_unused: int) -> None:
    """13 codes of 5 bits: 6, 6 and 1 of them in three words, or 65 bits."""
    tensors, config = odd_rows(layout, "0.17.1" if layout == "aligned" else "0.20.0")
    for bit, expected in ((first_unused - 1, []), (first_unused, ["CF305"])):
        changed = tensors["lin.weight_packed"].clone()
        changed[2, 2] ^= 1 << bit
        write_folder(tmp_path, tensors | {"lin.weight_packed": changed}, config)
        assert [code for code, _ in found(tmp_path) if code != "CF207"] == expected


def test_padding_of_zero_points(tmp_path: Path) -> None:
    """Six zero points of 4 bits fill three quarters of a word."""
    config = {"weights": {"num_bits": 4, "group_size": 8, "symmetric": False}}
    weights = QuantizationArgs(**config["weights"])
    tensors = FORMATS[CompressionFormat.PACK_QUANTIZED].encode(quantize(torch.randn(6, 16), weights), weights)
    named = {f"lin.{suffix}": tensor for suffix, tensor in tensors.items()}
    group = {"targets": ["Linear"], **config, "format": "pack-quantized"}
    whole = {"config_groups": {"g": group}, "quantization_status": "compressed", "version": "0.20.0"}
    assert found(write_folder(tmp_path, named, whole)) == []
    for bit, expected in ((23, []), (24, [("CF305", "lin.weight_zero_point")])):
        changed = named["lin.weight_zero_point"].clone()
        changed[0, 1] ^= 1 << bit
        assert found(write_folder(tmp_path, named | {"lin.weight_zero_point": changed}, whole)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 1] * 8, []), ([-1] * 16, []), ([0, 1] * 7 + [0, 2], ["CF309"]), ([0, 1] * 7 + [0, -2], ["CF309"]),
     ([0, 1] * 7 + [0, -1], ["CF309"])],
)  # fmt: skip
def test_g_idx(tmp_path: Path, values: list[int], expected: list[str]) -> None:
    args = QuantizationArgs(num_bits=4, group_size=8)
    tensors = FORMATS[CompressionFormat.PACK_QUANTIZED].encode(quantize(torch.randn(8, 16), args), args)
    tensors["weight_g_idx"] = torch.tensor(values, dtype=torch.int32)
    weights = {"num_bits": 4, "group_size": 8, "strategy": "group", "actorder": "group"}
    whole = {
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
        "quantization_status": "compressed", "version": "0.18.0",
    }  # fmt: skip
    write_folder(tmp_path, {f"lin.{suffix}": tensor for suffix, tensor in tensors.items()}, whole)
    assert [code for code, _ in found(tmp_path)] == [*expected, "CF206"]


def test_row_offsets_and_bits_of_sparse_bitmask(tmp_path: Path) -> None:
    weight = torch.randn(9, 20) * (torch.rand(9, 20, generator=torch.Generator().manual_seed(0)) < 0.4)
    tensors = {f"lin.{suffix}": value for suffix, value in SparseBitmask().encode(weight).items()}
    config = {
        "sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"], "sparsity_structure": "unstructured"},
        "quant_method": "compressed-tensors", "version": "0.14.0",
    }  # fmt: skip
    assert found(write_folder(tmp_path, tensors, config)) == []
    for name, index, value, place in (
        ("row_offsets", 4, 0, "lin.row_offsets"),
        ("row_offsets", 8, -1, "lin.row_offsets"),
        ("bitmask", (5, 2), 0b00010000, "lin.bitmask"),
    ):
        changed = tensors[f"lin.{name}"].clone()
        changed[index] = value
        write_folder(tmp_path, tensors | {f"lin.{name}": changed}, config)
        assert ("CF307", place) in found(tmp_path)
        assert {code for code, _ in found(tmp_path)} == {"CF307"}
    shorter = tensors | {"lin.compressed": tensors["lin.compressed"][:-1]}
    assert found(write_folder(tmp_path, shorter, config)) == [("CF307", "lin.bitmask")]


def test_metadata_of_marlin_24(tmp_path: Path) -> None:
    case = golden_cases("v0.14.0.1_legacy")["marlin24_4_group_64x256"]
    tensors = {f"lin.{suffix}": tensor for suffix, tensor in golden_tensors(case).items()}
    weights = {"num_bits": 4, "group_size": 128, "strategy": "group"}
    config = {
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights, "format": "marlin-24"}},
        "format": "marlin-24", "quantization_status": "compressed", "version": "0.14.0.1",
    }  # fmt: skip
    assert found(write_folder(tmp_path, tensors, config)) == []
    tensors["lin.meta"][3, 7] = 0
    (finding,) = check(write_folder(tmp_path, tensors, config)).errors
    assert (finding.code, finding.place) == ("CF310", "lin.meta")
    assert "at index [3, 7]" in finding.message


def test_one_damaged_module_does_not_hide_the_others(tmp_path: Path) -> None:
    save(tmp_path / "m", "int4 asymmetric")
    for damage in (
        drop(f"{UP}.weight_packed"),
        put(f"{DOWN}.weight_scale", (0, 0), NAN),
        say(quantization_status=None),
    ):
        damage(tmp_path / "m")
    codes = [code for code, _ in found(tmp_path / "m")]
    assert sorted(codes) == ["CF101", "CF105"]  # a status of null cannot be read
    say(quantization_status="frozen")(tmp_path / "m")
    assert sorted(code for code, _ in found(tmp_path / "m")) == ["CF105", "CF201", "CF301"]
