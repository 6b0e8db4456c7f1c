"""What an import brings along, each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FOREIGN = {"accelerate", "compressed_tensors", "diffusers", "pandas", "torch._dynamo", "tqdm.auto", "transformers"}


def modules_after(program: str) -> set[str]:
    """The modules that a fresh interpreter holds after a program; it must print nothing and warn of nothing."""
    ending = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", program + ending]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    return set(json.loads(line))


CHECK_CONFIG = """
from compressed_format.config import PRESETS, QuantizationConfig, json_schema, resolve_targets
from compressed_format.errors import ConfigError
config = QuantizationConfig.preset("W4A16")
resolve_targets({"model.layers.0.mlp.up_proj": "Linear", "lm_head": "Linear"}, config)
QuantizationConfig.from_checkpoint({"quantization_config": config.to_dict()})
hash(config), json_schema()
try:
    QuantizationConfig.from_dict({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 99}}}})
except ConfigError as error:
    assert "num_bits" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize(
    "program",
    [
        "import compressed_format",
        "import compressed_format.config",
        "import compressed_format.errors, compressed_format.dtypes",
        "from compressed_format import QuantizationConfig, QuantizationScheme, resolve_targets, ConfigError, Problem",
        "import compressed_format; compressed_format.__version__, dir(compressed_format)",
        CHECK_CONFIG,
    ],
)
def test_configs_need_no_torch(program: str) -> None:
    loaded = modules_after(program)
    assert not loaded & {"torch", "numpy", "safetensors", *FOREIGN}


def test_the_package_alone_needs_nothing() -> None:
    """Names are found when they are first used, so that the bare import costs nothing."""
    loaded = modules_after("import compressed_format")
    own = {name for name in loaded if name.startswith("compressed_format") and name != "compressed_format"}
    assert own == set()
    assert "pydantic" not in loaded


def test_all_names_need_nothing_foreign() -> None:
    everything = "import compressed_format\nfor name in compressed_format.__all__: getattr(compressed_format, name)"
    loaded = modules_after(everything)
    assert "torch" in loaded
    assert not loaded & FOREIGN
    assert "compressed_format.integrations.transformers" not in loaded
    assert not loaded & {"matplotlib", "scipy", "sklearn", "IPython"}


def test_compressing_and_saving_needs_nothing_foreign() -> None:
    program = """
import tempfile, torch
from compressed_format import compress, decompress, load_compressed, save_compressed
config = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}}
model = compress(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
model(torch.zeros(1, 8))
with tempfile.TemporaryDirectory() as folder:
    save_compressed(model, folder + "/model")
    load_compressed(folder + "/model", model=torch.nn.Sequential(torch.nn.Linear(8, 8)))
decompress(model)
"""
    loaded = modules_after(program)
    assert not loaded & {"transformers", "pandas", "accelerate", "compressed_tensors"}
