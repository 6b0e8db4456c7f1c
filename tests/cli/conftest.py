"""What the tests of the command line share: running it here, in a process of its own, and on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compressed_format.cli.program import main

COMMAND = (sys.executable, "-m", "compressed_format")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def run_apart() -> Callable[..., Ended]:
    """Run a command in a process of its own, with its output in pipes; keyword arguments are for the process."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None, **options: Any) -> Ended:
        environment = {**os.environ, "PYTHONWARNINGS": "default::UserWarning", **(env or {})}
        ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, **options)
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def run_on_terminal() -> Callable[..., tuple[int, str]]:
    """Run a command on a terminal of 100 columns; yields its code and all that the terminal got."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
        return _on_terminal([*COMMAND, *map(str, arguments)], env)

    return run


@pytest.fixture(scope="session")
def show() -> Callable[..., str]:
    """What a terminal of 100 columns gets from a program in Python."""

    def show(program: str, env: dict[str, str] | None = None) -> str:
        code, shown = _on_terminal([sys.executable, "-c", program], env)
        assert code == 0, shown
        return shown

    return show


def _on_terminal(command: list[str], env: dict[str, str] | None) -> tuple[int, str]:
    mine, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color", **(env or {})}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        shown = b""
        while True:
            try:
                piece = os.read(mine, 65536)
            except OSError:  # how Linux says that the other side is gone
                break
            if not piece:
                break
            shown += piece
    os.close(mine)
    return process.returncode, shown.decode().replace("\r\n", "\n")
