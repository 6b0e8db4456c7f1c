"""What importing the config costs, and what it names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import compressed_format.config

PACKAGE = Path(compressed_format.config.__file__).parent


def test_checking_a_config_imports_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"config_groups": {"W4A16": ["Linear"]}}')
    program = f"""
import sys
from compressed_format.config import QuantizationConfig, json_schema, resolve_targets
config = QuantizationConfig.from_file({str(path)!r})
resolve_targets(["a"], config)
QuantizationConfig.from_checkpoint(config.to_dict())
json_schema()
heavy = {{"torch", "numpy", "transformers", "safetensors", "compressed_tensors"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_all_names_are_there() -> None:
    names = compressed_format.config.__all__
    assert len(set(names)) == len(names)
    for name in names:
        thing = getattr(compressed_format.config, name)
        assert name.isupper() or thing.__module__.startswith("compressed_format.config.")


def test_only_what_is_declared_is_imported() -> None:
    allowed = {"compressed_format", "frozendict", "pydantic", "regex", "typing_extensions", *sys.stdlib_module_names}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                found = {node.module.split(".")[0]}
            else:
                continue
            assert found <= allowed, (path, found)
