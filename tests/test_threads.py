"""Work on all cores: in order, by threads that torch does not split further, and no more of it after an error."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from compressed_format import threads
from compressed_format.threads import on_all_cores


def test_results_come_in_the_order_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2)
    second_is_done = threading.Event()

    def call(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(10)  # so that both run at the same time
        else:
            second_is_done.set()
        return item * item

    assert list(on_all_cores(call, range(5))) == [0, 1, 4, 9, 16]


def test_operations_of_torch_keep_to_their_thread() -> None:
    before = torch.get_num_threads()
    assert set(on_all_cores(lambda _: torch.get_num_threads(), range(4))) == {1}
    assert torch.get_num_threads() == before


def test_nothing_is_begun_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 1)
    begun: list[int] = []

    def call(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ValueError("of the second")
        if item > 1:
            time.sleep(0.01)  # time in which the error is told
        return item

    with pytest.raises(ValueError, match="of the second"):
        list(on_all_cores(call, range(100)))
    assert len(begun) < 100
