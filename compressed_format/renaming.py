"""Configs of models whose modules have other names in the checkpoint than in memory.

transformers renames while it loads: ``language_model.lm_head`` of a file may be ``lm_head`` of the model. Targets and
ignore entries of a file speak of the file's names, and those of an author of the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compressed_format.config import QuantizationConfig
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
    are left out. Classes mean the same in either naming.
    """
    if all(old == new for old, new in names.items()):
        return config
    changes: dict[str, object] = {
        "ignore": _renamed(config.ignore, names, keep=keep),
        "config_groups": type(config.config_groups)(
            {
                name: scheme.model_copy(update={"targets": _renamed(scheme.targets, names, keep=keep)})
                for name, scheme in config.config_groups.items()
            }
        ),
    }
    sparsity = config.sparsity_config
    if sparsity is not None:
        fields = {field: _renamed(getattr(sparsity, field), names, keep=keep) for field in ("targets", "ignore")}
        changes["sparsity_config"] = sparsity.model_copy(update=fields)
    return config.model_copy(update=changes)


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
