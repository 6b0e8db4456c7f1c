"""``schema`` and ``presets``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from compressed_format.cli.configs import NOT_SERVED
from compressed_format.config import PRESETS, CompressionFormat, QuantizationConfig, json_schema
from compressed_format.formats import FORMATS

Run = Callable[..., Any]


def test_schema(run: Run) -> None:
    assert json.loads(run("schema").out) == json_schema()


def test_presets(run: Run) -> None:
    told = json.loads(run("presets", "--json").out)
    assert list(told) == list(PRESETS)
    for name, config in told.items():
        assert QuantizationConfig.from_dict(config) == QuantizationConfig.preset(name)
    header, *rows = run("presets").out.splitlines()
    assert header.split() == ["preset", "weights", "inputs", "format"]
    assert [row.split()[0] for row in rows] == list(PRESETS)
    by_name = {row.split()[0]: row for row in rows}
    assert by_name["W4A16_ASYM"].split("  ")[1].strip() == "int4, group 128, asymmetric"
    assert by_name["FP8_BLOCK"].endswith(
        "float8, block 128 x 128      float8, group 128, dynamic       float-quantized"
    )
    columns = {row.index(PRESETS_FORMAT) for row in rows if (PRESETS_FORMAT := row.split("  ")[-1].strip())}
    assert len(columns) == 1
    assert by_name["NVFP4"].endswith("(not written yet)")


def test_which_formats_are_not_served() -> None:
    of_presets = {QuantizationConfig.preset(name).format for name in PRESETS}
    assert {CompressionFormat(name) for name in NOT_SERVED} == of_presets - FORMATS.keys()


def test_a_terminal_has_colours_and_a_pipe_has_none(run_on_terminal: Run, run_apart: Run) -> None:
    code, shown = run_on_terminal("presets")
    assert code == 0
    assert "\x1b[1m" in shown
    _, shown = run_on_terminal("presets", env={"TERM": "dumb"})
    assert "\x1b" not in shown
    ended = run_apart("presets", env={"FORCE_COLOR": "1", "COLUMNS": "20"})
    assert "\x1b" not in ended.out
    assert len(ended.out.splitlines()) == 1 + len(PRESETS)
