"""Files that are right have no findings worse than a note: those of compressed-tensors, golden ones, and those of
save_compressed for models of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressed_format import QuantizationConfig, check, compress, save_compressed
from tests.checking.checkpoints import found
from tests.checks import GOLDEN
from tests.integrations.every_model import FORMATS, KINDS
from tests.integrations.peer import compress_with_peer
from tests.models import recorded_warnings, tiny_llama, weights

CURRENT = sorted(path.name for path in (GOLDEN / "v0.20.0").iterdir() if path.is_dir())
# Their config names none of the groups that the tensors have.
WITHOUT_CONFIG = {"marlin24_4_channel_64x256", "marlin24_4_group_64x256", "sparse24_bf16", "sparse_bitmask_bfloat16",
                  "sparse_bitmask_float32", "sparse_bitmask_fp8"}  # fmt: skip


@pytest.mark.parametrize("quick", [False, True])
def test_golden_files(quick: bool) -> None:
    assert [found(GOLDEN / "v0.20.0" / name, quick=quick) for name in CURRENT] == [[]] * len(CURRENT)
    for directory, expected in (("v0.17.1_wordaligned", "CF207"), ("v0.13.0_mxfp4bug", "CF211")):
        for path in (GOLDEN / directory).iterdir():
            if path.is_dir():
                assert [code for code, _ in found(path, quick=quick)] == [expected], path
    for path in (GOLDEN / "v0.14.0.1_legacy").iterdir():
        if path.is_dir():
            expected_codes = ["CF103"] if path.name in WITHOUT_CONFIG else ["CF206"] if "gidx" in path.name else []
            assert [code for code, _ in found(path, quick=quick)] == expected_codes, path


PEER: dict[str, dict[str, Any]] = {
    "int4": weights(4, "Linear", ignore=("lm_head",), strategy="group", group_size=32),
    "int4 asymmetric": weights(4, "Linear", ignore=("lm_head",), strategy="group", group_size=32, symmetric=False),
    "int3": weights(3, "Linear", ignore=("lm_head",), strategy="channel"),
    "int8 by patterns": weights(8, "re:.*mlp.*proj$", strategy="channel"),
    "float8 blocks": weights(
        8, "Linear", ignore=("lm_head",), type="float", strategy="block", block_structure=[64, 64]
    ),
}


@pytest.mark.parametrize("name", PEER)
@pytest.mark.parametrize("tied", [False, True])
def test_files_of_compressed_tensors(tmp_path: Path, name: str, tied: bool) -> None:
    compress_with_peer(tiny_llama(tie_word_embeddings=tied), PEER[name], tmp_path)
    report = check(tmp_path)
    assert (*report.errors, *report.warnings) == ()


@pytest.mark.parametrize("preset", ["W8A8", "FP8", "FP8_DYNAMIC"])
def test_files_of_compressed_tensors_with_rounded_inputs(tmp_path: Path, preset: str) -> None:
    config = QuantizationConfig.preset(preset).replace(ignore=("lm_head",)).to_dict()
    compress_with_peer(tiny_llama(), config, tmp_path)
    assert found(tmp_path) == []


# Where names, ties, routers and towers differ.
MODELS = ("Llama, tied, embedding and head quantized", "Mixtral", "DeepSeek-V3", "GPT-OSS", "Llava", "Qwen2.5-VL", "T5",
          "Whisper", "BERT")  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model(tmp_path: Path, kind: str) -> None:
    model = compress(KINDS[kind].build(), FORMATS["W4A16"].config(KINDS[kind]))
    with recorded_warnings():
        save_compressed(model, tmp_path / "m")
    assert found(tmp_path / "m") == []
    assert found(tmp_path / "m", quick=True) == []
