"""``check`` and ``diff`` as commands: codes, text, JSON, and what they import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressed_format.checkpoint import write_checkpoint
from compressed_format.cli import tables
from compressed_format.streaming import compress_checkpoint
from tests.cli.checkpoints import W4A16, dense_tensors, write_model

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "w4a16.json"
    path.write_text(json.dumps(W4A16))
    return path


@pytest.fixture(scope="module")
def packed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    compress_checkpoint(write_model(folder / "dense"), folder / "packed", config)
    return folder / "packed"


def test_check_of_configs(config: Path, tmp_path: Path, run: Run) -> None:
    assert run("check", config).code == 0
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(W4A16).replace("group_size", "grup_size").replace('"num_bits": 4', '"num_bits": 9'))
    ended = run("check", broken)
    assert (ended.code, ended.err) == (1, "")
    *lines, summary = ended.out.splitlines()
    assert summary == f"{broken}: 2 errors"
    assert all(line.startswith("error CF") for line in lines)
    told = json.loads(run("check", "--json", broken).out)
    assert (told["exit_code"], told["errors"], len(told["findings"])) == (1, 2, 2)
    (tmp_path / "text.txt").write_bytes(b"\xff\x00")
    assert run("check", tmp_path / "text.txt").code == 2


def test_check_of_checkpoints(packed: Path, tmp_path: Path, run: Run) -> None:
    assert run("check", packed).code == 0
    ended = run("check", packed, "--for", "all", "--json")
    assert {finding["code"][:2] for finding in json.loads(ended.out)["findings"]} <= {"CF"}
    tensors = {**dense_tensors(), "x\x1b[2J.weight_packed": dense_tensors()["lm_head.weight"]}
    write_checkpoint(tmp_path / "odd", tensors, files={"config.json": packed / "config.json"})
    ended = run("check", tmp_path / "odd")
    assert ended.code == 1
    assert "\x1b" not in ended.out
    assert "x\\x1b[2J" in ended.out


def test_findings_have_colours_on_a_terminal_only(tmp_path: Path, run_on_terminal: Run, run_apart: Run) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    code, shown = run_on_terminal("check", path)
    assert code == 1
    assert shown.startswith("\x1b[31m\x1b[1merror\x1b[0m CF")
    plain = shown.replace("\x1b[31m\x1b[1m", "").replace("\x1b[0m", "")
    assert run_on_terminal("check", path, env={"NO_COLOR": "1"}) == (1, plain)
    ended = run_apart("check", path, env={"FORCE_COLOR": "1"})
    assert (ended.code, ended.out) == (1, plain)


def test_diff(packed: Path, tmp_path: Path, run: Run) -> None:
    dense = packed.parent / "dense"
    assert run("diff", dense, dense).out == "the same: 8 tensors, 8 of them the same bytes of the same file\n"
    changed = dense_tensors()
    changed["lm_head.weight"][3, 5] += 1
    changed["model.embed_tokens.weight"][0, 0] = float("nan")
    changed["model.layers.0.mlp.up_proj.weight"] = changed["model.layers.0.mlp.up_proj.weight"][:100].contiguous()
    changed["new\x1b[1m.weight"] = changed.pop("model.layers.1.input_layernorm.weight")
    write_checkpoint(tmp_path / "other", changed, files={"config.json": b'{"hidden_size": 128}'})
    ended = run("diff", dense, tmp_path / "other")
    assert (ended.code, ended.err) == (1, "")
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["model.layers.0.mlp.up_proj.weight", "bfloat16", "[512,", "256]", "bfloat16", "[100,", "256]"] in lines
    assert ["new\\x1b[1m.weight", "bfloat16", "[256]"] in lines
    assert ["hidden_size", "256", "128"] in lines
    (head,) = [line for line in lines if line[:1] == ["lm_head.weight"]]
    assert head[1:5] == ["1", "of", "16384", "1"]
    (embedding,) = [line for line in lines if line[:1] == ["model.embed_tokens.weight"]]
    assert embedding[1:] == ["1", "of", "16384", "1"]  # the last is the count of NaN, and nothing can be measured
    assert ended.out.endswith("the same: 4 tensors\n")
    told = json.loads(run("diff", "--json", dense, tmp_path / "other").out)
    assert (told["same"], told["same_tensors"], len(told["tensors"])) == (False, 4, 3)


def test_inspect_on_a_terminal_and_elsewhere(
    packed: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run("inspect", packed, "--reference", packed.parent / "dense")
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    assert not [line for line in ended.out.splitlines() if line != line.rstrip()]
    assert "pack-quantized" in ended.out
    assert "model.layers.1.mlp.down_proj" in ended.out
    with monkeypatch.context() as patch:
        patch.setattr(tables, "is_terminal", lambda _: True)  # without the seconds of a process that imports torch
        ended = run("inspect", packed)
    assert ended.code == 0
    assert "\x1b[" in ended.out
    told = json.loads(run("inspect", packed, "--json", "--html", tmp_path / "report.html").out)
    assert len(told["modules"]) == 4
    assert (tmp_path / "report.html").stat().st_size > 1000
    ended = run("inspect", packed, "--html", tmp_path / "no" / "report.html")
    assert ended.code == 2
    assert "report.html" in ended.err


def test_long_lists_are_cut(packed: Path, run: Run) -> None:
    dense = packed.parent / "dense"
    ended = run("diff", dense, packed, "--limit", "2")
    assert "… and 10 more (--limit 0 lists all)" in ended.out
    assert "more" not in run("diff", dense, packed, "--limit", "0").out
    ended = run("diff", dense, packed, "--dequantize")
    assert ended.code == 1
    rows = [line.split() for line in ended.out.splitlines() if "_proj.weight" in line]
    assert {row[0] for row in rows} == {
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("up", "down")
    }
    noise = [float(row[5]) for row in rows]
    assert noise == sorted(noise, reverse=True)  # the worst comes first
    assert ended.out.endswith("the same: 4 weights and other tensors\n")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"pydantic", "rich", "torch", "numpy"}),
        (["--version"], {"pydantic", "rich", "torch", "numpy"}),
        (["completion", "zsh"], {"pydantic", "rich", "torch", "numpy"}),
        (["schema"], {"rich", "torch", "numpy"}),
        (["presets"], {"rich", "torch", "numpy"}),
        (["check", "CONFIG"], {"rich", "torch", "numpy", "safetensors", "transformers"}),
        (["check", "--for", "all", "--json", "CONFIG"], {"rich", "torch", "numpy", "transformers"}),
        (["diff", "PACKED", "PACKED"], {"rich", "torch", "transformers"}),
        (["compress", "--help"], {"pydantic", "rich", "torch", "numpy"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_imported(arguments: list[str], heavy: set[str], config: Path, packed: Path) -> None:
    paths = {"CONFIG": str(config), "PACKED": str(packed)}
    program = f"""
import sys
from compressed_format.cli.program import main
try:
    main({[paths.get(argument, argument) for argument in arguments]!r})
except SystemExit as ended:
    assert not ended.code, ended.code
print(*sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == ""
