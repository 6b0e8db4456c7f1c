"""What all tests share: how hypothesis behaves, and that tests for a GPU are skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Tests bound work, not time: the first call of an op or of the compiler may take seconds.
settings.register_profile("project", deadline=None, print_blob=True)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
