"""The whole: usage, errors, exit codes, warnings, completion, and what is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import tomllib

import compressed_format
from compressed_format.cli import configs
from compressed_format.cli.exit_codes import EXIT_CODES, ExitCode
from compressed_format.cli.program import COMMANDS, command_line
from compressed_format.errors import CheckpointError, Problem

Run = Callable[..., Any]


def test_the_table_of_commands_is_true(run: Run) -> None:
    """Its summaries are what --help of each command begins with."""
    shown = run("--help").out
    context = click.Context(command_line)
    for name, (_, summary) in COMMANDS.items():
        command = command_line.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert summary in " ".join(shown.split())
    for code in ExitCode:
        assert any(line.split()[:1] == [str(int(code))] for line in shown.splitlines())
    assert [code for code, _ in EXIT_CODES] == list(ExitCode)
    assert command_line.get_command(context, "../jobs") is None


def test_version_and_entry_point(run: Run) -> None:
    assert run("--version").out == f"compressed-format {compressed_format.__version__}\n"
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, function = pyproject["project"]["scripts"]["compressed-format"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing command"),
        (["comprss"], "no such command 'comprss'; did you mean compress?"),
        (["x"], "the commands are compress, decompress, "),
        (["--verison"], "--version"),
        (["presets", "--jsn"], "Did you mean"),
        (["presets", "more"], "unexpected extra argument"),
        (["check"], "Missing argument 'PATH'"),
        (["check", "/no/such/file"], "'/no/such/file' does not exist"),
        (["check", "--for", "vlm", "."], "'vlm' is not one of 'vllm'"),
        (["diff", "."], "Missing argument 'B'"),
        (["diff", ".", ".", "--limit", "-1"], "-1 is not in the range"),
        (["compress", ".", "out"], "Missing option '--config'"),
        (["compress", ".", "out", "--config", "W4A16", "--workers", "0"], "0 is not in the range"),
        (["compress", "/no", "out", "--config", "W4A16"], "'/no' does not exist"),
        (["decompress", ".", "out", "--dtype", "int8"], "'int8' is not one of"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], expected: str, run: Run) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("error: ")
    assert expected.lower() in ended.err.lower()
    assert "--help says more" in ended.err


def test_errors_of_the_library(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    ended = run("diff", tmp_path, tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert (
        ended.err
        == f"error: {tmp_path} cannot be read:\n  model.safetensors: ends before its header, or has an empty one\n"
    )
    for arguments in (("--debug", "diff"), ("diff", "--debug")):
        ended = run(*arguments, tmp_path, tmp_path)
        assert ended.code == 2
        assert "Traceback" in ended.err
        assert "in read_checkpoint" in ended.err
    assert "Traceback" not in run("diff", tmp_path, tmp_path).err


def test_errors_that_nobody_expected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(configs, "json_schema", fail)
    ended = run("schema")
    assert (ended.code, ended.err) == (2, "error: ZeroDivisionError: a b (--debug shows where)\n")
    assert "in fail" in run("schema", "--debug").err


def test_names_from_files_cannot_command_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise CheckpointError("one\ntwo", [Problem("\x1b[2J\x9b\udc80é", "x")])

    monkeypatch.setattr(configs, "json_schema", fail)
    assert run("schema").err == "error: one\ntwo\n  \\x1b[2J\\x9b\\udc80é: x\n"


def test_interrupted_anywhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(configs, "json_schema", interrupt)
    ended = run("schema")
    assert ended.code == 130
    assert ended.err.strip() == "interrupted"


@pytest.mark.parametrize("command", ["schema", "--help"])
def test_a_closed_pipe_is_quiet(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, "-m", "compressed_format", command]
    ended = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_output_that_cannot_be_written_and_none_at_all() -> None:
    command = f"{sys.executable} -m compressed_format presets"
    ended = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: OSError: [Errno 28] No space left on device (--debug shows where)\n"
    ended = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_warnings_are_one_line(run_apart: Run, tmp_path: Path) -> None:
    program = """
import sys, warnings
from compressed_format.cli import configs, program
from compressed_format.errors import CompressedFormatWarning
def warn():
    warnings.warn("first\\n  second \\x1b[0m", CompressedFormatWarning)
    return {}
configs.json_schema = warn
program.main(["schema"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "{}\n"
    assert ended.stderr == "warning: first second \\x1b[0m\n"


def test_an_ascii_terminal(run_apart: Run, tmp_path: Path) -> None:
    ended = run_apart("check", tmp_path / "nö", env={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 2
    assert "n\\xf6" in ended.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, run: Run) -> None:
    ended = run("completion", shell)
    assert ended.code == 0
    assert "compressed-format" in ended.out
    assert f"_COMPRESSED_FORMAT_COMPLETE={shell}_complete" in ended.out


def test_completion_in_bash(tmp_path: Path) -> None:
    """The words that a real bash offers."""
    program = tmp_path / "compressed-format"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m compressed_format "$@"\n')
    program.chmod(0o755)
    script = """
eval "$(compressed-format completion bash)"
offered() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _compressed_format_completion compressed-format; echo "${COMPREPLY[@]}"
}
offered compressed-format de
offered compressed-format presets --j
offered compressed-format check --for v
offered compressed-format compress a b --config fp8_
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.splitlines() == ["decompress", "--json", "vllm", "FP8_DYNAMIC FP8_BLOCK"]
    assert ended.stderr == ""
