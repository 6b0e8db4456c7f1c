"""Which module of a model gets which scheme, and why."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frozendict import frozendict

from compressed_format.config.config import QuantizationConfig
from compressed_format.config.experts import expert_stack
from compressed_format.config.matching import TargetTable
from compressed_format.config.modules import NamedModule, counts_as_linear, list_modules
from compressed_format.config.patterns import is_pattern
from compressed_format.config.report import nearest, show
from compressed_format.config.scheme import QuantizationScheme
from compressed_format.config.siblings import Outcome, check_siblings
from compressed_format.config.words import CompressionFormat
from compressed_format.errors import Problem, TargetError

__all__ = ["Assignment", "TargetResolution", "expand_ignore", "resolve_targets"]

_MOST_SUGGESTIONS = 20


@dataclass(frozen=True)
class Assignment:
    """What becomes of one module.

    ``group`` and ``scheme`` are ``None`` for a module that is sparse and in no group. ``target`` is the entry of the
    config that named the module, and ``reason`` says so in a sentence. ``format`` is the scheme's, ``dense`` where
    its weight is not quantized; ``sparsity`` is the format of its zeros, ``None`` where it has none to speak of.
    """

    group: str | None
    scheme: QuantizationScheme | None
    target: str
    reason: str
    format: CompressionFormat
    sparsity: CompressionFormat | None


@dataclass(frozen=True)
class TargetResolution:
    """What becomes of a model's modules. All that is assigned is a Linear or an Embedding.

    ``ignored`` maps each module that an ignore entry matches to that entry.
    """

    assignments: frozendict[str, Assignment]
    ignored: frozendict[str, str]
    warnings: tuple[Problem, ...]


def resolve_targets(
    model_or_names: Any | Mapping[str, str | Sequence[str]] | Iterable[str],
    config: QuantizationConfig,
    *,
    quantized: Container[str] = (),
) -> TargetResolution:
    """Find the scheme of every module, as compressed-tensors does.

    A module that ``ignore`` matches gets none. Else its full name as a target wins, then the patterns that match it
    in string order, then its classes in string order; of two groups with the same target the later one wins.

    ``model_or_names`` is a model (anything with ``named_modules()``), a mapping from the names of modules to the
    names of their classes (one, or several with the most derived first), or an iterable of names, which all count as
    Linear. Where one module holds the weights of all experts, each projection of each expert counts as a Linear of its
    own, named as in a checkpoint: ``mlp.experts.3.up_proj``.

    A router (see :data:`~compressed_format.config.modules.ROUTERS`) is reached by its full name only, unless it is
    among those known to be ``quantized``, as those of a checkpoint are.

    The result's ``warnings`` name what other readers do otherwise, what matches nothing, and modules that servers
    fuse and the config tells apart. Raises :class:`~compressed_format.errors.TargetError` for targets that name
    modules whose weights cannot be compressed, and for patterns that take too long.
    """
    return _Resolver(list_modules(model_or_names), config, quantized).run()


def expand_ignore(
    model_or_names: Any | Mapping[str, str | Sequence[str]] | Iterable[str], resolution: TargetResolution
) -> tuple[str, ...]:
    """The names that a saved file's ``ignore`` must list, in the model's order.

    These are the modules without a scheme that readers would look for one: every Linear, every router (whose class
    counts as Linear), and those of a class of which some module has a scheme. One pattern stands for all experts of a
    stack.
    """
    modules = list_modules(model_or_names)
    with_scheme = {name for name, assignment in resolution.assignments.items() if assignment.scheme is not None}
    classes = {module.classes[0] for module in modules if module.name in with_scheme and module.classes}
    stacks_with_scheme = {module.stack for module in modules if module.name in with_scheme}
    entries: dict[str, None] = {}
    for module in modules:
        if module.name in with_scheme:
            continue
        if module.stack is not None and module.stack not in stacks_with_scheme:
            entries[rf"re:{re.escape(module.stack)}\.\d+\..*"] = None
        elif counts_as_linear(module) or (module.classes and module.classes[0] in classes):
            entries[module.name] = None
    return tuple(entries)


class _Resolver:
    """One resolution while it is under way."""

    def __init__(self, modules: list[NamedModule], config: QuantizationConfig, quantized: Container[str]) -> None:
        self.modules = modules
        self.config = config
        self.quantized = quantized
        self.groups: dict[str, str] = {}
        for group, scheme in config.config_groups.items():
            self.groups.update(dict.fromkeys(scheme.targets, group))
        self.targets = TargetTable(self.groups)
        self.ignore = TargetTable(config.ignore)
        sparsity = config.sparsity_config
        self.sparsity = None if sparsity is None else sparsity.format
        self.sparse = TargetTable(() if sparsity is None else sparsity.targets)
        self.dense = TargetTable(() if sparsity is None else sparsity.ignore)
        self.assignments: dict[str, Assignment] = {}
        self.made: dict[tuple[str, bool], Assignment] = {}
        self.ignored: dict[str, str] = {}
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []
        # What would be said of many modules alike: what is said -> the modules it is said of.
        self.alike: dict[str, list[str]] = {}

    def run(self) -> TargetResolution:
        for module in self.modules:
            entry = self.ignore.winner(module)
            if entry is None and module.stack is not None:
                entry = self.ignored.get(module.stack)  # whoever ignores the whole stack means all that is in it
            if entry is not None:
                self.ignored[module.name] = entry
            target = self.targets.winner(module)
            if target is not None and self._is_spared(module, target):
                target = None
            if target is not None and entry is None:
                self._assign(module, target)
            elif target is not None and entry is not None and self.ignore.winner(module) is not None:
                self._compare_ignore(module, entry)
            if self.sparsity is not None and module.is_compressible:
                self._assign_sparsity(module)
        if self.errors:
            count = len(self.errors)
            raise TargetError(f"{count} modules that cannot be compressed:" if count > 1 else "", self.errors)
        self.warnings += [
            Problem(names[0] or "(the model)", message + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""))
            for message, names in self.alike.items()
        ]
        self._find_unmatched()
        self.warnings += check_siblings(self.modules, self._outcomes())
        return TargetResolution(frozendict(self.assignments), frozendict(self.ignored), tuple(self.warnings))

    def _is_spared(self, module: NamedModule, target: str) -> bool:
        """Whether ``target`` does not reach ``module`` because it is a router and called something else."""
        return module.is_router and target != module.name and module.name not in self.quantized

    def _assign(self, module: NamedModule, target: str) -> None:
        group = self.groups[target]
        scheme = self.config.config_groups[group]
        if not module.is_compressible:
            self._refuse(module, target, group, scheme)
            return
        self.assignments[module.name] = self._assignment(module, target)
        first = self.targets.first(module)
        if first is not None and first != target:
            other = self.config.config_groups[self.groups[first]]
            if _likeness(other) != _likeness(scheme):
                self._say(
                    module,
                    f"gets {group} by {show(target)}, and in vLLM, where the first target that matches wins, "
                    f"{self.groups[first]} by {show(first)}",
                )

    def _assignment(self, module: NamedModule, target: str) -> Assignment:
        """One for all modules that a target reaches in the same way, which may be very many."""
        key = target, target == module.name
        known = self.made.get(key)
        if known is None:
            group = self.groups[target]
            scheme = self.config.config_groups[group]
            known = self.made[key] = Assignment(
                group=group,
                scheme=scheme,
                target=target,
                reason=f"{self._why(module, target)} a target of {group}",
                format=CompressionFormat.DENSE if scheme.weights is None else self.config.format_of(scheme),
                sparsity=None,
            )
        return known

    def _refuse(self, module: NamedModule, target: str, group: str, scheme: QuantizationScheme) -> None:
        """What to make of a target that reaches something else than a Linear or an Embedding."""
        kind = module.classes[0] if module.classes else "module"
        if expert_stack(module.module) is not None:
            if not is_pattern(target):
                message = (
                    f"{show(target)} of {group} names this {kind}, which holds the weights of all experts; they are "
                    f"targets of their own: {show('Linear')} reaches them, or a pattern such as "
                    + show(r"re:.*\.experts\.\d+\.(gate|up|down)_proj$")
                )
                self.errors.append(Problem(module.name, message))
            return
        if scheme.weights is None:
            if scheme.input_activations is not None or scheme.output_activations is not None:
                self._say(
                    module, f"is a {kind}, whose quantized activations ({group}) are kept in the config and not run"
                )
            return
        if is_pattern(target) and "weight" not in module.matrices:
            if module.matrices:
                self._say(
                    module, f"holds {', '.join(module.matrices)} itself, not in Linear modules; they stay as they are"
                )
            return
        cause = "stores its weight transposed" if "Conv1D" in module.classes else "is neither Linear nor Embedding"
        self.errors.append(
            Problem(
                module.name,
                f"{show(target)} of {group} names this {kind}, which {cause} and cannot be compressed; "
                "narrow the target or list the module in ignore",
            )
        )

    def _compare_ignore(self, module: NamedModule, entry: str) -> None:
        if module.is_compressible and not self.ignore.matches_name(module):
            self._say(
                module, f"is ignored by its class ({show(entry)}), and vLLM matches ignore entries with names only"
            )

    def _assign_sparsity(self, module: NamedModule) -> None:
        target = self.sparse.winner(module)
        if target is None or self.dense.winner(module) is not None or self._is_spared(module, target):
            return
        assigned = self.assignments.get(module.name)
        why = f"{self._why(module, target)} a target of sparsity_config"
        self.assignments[module.name] = Assignment(
            group=assigned.group if assigned else None,
            scheme=assigned.scheme if assigned else None,
            target=assigned.target if assigned else target,
            reason=f"{assigned.reason}, and {why}" if assigned else why,
            format=assigned.format if assigned else CompressionFormat.DENSE,
            sparsity=self.sparsity,
        )

    def _why(self, module: NamedModule, target: str) -> str:
        if is_pattern(target):
            return f"its name matches {show(target)},"
        return f"its name is {show(target)}," if target == module.name else f"its class is {show(target)},"

    def _say(self, module: NamedModule, message: str) -> None:
        self.alike.setdefault(message, []).append(module.name)

    def _outcomes(self) -> dict[str, Outcome]:
        outcomes = {}
        of_assignments: dict[int, Outcome] = {}
        for module in self.modules:
            assignment = self.assignments.get(module.name)
            if assignment is not None:
                outcome = of_assignments.get(id(assignment))
                if outcome is None:
                    scheme = assignment.scheme
                    likeness = (None if scheme is None else _likeness(scheme), assignment.sparsity)
                    outcome = Outcome(likeness, f"gets {assignment.group or 'only sparsity'}")
                    of_assignments[id(assignment)] = outcome
                outcomes[module.name] = outcome
            elif module.is_compressible:
                label = "is ignored" if module.name in self.ignored else "matches no target"
                outcomes[module.name] = Outcome(None, label)
        return outcomes

    def _find_unmatched(self) -> None:
        tables = (
            ("config_groups", self.targets),
            ("ignore", self.ignore),
            ("sparsity_config.targets", self.sparse),
        )
        for place, table in tables:
            for index, target in enumerate(table.unmatched(self.modules)):
                where = f"config_groups.{self.groups[target]}.targets" if table is self.targets else place
                hint = self._suggest(target) if index < _MOST_SUGGESTIONS else None
                self.warnings.append(
                    Problem(where, f"{show(target)} matches no module" + (f"; did you mean {hint}?" if hint else ""))
                )

    def _suggest(self, target: str) -> str | None:
        """What a target that matches nothing was probably meant to be."""
        if is_pattern(target):
            return None
        if "." not in target:
            if any(module.name.endswith("." + target) for module in self.modules):
                return show(f"re:.*{target}$")
            near = nearest(target, {name for module in self.modules for name in module.classes})
            return None if near is None else show(near)
        parent, _, leaf = target.rpartition(".")
        leaves = {name.rpartition(".")[2] for module in self.modules if (name := module.name).startswith(parent + ".")}
        near = nearest(leaf, leaves) if leaf not in leaves else None
        return None if near is None else show(f"{parent}.{near}")


def _likeness(scheme: QuantizationScheme) -> tuple[Any, ...]:
    """What two schemes have in common that do the same to different modules."""
    return (scheme.weights, scheme.input_activations, scheme.output_activations, scheme.format)
