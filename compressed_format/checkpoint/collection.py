"""Python's garbage collector, kept from running while very many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collection_paused"]


@contextmanager
def collection_paused() -> Iterator[None]:
    """Within the context, or the function that this decorates, no cycles are looked for.

    The collector runs whenever some hundred objects were made and not freed, and each time goes through part of what
    there is, at last through all objects of the process. Reading headers and building modules makes tens of objects
    for each tensor, all of which stay, so that nothing is ever found: it only takes time, the more, the more has been
    imported. What is made within is bounded by the headers, of whose size there is a limit. Afterwards the collector
    runs as before, whatever was raised.
    """
    if not gc.isenabled():  # by the caller, or by another thread in here, which will start it again
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
