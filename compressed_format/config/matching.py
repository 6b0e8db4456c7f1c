"""Which of many targets match a module. The work grows with modules plus targets: names are looked up, and all
patterns are tried at once."""

from __future__ import annotations

from collections.abc import Iterable

from compressed_format.config.modules import NamedModule
from compressed_format.config.patterns import PatternTable, is_pattern

__all__ = ["TargetTable"]


class TargetTable:
    """Targets or ignore entries in their order in the config, without repetitions."""

    def __init__(self, targets: Iterable[str]) -> None:
        self.targets = tuple(dict.fromkeys(targets))
        self._position = {target: index for index, target in enumerate(self.targets)}
        self._words = {target for target in self.targets if not is_pattern(target)}
        patterns = [target for target in self.targets if is_pattern(target)]
        self._in_order = PatternTable(patterns)
        self._sorted = self._in_order if patterns == sorted(patterns) else PatternTable(sorted(patterns))
        self._by_classes: dict[tuple[str, ...], str | None] = {}
        self._by_part_of_class: dict[str, str | None] = {}
        # The names that some target matches: only these can match one that was never the first.
        self._hit_by_name: list[str] = []
        self._matched: set[str] = set()

    def winner(self, module: NamedModule) -> str | None:
        """The target that compressed-tensors applies: the exact name, else the first matching pattern in string
        order, else the first of the module's classes in string order."""
        return self._by_name(module.name, self._sorted) or self._by_class(module.classes)

    def matches_name(self, module: NamedModule) -> bool:
        """Whether any target matches the module's name."""
        return self._by_name(module.name, self._sorted) is not None

    def first(self, module: NamedModule) -> str | None:
        """The target that vLLM applies: the first in the config's order that matches the name, else the first that
        is part of the name of the module's class, in any case."""
        found = self._by_pattern(module.name, self._in_order)  # the table remembers it, if it is also the sorted one
        if module.name in self._words and (found is None or self._position[module.name] < self._position[found]):
            found = module.name
        if found is not None or not module.classes:
            return found
        own = module.classes[0].lower()
        if own not in self._by_part_of_class:
            self._by_part_of_class[own] = next(
                (word for word in self.targets if word in self._words and word.lower() in own), None
            )
        return self._by_part_of_class[own]

    def unmatched(self, modules: Iterable[NamedModule]) -> list[str]:
        """The targets that match none of the modules, all of which have been asked for their winner."""
        names = {module.name for module in modules}
        classes = {name for module in modules for name in module.classes}
        pending = [
            target
            for target in self.targets
            if target not in self._matched and target not in names and target not in classes
        ]
        table = PatternTable([target for target in pending if is_pattern(target)])
        for name in self._hit_by_name:
            if table.first(name) is not None:
                self._matched.update(target for target in table.targets if table.matches(target, name))
                table = PatternTable([target for target in table.targets if target not in self._matched])
        return [target for target in pending if target not in self._matched]

    def _by_name(self, name: str, table: PatternTable) -> str | None:
        if name in self._words:
            self._hit_by_name.append(name)
            return name
        return self._by_pattern(name, table)

    def _by_pattern(self, name: str, table: PatternTable) -> str | None:
        found = table.first(name)
        if found is not None:
            self._matched.add(found)
            self._hit_by_name.append(name)
        return found

    def _by_class(self, classes: tuple[str, ...]) -> str | None:
        if classes not in self._by_classes:
            self._by_classes[classes] = min((name for name in classes if name in self._words), default=None)
        return self._by_classes[classes]
