"""What is alike in many modules is compared once, and what is not alike is still found."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from compressed_format.config import QuantizationConfig, resolve_targets
from compressed_format.loading import fitting
from compressed_format.loading.fitting import FitTable


@dataclass(frozen=True)
class Stored:
    dtype: str
    shape: tuple[int, ...]


FITTING = {
    "weight_packed": Stored("int32", (8, 16)),
    "weight_scale": Stored("bfloat16", (8, 1)),
    "weight_shape": Stored("int64", (2,)),
}
NAMES = [f"layers.{number}.up_proj" for number in range(6)]
RESOLUTION = resolve_targets(NAMES, QuantizationConfig.preset("W4A16"))
SHAPE = (8, 128)


def test_modules_alike_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = fitting._fit_module
    monkeypatch.setattr(fitting, "_fit_module", lambda *args: (compared.append(args[0]), compare(*args))[1])
    table = FitTable()
    for name in NAMES:
        stored = dict(FITTING)
        fit = table.fit(name, RESOLUTION.assignments[name], stored, SHAPE, 8)
        assert not fit.problems
        assert all(fit.tensors[suffix] is tensor for suffix, tensor in stored.items())
    assert compared == NAMES[:1]


@pytest.mark.parametrize(
    ("suffix", "other", "message"),
    [
        ("weight_packed", Stored("int32", (8, 15)), "has shape [8, 15], expected [8, 16]"),
        ("weight_scale", Stored("int8", (8, 1)), "has dtype int8, expected float16"),
        ("weight_shape", None, "is missing from the checkpoint"),
    ],
)
def test_each_module_that_differs_is_named(suffix: str, other: Stored | None, message: str) -> None:
    table = FitTable()
    for number, name in enumerate(NAMES):
        stored = {found: replace(tensor) for found, tensor in FITTING.items()}
        if number % 2:
            stored.pop(suffix)
            stored |= {} if other is None else {suffix: other}
        fit = table.fit(name, RESOLUTION.assignments[name], stored, SHAPE, 8)
        assert [problem.place for problem in fit.problems] == ([f"{name}.{suffix}"] if number % 2 else [])
        assert all(problem.message.startswith(message) for problem in fit.problems)


def test_the_shape_of_the_weight_counts() -> None:
    table = FitTable()
    first, second = (RESOLUTION.assignments[name] for name in NAMES[:2])
    assert not table.fit(NAMES[0], first, FITTING, SHAPE, 8).problems
    assert table.fit(NAMES[1], second, FITTING, (8, 256), 8).problems
