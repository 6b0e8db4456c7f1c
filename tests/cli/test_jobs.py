"""``compress`` and ``decompress``: what they leave, say, and how they end; and that Ctrl-C loses nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format.checkpoint import read_checkpoint, write_checkpoint
from compressed_format.config import QuantizationConfig
from compressed_format.streaming import compress_checkpoint
from tests.cli.checkpoints import W4A16, content, dense_tensors, write_model

Run = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "w4a16.json"
    path.write_text(json.dumps(W4A16))
    return path


def test_there_and_back(model: Path, config: Path, tmp_path: Path, run: Run) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    ended = run("compress", model, packed, "--config", config, "--ignore", "re:.*down_proj", "--workers", "1")
    assert ended.code == 0
    assert ended.out.startswith(f"{packed}: compressed, ")
    assert ended.out.count("\n") == 1
    assert " % of 1.1 MB, in " in ended.out
    first, *_, last = ended.err.splitlines()
    assert first.startswith(f"{packed}: ")
    assert " done in " in last
    by_hand = tmp_path / "by hand"
    settings = QuantizationConfig.from_dict({**W4A16, "ignore": ["lm_head", "re:.*down_proj"]})
    compress_checkpoint(model, by_hand, settings)
    assert content(packed) == content(by_hand)
    assert "model.layers.1.mlp.down_proj" in QuantizationConfig.from_checkpoint(packed)[0].ignore
    ended = run("decompress", packed, dense, "--quiet", "--dtype", "float32")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert read_checkpoint(dense).spec("model.layers.0.mlp.up_proj.weight").dtype == "float32"
    assert run("diff", "--dequantize", packed, dense).code == 1  # of other dtypes
    assert run("decompress", packed, dense, "--overwrite").code == 0
    assert run("diff", "--dequantize", packed, dense).code == 0


def test_a_preset_in_any_case_and_single_files(tmp_path: Path, run: Run) -> None:
    save_file(dense_tensors(), tmp_path / "model.safetensors")
    packed = tmp_path / "packed.safetensors"
    ended = run("compress", tmp_path / "model.safetensors", packed, "--config", "w8a16", "--ignore", "lm_head")
    assert ended.code == 0, ended.err
    assert "model.layers.0.mlp.up_proj.weight_packed" in read_checkpoint(packed)
    assert run("check", packed).code == 0


def test_mistakes_before_the_job(model: Path, config: Path, tmp_path: Path, run: Run) -> None:
    """Each ends with code 2, and nothing is written."""
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(W4A16).replace("group_size", "grup_size"))
    (tmp_path / "empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    for arguments, expected in (
        ((model, out, "--config", broken), "weights.grup_size: unknown key, did you mean group_size?"),
        ((model, out, "--config", "W4A17"), "did you mean W4A16?"),
        ((model, out, "--config", tmp_path / "no.json"), "no.json: cannot be read: No such file"),
        ((model, out, "--config", config, "--ignore", "re:("), "ignore"),
        ((tmp_path / "empty", out, "--config", config), "none of model.safetensors"),
        ((model, out, "--config", config, "--max-shard-size", "5 apples"), "'5 apples' is no size"),
        ((model, out, "--config", config, "--device", "abacus"), "'abacus' cannot be used"),
        (
            (model, model, "--config", config),
            "model: already holds something; choose another",
        ),
        ((model, out, "--config", "FP8"), "calibration"),
    ):
        ended = run("compress", *arguments)
        assert (ended.code, ended.out) == (2, ""), ended
        assert expected in ended.err
        assert "Traceback" not in ended.err
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    ended = run("decompress", model, out)
    assert (ended.code, ended.out) == (2, "")
    assert "is not compressed" in ended.err


def test_a_job_that_fails_once_it_has_begun(config: Path, tmp_path: Path, run: Run) -> None:
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    write_checkpoint(tmp_path / "model", tensors)
    ended = run("compress", tmp_path / "model", tmp_path / "out", "--config", config)
    assert ended.code == 1
    assert "error: model.layers.1.mlp.up_proj" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default::compressed_format.errors.CompressedFormatWarning")
def test_what_a_consumer_cannot_serve(model: Path, tmp_path: Path, run: Run) -> None:
    """It is refused by its rule's code before the job; the same job without --for is done."""
    for consumer, preset, code in (("llama.cpp", "W3A16", "CF703"), ("sglang", "W5A16", "CF504")):
        ended = run("compress", model, tmp_path / "out", "--config", preset, "--for", consumer)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("error: the result could not be served as asked:\n")
        assert f"({code})" in ended.err
        assert not (tmp_path / "out").exists()
        ended = run("compress", model, tmp_path / preset, "--config", preset, "--quiet")
        assert ended.code == 0
        assert re.search(rf"^warning: {consumer}: will not serve the result: .*\({code}\)", ended.err, re.MULTILINE)
        assert run("check", tmp_path / preset, "--for", consumer).code == 1
    ended = run("compress", model, tmp_path / "good", "--config", "W4A16", "--ignore", "lm_head", "--for", "vllm")
    assert ended.code == 0, ended.err


# Says when the first units are done, and then waits for the signal: in the very place where a job spends its time.
SLOW = """
import sys, time
from compressed_format.cli import progress
from compressed_format.cli.program import main
really = progress.Lines.__call__
def slowly(self, done, total):
    really(self, done, total)
    if 0 < done < total:
        print("some of it is done", file=sys.stderr, flush=True)
        time.sleep(60)
progress.Lines.__call__ = slowly
main(sys.argv[1:])
"""


def test_ctrl_c_and_the_same_command_again(config: Path, tmp_path: Path, run: Run) -> None:
    model = write_model(tmp_path / "model", layers=4, max_shard_size="600KB")  # no unit reads two files
    out = tmp_path / "out"
    command = ["compress", str(model), str(out), "--config", str(config), "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        while "some of it is done" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        told, printed = process.stderr.read(), process.stdout.read()
    assert process.returncode == 130
    assert printed == ""
    assert told == f"interrupted: {out}.partial keeps what is done, and the same command goes on from there\n"
    assert not out.exists()
    assert Path(f"{out}.partial.job").exists()
    ended = run("compress", str(model), str(out), "--config", "W8A16")
    assert ended.code == 2  # another job must not take its place
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert "of it done already" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "w4a16.json"]
    compress_checkpoint(model, tmp_path / "once", config)
    assert content(out) == content(tmp_path / "once")


def test_ctrl_c_with_nothing_to_go_on_from(
    model: Path, config: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compressed_format.streaming.compress_checkpoint", interrupt)
    ended = run("compress", model, tmp_path / "out", "--config", config)
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "interrupted: nothing of it is kept, and the same command starts anew\n"
