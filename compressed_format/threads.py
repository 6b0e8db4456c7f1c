"""Threads that work side by side, each of which keeps torch's operations to itself."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["MOST_WORKERS", "cores", "on_all_cores", "use_one_thread"]

MOST_WORKERS = 16
"""More do not make a disk faster, and each holds memory."""

_T = TypeVar("_T")
_R = TypeVar("_R")

_thread = threading.local()
_settings = threading.Lock()


def on_all_cores(call: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """What ``call`` makes of each of ``items``, in their order, of which as many are worked on at once as there are
    cores. Raises the error of the first one that fails; whoever stops early leaves the rest undone."""
    pool = ThreadPoolExecutor(min(cores(), MOST_WORKERS), "core", use_one_thread)
    try:
        yield from pool.map(call, items)
    finally:
        pool.shutdown(cancel_futures=True)


def use_one_thread() -> None:
    """Let torch's operations use this thread alone, should torch be in use at all.

    torch keeps a number for the process, which each thread takes over when it first needs it, and sets both at once.
    The process's is therefore set back at once, by a thread that no one else uses.
    """
    if "torch" not in sys.modules or getattr(_thread, "is_set", False):
        return
    import torch

    with _settings:
        process: list[int] = []
        _on_a_new_thread(lambda: process.append(torch.get_num_threads()))
        torch.get_num_threads()  # takes over the process's number now, and not after this one is set
        torch.set_num_threads(1)
        _on_a_new_thread(lambda: torch.set_num_threads(process[0]))
    _thread.is_set = True


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # pragma: no cover


def _on_a_new_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
