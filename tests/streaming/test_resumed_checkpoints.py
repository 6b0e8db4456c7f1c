"""Jobs on checkpoints go on with the same source and config only, and leave nothing of themselves in the result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format import compress_checkpoint, decompress_checkpoint
from compressed_format.errors import CheckpointError
from compressed_format.streaming import job_builder
from tests.checkpoint.saves import content_of

pytestmark = pytest.mark.filterwarnings("ignore:.*will not serve the result")

CONFIG = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}}}


class StoppedError(Exception):
    pass


@pytest.fixture(autouse=True)
def a_unit_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_builder, "_UNIT_TASKS", 1)


def dense(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{layer}.up_proj.weight": torch.randn(8, 64, generator=generator) for layer in range(8)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"hidden_size": 64}')
    (folder / "tokenizer.json").write_text("{}")
    os.utime(folder / "model.safetensors", (1, 1))  # as archives have it that are the same whenever they are made
    return folder


def interrupted(job: Any, *args: Any) -> None:
    calls = 0

    def stop(*_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        job(*args, workers=1, progress=stop)


def test_another_source_of_the_same_size_and_time(tmp_path: Path) -> None:
    source, out = dense(tmp_path / "source"), tmp_path / "out"
    interrupted(compress_checkpoint, source, out, CONFIG)
    dense(source, seed=1)
    with pytest.raises(CheckpointError, match=r"belongs to another job[^$]*source\.model\.safetensors"):
        compress_checkpoint(source, out, CONFIG)
    dense(source)
    compress_checkpoint(source, out, CONFIG)
    compress_checkpoint(source, tmp_path / "whole", CONFIG)
    assert content_of(out) == content_of(tmp_path / "whole")


def test_another_config_beside_the_same_weights(tmp_path: Path) -> None:
    source, packed = dense(tmp_path / "source"), tmp_path / "packed"
    interrupted(compress_checkpoint, source, tmp_path / "out", CONFIG)
    (source / "config.json").write_text('{"hidden_size": 65}')
    with pytest.raises(CheckpointError, match=r"belongs to another job[^$]*source\.config\.json"):
        compress_checkpoint(source, tmp_path / "out", CONFIG)
    compress_checkpoint(source, packed, CONFIG)
    interrupted(decompress_checkpoint, packed, tmp_path / "back")
    content = json.loads((packed / "config.json").read_text())
    content["quantization_config"]["version"] = "0.11.0"
    (packed / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"belongs to another job[^$]*config\.version: was '0\.20\.0' there"):
        decompress_checkpoint(packed, tmp_path / "back")


def test_a_destination_inside_the_source(tmp_path: Path) -> None:
    source = dense(tmp_path / "source")
    compress_checkpoint(source, tmp_path / "whole", CONFIG)
    interrupted(compress_checkpoint, source, source / "other", CONFIG)  # and never finished
    interrupted(compress_checkpoint, source, source / "out", CONFIG)
    compress_checkpoint(source, source / "out", CONFIG)
    assert content_of(source / "out") == content_of(tmp_path / "whole")
