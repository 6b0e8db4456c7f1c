"""What all tests share: how hypothesis behaves, which tests need a GPU, and a count of what is dequantized."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from hypothesis import settings

from compressed_format import ops
from tests.checks import use_exact_products

# Tests bound work, not time: the first call of an op or of the compiler may take seconds.
settings.register_profile("project", deadline=None, print_blob=True)
settings.load_profile("project")

# Whoever starts the tests in the background of a script has them and their children ignore Ctrl-C, which some send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of everything that ``ops.dequantize`` makes while a test runs."""
    made: list[torch.Size] = []
    really = ops.dequantize

    def counted(*args: Any) -> torch.Tensor:
        dense = really(*args)
        made.append(dense.shape)
        return dense

    monkeypatch.setattr(ops, "dequantize", counted)
    return made


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as the ops define them, for models that round their activations."""
    use_exact_products(monkeypatch)
