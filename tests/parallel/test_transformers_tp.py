"""Tensor parallelism of transformers: each process reads its part of a packed checkpoint, and runs from it."""

from __future__ import annotations

import pytest

from tests.parallel.processes import checks_of, run_checks

CHECKS = "tests.parallel.transformers_checks"


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("check", checks_of(CHECKS))
def test_in_two_processes(check: str, failures: dict[str, str]) -> None:
    assert check not in failures, failures[check]
