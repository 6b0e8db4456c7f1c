"""What cannot be meant is refused before anything is written; so is a destination that would take the source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format import compress_checkpoint, decompress_checkpoint
from compressed_format.errors import CheckpointError, CheckpointExistsError, CompressedFormatError, QuantizationError
from compressed_format.streaming import compression_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*will not serve the result")

CONFIG = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}}
BITMASK = {"sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"], "sparsity_structure": "unstructured"}}


def dense(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"layers.0.up_proj.weight": torch.eye(8)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("options", "error", "place"),
    [
        ({"workers": 0}, CheckpointError, "workers: .* not 0"),
        ({"workers": "2"}, CheckpointError, "workers: .* not '2'"),
        ({"workers": True}, CheckpointError, "workers: .* not True"),
        ({"device": "meta"}, QuantizationError, "device: 'meta' .* holds no values"),
        ({"device": "nonsense"}, QuantizationError, "device: 'nonsense'"),
        ({"device": 5}, QuantizationError, "device: 5"),
        ({"max_shard_size": 0}, CheckpointError, "max_shard_size: 0"),
    ],
)
def test_options_that_cannot_be_meant(
    options: dict[str, Any], error: type[CompressedFormatError], place: str, tmp_path: Path
) -> None:
    source = dense(tmp_path / "source")
    compress_checkpoint(source, tmp_path / "packed", CONFIG)
    with pytest.raises(error, match=place):
        compress_checkpoint(source, tmp_path / "out", CONFIG, **options)
    with pytest.raises(error, match=place):
        decompress_checkpoint(tmp_path / "packed", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool, "nonsense"])
def test_dtypes_that_hold_no_weights(dtype: Any, tmp_path: Path) -> None:
    compress_checkpoint(dense(tmp_path / "source"), tmp_path / "packed", CONFIG)
    with pytest.raises(QuantizationError, match=r"dtype: .* holds no dense weights"):
        decompress_checkpoint(tmp_path / "packed", tmp_path / "out", dtype=dtype)


def test_a_destination_that_would_take_the_source_with_it(tmp_path: Path) -> None:
    source = dense(tmp_path / "all" / "source")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(source / "model.safetensors")
    before = {path: path.read_bytes() for path in source.iterdir()}
    for src, dst in (
        (source, tmp_path / "all"),
        (source, source / "model.safetensors"),
        (source / "model.safetensors", source),
        (linked, source),
    ):
        with pytest.raises(CheckpointError, match="holds the source, or part of it"):
            compress_checkpoint(src, dst, CONFIG, overwrite=True)
        assert {path: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("name", ["source", "source/model.safetensors"])
def test_a_checkpoint_may_take_its_own_place(name: str, tmp_path: Path) -> None:
    dense(tmp_path / "source")
    other = dense(tmp_path / "other" / "source").parent
    compress_checkpoint(tmp_path / name, tmp_path / name, CONFIG, overwrite=True)
    compress_checkpoint(other / name, tmp_path / "out.safetensors", CONFIG)
    written = (tmp_path / "source" / "model.safetensors").read_bytes()
    if name == "source":
        compress_checkpoint(other / "source", tmp_path / "out", CONFIG)
        assert written == (tmp_path / "out" / "model.safetensors").read_bytes()
    else:
        assert written == (tmp_path / "out.safetensors").read_bytes()


def test_an_occupied_destination_is_told_before_values_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> int:
        raise AssertionError("the source was read")

    monkeypatch.setattr(compression_plan.Count, "run", never)
    source, occupied = dense(tmp_path / "source"), dense(tmp_path / "occupied")
    with pytest.raises(CheckpointExistsError):
        compress_checkpoint(source, occupied, BITMASK)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, and one file"):
        compress_checkpoint(source, tmp_path / "folder.safetensors", BITMASK)


def test_an_executor_that_can_count_nothing(tmp_path: Path) -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(CheckpointError, match="ThreadPoolExecutor: could not look through the source: RuntimeError"):
        compress_checkpoint(dense(tmp_path / "source"), tmp_path / "out", BITMASK, executor=executor)
    assert not (tmp_path / "out.partial").exists()


def test_a_file_without_a_stem(tmp_path: Path) -> None:
    compress_checkpoint(dense(tmp_path / "source"), tmp_path / ".safetensors", CONFIG)
    assert (tmp_path / ".safetensors").is_file()
