"""compressed-tensors 0.20 through transformers: its checkpoints load here, ours load there, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compressed_tensors
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as PeerConfig
from transformers import AutoModelForCausalLM

from compressed_format import QuantizationConfig, load_compressed, save_compressed
from tests.checks import assert_same_tensors
from tests.integrations.peer import compress_with_peer
from tests.models import LLAMA_CONFIGS, compressed_llama, logits, read_config, read_tensors, tiny_llama

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

SCHEMES = pytest.mark.parametrize("config", LLAMA_CONFIGS.values(), ids=LLAMA_CONFIGS.keys())


def assert_close_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@SCHEMES
def test_ours_loads_with_the_peer(config: QuantizationConfig, tmp_path: Path) -> None:
    save_compressed(compressed_llama(config), tmp_path / "ours")
    ours = load_compressed(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype is torch.float32
    assert_close_logits(logits(theirs), logits(ours))


@SCHEMES
def test_theirs_loads_here(config: QuantizationConfig, tmp_path: Path) -> None:
    compress_with_peer(tiny_llama(), config.to_dict(), tmp_path / "theirs")
    ours = load_compressed(tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_close_logits(logits(ours), logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SCHEMES
def test_both_write_the_same(config: QuantizationConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same bytes in the tensors, and configs that mean the same to the peer."""
    compress_with_peer(tiny_llama(dtype), config.to_dict(), tmp_path / "theirs")
    save_compressed(compressed_llama(config, dtype), tmp_path / "ours")
    assert_same_tensors(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    ours, theirs = (read_config(tmp_path / name)["quantization_config"] for name in ("ours", "theirs"))
    assert meaning(PeerConfig.model_validate(ours)) == meaning(PeerConfig.model_validate(theirs))
    assert ours["version"] == theirs["version"] == compressed_tensors.__version__
    assert ours.keys() == theirs.keys()


def meaning(config: PeerConfig) -> dict[str, Any]:
    """What a config says, but for the names and the order of its groups."""
    content = config.model_dump()
    groups = content.pop("config_groups").values()
    return content | {"groups": sorted(groups, key=lambda group: group["targets"])}
