"""The garbage collector stands still while objects that stay are made, and goes on afterwards, come what may."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from compressed_format.checkpoint.collection import collection_paused


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_it_goes_on_after_an_error_and_after_each_call() -> None:
    @collection_paused()
    def fail() -> None:
        assert not gc.isenabled()
        raise ValueError("inside")

    for _ in range(2):
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert gc.isenabled()


def test_who_was_inside_first_starts_it_again() -> None:
    with collection_paused():
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()
