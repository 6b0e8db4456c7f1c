"""One hostile checkpoint: what is done to a good one, and who must refuse it with which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONFIG", "EVERYWHERE", "FILES", "SCALES", "VALUES", "Case"]

FILES = ("reader", "open", "load", "fill", "check", "decompress", "compress")
"""The entry points that read files of tensors."""
CONFIG = ("config", "load", "fill", "check", "decompress")
"""Those that read the config of a compressed model."""
VALUES = ("fill", "check")
"""Those that look at everything that native code relies on before it is used."""
SCALES = ("run", "check")
"""Those that look at the values of scales before anything is computed with them."""
EVERYWHERE = ("config", *FILES)


@dataclass(frozen=True)
class Case:
    """``spoil`` makes a copy of the checkpoint ``base`` hostile. Each entry point in ``refused_by`` must then raise an
    error of this library that holds ``words``; each in ``loads_with`` must work; and all stay within the limits."""

    name: str
    spoil: Callable[[Path], None]
    words: str = ""
    refused_by: tuple[str, ...] = FILES
    loads_with: tuple[str, ...] = ()
    base: str = "llama"
