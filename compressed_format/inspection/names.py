"""What the names of a checkpoint's modules say about their place: which layer, which part of it, which expert."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LayerName", "layer_name", "layer_order", "printable", "without_experts", "without_numbers"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])", re.ASCII)
_EXPERT = re.compile(r"(?<![^.])(experts?)\.\d+(?![^.])", re.ASCII)


@dataclass(frozen=True)
class LayerName:
    """Where a module is: in number ``index`` of a ``stack`` of layers, such as ``model.layers``, where it is ``part``.

    A module outside of any stack is a layer of its own: ``stack`` is its whole name, ``index`` None and ``part`` the
    last part of its name.
    """

    stack: str
    index: int | None
    part: str

    @property
    def layer(self) -> str:
        """The full name of the layer."""
        return self.stack if self.index is None else f"{self.stack}.{self.index}".lstrip(".")


def layer_name(module: str) -> LayerName:
    """The first number in a module's name is that of its layer; those behind it become ``*`` in the name of the part.

    >>> layer_name("model.layers.3.mlp.experts.17.up_proj")
    LayerName(stack='model.layers', index=3, part='mlp.experts.*.up_proj')
    """
    number = _NUMBER.search(module)
    if number is None or len(number.group()) > 9:
        return LayerName(module, None, module.rpartition(".")[2])
    part = without_numbers(module[number.end() + 1 :])
    return LayerName(module[: number.start()].rstrip("."), int(number.group()), part)


def layer_order(names: Iterable[LayerName]) -> list[LayerName]:
    """One name for each layer: stacks stay in the order in which they appear, the layers of one go by their number.

    Layers outside of stacks stay where they are; files put what is in front of the first stack anywhere, so whoever
    knows better must sort.
    """
    first: dict[str, LayerName] = {}
    place: dict[str, int] = {}
    for name in names:
        first.setdefault(name.layer, name)
        place.setdefault(name.stack, len(place))
    return sorted(first.values(), key=lambda name: (place[name.stack], name.index or 0))


def without_experts(module: str) -> str:
    """A module's name with ``*`` for the number of an expert, so that all experts of a layer share it."""
    return _EXPERT.sub(r"\1.*", module)


def without_numbers(module: str) -> str:
    """A module's name with ``*`` for each number in it."""
    return _NUMBER.sub("*", module)


def printable(text: str) -> str:
    """``text`` with everything escaped that would not show, or would change how its neighbours do.

    A file's names may hold control characters, half surrogate pairs and marks that turn the direction of reading.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
