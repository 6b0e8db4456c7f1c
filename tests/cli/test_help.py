"""Every example in --help of every command runs, and ends as it should."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from compressed_format.cli.program import COMMANDS, command_line
from compressed_format.config import QuantizationConfig
from compressed_format.streaming import compress_checkpoint
from tests.cli.checkpoints import W4A16, write_model

Run = Callable[..., Any]

# The examples whose answer is that something was found or differs.
FOUND = {"diff --dequantize my-model my-model-w4a16", "diff --json my-model-w4a16 my-model-fp8"}


def examples() -> list[str]:
    """All lines of --help that are a command, without the program's name."""
    context = click.Context(command_line, info_name="compressed-format", help_option_names=["-h", "--help"])
    found = []
    for name in COMMANDS:
        command = command_line.get_command(context, name)
        assert command is not None
        lines = command.get_help(click.Context(command, parent=context, info_name=name)).splitlines()
        of_command = [line.strip() for line in lines if line.strip().startswith(f"compressed-format {name} ")]
        of_command += [line.strip() for line in lines if line.strip() == f"compressed-format {name}"]
        assert of_command, name
        found += of_command
    found += [line.strip() for line in command_line.get_help(context).splitlines() if " my-model " in line]
    return [line.removeprefix("compressed-format ") for line in dict.fromkeys(found)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "w4a16.json").write_text(json.dumps(W4A16))
    model = write_model(folder / "my-model")
    shutil.copytree(model, folder / "my-copy")
    compress_checkpoint(model, folder / "my-model-w4a16", folder / "w4a16.json")
    compress_checkpoint(
        model, folder / "my-model-fp8", QuantizationConfig.preset("FP8_DYNAMIC").replace(ignore=("lm_head",))
    )
    shutil.copy(model / "model.safetensors", folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("example", examples())
def test_examples_run(example: str, prepared: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = example.partition(" > ")[0]
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "here"))
    if command.startswith("compress "):
        shutil.rmtree("my-model-w4a16")
        shutil.rmtree("my-model-fp8")
    ended = run(*shlex.split(command))
    assert ended.code == int(command in FOUND), ended
    assert "error" not in ended.err
    if "--json" in command:
        json.loads(ended.out)
    if "--html" in command:
        assert Path("report.html").read_text().startswith("<!")


def test_help_of_every_command_names_its_options(run: Run) -> None:
    for name in COMMANDS:
        ended = run(name, "--help")
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith(f"Usage: compressed-format {name} [OPTIONS]")
        assert run(name, "-h").out == ended.out
        assert max(map(len, ended.out.splitlines())) <= 110
