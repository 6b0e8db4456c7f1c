"""What is known of a checkpoint's architecture, where somebody knows it; see ``integrations.architecture``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressed_format.config.experts import ExpertStack

__all__ = ["Architecture", "ExpertLayout"]


@dataclass(frozen=True)
class ExpertLayout:
    """How a module holds the weights of its experts; ``called`` has the checkpoint's name of each projection."""

    stack: ExpertStack
    transposed: bool
    interleaved: bool
    called: Mapping[str, str]


@dataclass(frozen=True)
class Architecture:
    """A model as its checkpoint's names tell it.

    ``classes`` has the class of each module and its bases, most derived first; ``names`` what each is called in the
    model. ``tied`` has, for each module without a tensor of its own, the one whose weight it shares; ``missing`` are
    those that should have one. ``stacks`` are the modules that hold experts, and ``stacked_in_files`` the names in the
    model of those whose uncompressed weights transformers reads from stacked tensors only.
    """

    classes: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]
    stacks: Mapping[str, ExpertLayout]
    tied: Mapping[str, str]
    missing: tuple[str, ...]
    stacked_in_files: tuple[str, ...]
