"""The tables for a terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from compressed_format.inspection import Inspection
from compressed_format.inspection.quantities import in_bytes, in_decibels, in_words
from compressed_format.inspection.table import render_table
from tests.inspection.inspections import HOSTILE, an_inspection


def shown(inspection: Inspection, width: int = 200) -> str:
    console = Console(width=width, color_system=None, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(render_table(inspection))
    return capture.get()


def test_schemes_sizes_and_errors_are_shown() -> None:
    text = shown(an_inspection(experts=3))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "int4 group 64 symmetric pack-quantized 16 35.2 kB 4.30 linear: reference" in lines
    assert "model.layers.*.input_layernorm.weight bfloat16 64 4 512 B" in lines
    assert any(line.startswith("model.layers.0.mlp.experts.*.up_proj (3) ") for line in lines)
    lowest = lines[lines.index("Lowest signal to noise of 12 modules") :]
    assert lowest[4].startswith("model.layers.0.self_attn.q_proj 4.30 18.0 dB 13.0 dB in 3 0.25")


def test_without_a_reference_nothing_is_said_of_errors() -> None:
    text = shown(an_inspection(errors=False))
    assert "dB" not in text
    assert "signal" not in text.lower()


def test_names_cannot_reach_the_terminal() -> None:
    """Neither markup of rich, nor escape sequences, nor half a surrogate pair, which no stream can write."""
    text = shown(an_inspection(names=(*HOSTILE, "[red]fc[/red]", "[/]")))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"a\u202eb\x1b[31m\ud800" in text
    assert "[red]fc[/red]" in text
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_950, "1.00 MB"), (113_098_656, "113 MB")],
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert in_bytes(count) == text


def test_other_quantities() -> None:
    assert in_words(134_515_008) == "135 million"
    assert [in_decibels(value) for value in (19.44, float("inf"), float("-inf"), float("nan"))] == [
        *("19.4 dB", "exact", "no signal", "not finite")
    ]
