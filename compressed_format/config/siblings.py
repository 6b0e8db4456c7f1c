"""Modules that other software joins into one, and that therefore have to be compressed alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from compressed_format.config.modules import NamedModule
from compressed_format.errors import Problem

__all__ = ["FUSED", "Outcome", "check_siblings"]

FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""The last parts of the names of modules under one parent that servers fuse."""

_FAMILY = {leaf: family for family in FUSED for leaf in family}


@dataclass(frozen=True)
class Outcome:
    """What becomes of one module: ``likeness`` is equal where modules are compressed alike."""

    likeness: Hashable
    label: str


def check_siblings(modules: Iterable[NamedModule], outcomes: Mapping[str, Outcome]) -> list[Problem]:
    """One problem for each way in which siblings differ, at the first parent where they do."""
    families: dict[tuple[str, tuple[str, ...]], dict[str, Outcome]] = {}
    for module in modules:
        parent, _, leaf = module.name.rpartition(".")
        if leaf in _FAMILY and module.name in outcomes:
            families.setdefault((parent, _FAMILY[leaf]), {})[leaf] = outcomes[module.name]
    found: dict[str, list[str]] = {}
    for (parent, _), members in families.items():
        if len(set(map(id, members.values()))) > 1 and len({outcome.likeness for outcome in members.values()}) > 1:
            how = ", ".join(f"{leaf} {outcome.label}" for leaf, outcome in members.items())
            found.setdefault(how, []).append(parent)
    return [
        Problem(
            parents[0],
            f"{how}; servers fuse these modules and need them compressed alike{_and_others(len(parents) - 1)}",
        )
        for how, parents in found.items()
    ]


def _and_others(count: int) -> str:
    return f" (the same in {count} more)" if count else ""
