"""Ctrl-C, handled between two steps instead of within one.

Python calls the handler of a signal between any two instructions of the main thread. The usual one raises there, and
if that is just where a lock of the standard library's was taken, no one gives it back: entering a
``threading.Condition``, as every method of a future does, is not safe from it. A thread that then waits for the lock
waits forever, and so does who waits for the thread.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["held_interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts(wake: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Hold back SIGINT and SIGTERM until what this yields is called, which hands them to the handlers there were.

    ``wake`` is called as one arrives, between any two instructions, to end a wait; it may not take a lock that the
    caller may hold. What is held at the end is handed over then. Only handlers written in Python are held back, and
    only in the main thread, which alone runs them.
    """
    arrived: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))
        wake()

    before: dict[int, Any] = {}

    def hand_over() -> None:
        while arrived:
            number, frame = arrived.pop(0)
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, hold)
    try:
        yield hand_over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        hand_over()
