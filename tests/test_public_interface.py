"""The names that users import: complete, sorted, found when they are first used."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import compressed_format
from compressed_format import errors

# The public interface. A name is added here on purpose, and never taken away without a word in the change log.
NAMES = {
    "CalibrationError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointLockedError",
    "CheckpointReader",
    "CompressedEmbedding",
    "CompressedExperts",
    "CompressedFormatError",
    "CompressedFormatWarning",
    "CompressedLinear",
    "ConfigError",
    "Difference",
    "Finding",
    "FormatError",
    "Inspection",
    "OpArgumentError",
    "Problem",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationError",
    "QuantizationScheme",
    "QuantizedWeight",
    "Report",
    "TargetError",
    "UnsupportedFormatError",
    "backend_info",
    "check",
    "compress",
    "compress_checkpoint",
    "decompress",
    "decompress_checkpoint",
    "dequantize",
    "diff_checkpoints",
    "disable_transformers",
    "enable_transformers",
    "inspect_checkpoint",
    "load_compressed",
    "open_checkpoint",
    "quantize",
    "resolve_targets",
    "save_compressed",
}


def test_all_is_sorted_and_complete() -> None:
    assert compressed_format.__all__ == sorted(NAMES)
    assert set(errors.__all__) <= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_found_and_says_what_it_is(name: str) -> None:
    value = getattr(compressed_format, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert getattr(compressed_format, name) is value
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING are those of the table by which names are found."""
    folders = [Path(folder) for folder in compressed_format.__path__]
    source = next(folder / "__init__.py" for folder in folders if (folder / "errors.py").is_file())
    block = next(node for node in ast.parse(source.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"compressed_format.{module}" for name, module in compressed_format._EXPORTS.items()}


def test_a_star_import_brings_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from compressed_format import *", namespace)
    assert namespace.keys() - {"__builtins__"} == NAMES


def test_functions_are_not_hidden_by_modules() -> None:
    """Importing a module binds its name in the package, which must not be the name of a function."""
    modules = sorted(set(compressed_format._EXPORTS.values()))
    imports = "\n".join(f"import compressed_format.{module}" for module in modules)
    names = ", ".join(sorted(NAMES))
    program = f"{imports}\nfrom compressed_format import {names}\nimport types\n"
    program += f"assert not [value for value in ({names}) if isinstance(value, types.ModuleType)]\n"
    program += "assert callable(compress) and callable(quantize) and callable(save_compressed)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"^module 'compressed_format' has no attribute 'decompose'$"):
        _ = compressed_format.decompose
    with pytest.raises(ImportError, match="cannot import name 'decompose'"):
        from compressed_format import decompose  # noqa: F401
    assert not hasattr(compressed_format, "_private")


def test_version() -> None:
    assert compressed_format.__version__ == version("compressed_format")
    assert compressed_format.__version__[0].isdigit()


def test_dir_lists_names_before_they_are_used() -> None:
    program = "import compressed_format; print(*dir(compressed_format))"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    listed = output.split()
    assert set(listed) >= NAMES | {"__version__", "__all__"}
    assert listed == sorted(listed)
