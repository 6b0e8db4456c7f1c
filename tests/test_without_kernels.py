"""Kernels change how long things take: never a byte of a file, and outputs by no more than sums in another order do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import LLAMA_CONFIGS

ROOT = Path(__file__).parents[1]
WAYS = {
    "references": {"COMPRESSED_FORMAT_DISABLE_NATIVE": "1"},
    "portable": {"COMPRESSED_FORMAT_ISA": "portable"},
    "avx2": {"COMPRESSED_FORMAT_ISA": "avx2"},
    "best": {},
}
ROUNDED = {
    name for name, config in LLAMA_CONFIGS.items() if "input_activations" in config.model_dump_json(exclude_none=True)
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for way, variables in WAYS.items():
        found[way] = tmp_path_factory.mktemp(way)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COMPRESSED_FORMAT_")}
        command = (sys.executable, "-m", "tests.without_kernels", str(found[way]))
        subprocess.run(command, check=True, cwd=ROOT, env=kept | variables)
    return found


@pytest.mark.parametrize("way", [way for way in WAYS if way != "references"])
def test_the_same_files(folders: dict[str, Path], way: str) -> None:
    expected = {
        path.relative_to(folders["references"]): path.read_bytes()
        for path in folders["references"].rglob("*")
        if path.is_file() and path.name != "outputs.safetensors"
    }
    assert len(expected) >= 3 * len(LLAMA_CONFIGS)
    for path, content in expected.items():
        assert (folders[way] / path).read_bytes() == content, path


@pytest.mark.parametrize("way", [way for way in WAYS if way != "references"])
def test_outputs_that_are_near(folders: dict[str, Path], way: str) -> None:
    expected, found = (load_file(folders[name] / "outputs.safetensors") for name in ("references", way))
    assert ROUNDED < expected.keys() == found.keys()
    for name, output in expected.items():
        distance = ((found[name] - output).square().mean() / output.square().mean()).sqrt()
        # A code of an activation that is another one is a whole step, of which there are 127 or fewer.
        assert distance <= (0.02 if name in ROUNDED else 1e-5), name


def test_kernels_ran(folders: dict[str, Path]) -> None:
    """Else the tests above compare nothing with itself."""
    outputs = [load_file(folders[way] / "outputs.safetensors")["W4A16 group"] for way in ("references", "best")]
    assert not torch.equal(*outputs)
