"""What tests of the integrations share: one thread, because their models are too small for more to help."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from compressed_format import enable_transformers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def enabled() -> Iterator[None]:
    with enable_transformers():
        yield
