"""What an import brings along, each in a fresh interpreter; and that each part imports only from those before it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import compressed_format

PACKAGE = Path(compressed_format.__file__).parent
# The order of the parts, as in the README's map.
PARTS = (
    "errors", "dtypes", "threads", "config", "bitpack", "bitmask", "blocks", "scales", "activations", "ops",
    "quantization", "formats", "checkpoint", "reading", "modules", "calibrate", "renaming", "model_origin",
    "compression", "loading", "parallel", "save", "load", "takeover", "checking", "streaming", "inspection",
    "comparison", "integrations", "cli", "__main__",
)  # fmt: skip
# What only a model of another library needs, or one that is split: a function may import it when it is called.
ON_USE = {"integrations", "parallel"}
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
    assert not {
        name for name in loaded if name.startswith(("compressed_format.integrations", "compressed_format.parallel"))
    }
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


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of this package that a file imports, and whether it does so as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            # What is imported from a package may be a module of it.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("compressed_format."):
                yield name.removeprefix("compressed_format."), node not in later


def modules_of_the_package() -> dict[str, Path]:
    found = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in found.items() if parts != ("__init__",)}


def test_each_part_imports_only_from_those_before_it() -> None:
    wrong = []
    for module, path in modules_of_the_package().items():
        own = PARTS.index(module.partition(".")[0])
        for name, at_once in imports_of(path):
            part = name.partition(".")[0]
            if PARTS.index(part) > own and (at_once or part not in ON_USE):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    modules = modules_of_the_package()
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name for name, at_once in imports_of(path) if at_once]
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} - {module}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(modules)  # or it raises, naming the cycle
