"""FSDP2: packed parameters are sharded, gathered for each forward, and given back byte for byte."""

from __future__ import annotations

import pytest

from tests.parallel.processes import INTEGERS_CAN_BE_SHARDED, checks_of, run_checks

CHECKS = "tests.parallel.fully_shard_checks"

pytestmark = pytest.mark.skipif(not INTEGERS_CAN_BE_SHARDED, reason="fully_shard of integers needs torch 2.12")


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("check", checks_of(CHECKS))
def test_in_two_processes(check: str, failures: dict[str, str]) -> None:
    assert check not in failures, failures[check]
