"""Configs of models whose modules have other names in the checkpoint than in memory.

transformers renames while it loads: ``language_model.lm_head`` of a file may be ``lm_head`` of the model. Targets and
ignore entries of a file speak of the file's names, and those of an author of either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from frozendict import frozendict

from compressed_format.config import QuantizationConfig, QuantizationScheme
from compressed_format.config.patterns import PatternTable, is_pattern

__all__ = ["module_names", "rename_modules"]


def module_names(tensor_names: Mapping[str, str]) -> dict[str, str]:
    """The new name of each module, out of the old and the new names of its tensors."""
    modules: dict[str, str] = {}
    for old, new in tensor_names.items():
        (module, _, suffix), (renamed, _, same) = old.rpartition("."), new.rpartition(".")
        if suffix == same:
            modules[module] = renamed
    return modules


def rename_modules(config: QuantizationConfig, names: Mapping[str, str], *, keep: bool) -> QuantizationConfig:
    """``config`` for a model in which each module goes by ``names[its old name]``.

    Entries that name a module, or whose pattern matches its old name and not the new one, also name it by the new
    one. With ``keep``, entries of the old naming stay beside the new ones; without, those that say nothing any more
    are left out. Classes mean the same in either naming. A module stays in the group that it is in by its old name; one
    that no target names by that, in the group that it is in by its new name.
    """
    if all(old == new for old, new in names.items()):
        return config
    changes: dict[str, object] = {
        "ignore": _renamed(config.ignore, names, keep=keep),
        "config_groups": _renamed_groups(config.config_groups, names, keep=keep),
    }
    sparsity = config.sparsity_config
    if sparsity is not None:
        fields = {field: _renamed(getattr(sparsity, field), names, keep=keep) for field in ("targets", "ignore")}
        changes["sparsity_config"] = sparsity.model_copy(update=fields)
    return config.model_copy(update=changes)


def _renamed_groups(
    groups: frozendict[str, QuantizationScheme], names: Mapping[str, str], *, keep: bool
) -> frozendict[str, QuantizationScheme]:
    # As targets are resolved: of two groups with the same target the later has it; exact names go before patterns,
    # and these in string order.
    owners = {target: group for group, scheme in groups.items() for target in scheme.targets}
    patterns = PatternTable(sorted(target for target in owners if is_pattern(target)))
    added: dict[str, list[str]] = {group: [] for group in groups}
    moved: set[str] = set()
    speaking: set[str] = set()  # patterns that match a new name, or the old name of no module
    for old, new in names.items():
        by_new = new if new in owners else patterns.first(new)
        winner = next((name for name in (old, new) if name in owners), None) or patterns.first(old) or by_new
        if winner is not None and (by_new is None or owners[winner] != owners[by_new]):
            added[owners[winner]].append(new)
            moved.add(new)
    for target in patterns.targets:
        old_ones = [old for old in names if patterns.matches(target, old)]
        if not old_ones or any(patterns.matches(target, new) for new in names.values()):
            speaking.add(target)

    def stays(target: str, group: str) -> bool:
        if target in moved and target not in added[group]:
            return False
        silent = target not in speaking if target in patterns.targets else names.get(target, target) != target
        return keep or not silent

    return type(groups)(
        {
            group: scheme.model_copy(
                update={
                    "targets": tuple(
                        dict.fromkeys([*(target for target in scheme.targets if stays(target, group)), *added[group]])
                    )
                }
            )
            for group, scheme in groups.items()
        }
    )


def _renamed(entries: Iterable[str], names: Mapping[str, str], *, keep: bool) -> tuple[str, ...]:
    renamed: dict[str, None] = {}
    for entry in entries:
        if is_pattern(entry):
            table = PatternTable([entry])
            matched = {name for name in {*names, *names.values()} if table.first(name) is not None}
            added = [new for old, new in names.items() if old in matched and new not in matched]
            stays = keep or not added or not matched.isdisjoint(names.values())
        else:
            added = [names[entry]] if entry in names else []
            stays = keep or not added
        renamed |= dict.fromkeys([entry] * stays + added)
    return tuple(renamed)
