"""What a config asks for that cannot be run correctly here, and what of a model no config can ask for."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import nn

from compressed_format.config import Assignment, CompressionFormat, QuantizationConfig
from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.formats.module import check_runnable
from compressed_format.modules.module_table import ModuleTable
from compressed_format.modules.subclasses import subclass_problem

__all__ = ["refuse_what_cannot_run", "transposed_layers", "unserved"]

_ONLINE_LOCATIONS = frozenset({"input", "output", "k_cache", "q_attn"})


def unserved(config: QuantizationConfig) -> list[Problem]:
    """What of ``config`` cannot be run here, as far as that can be told without a model; each names its JSON path."""
    problems: list[Problem] = []
    for group, scheme in config.config_groups.items():
        problems += check_runnable(scheme, config.format_of(scheme), None, f"config_groups.{group}")
    if config.sparsity_config is not None:
        # What a group says of its modules is checked above; those that are only sparse hold dense values.
        dense = CompressionFormat.DENSE
        problems += check_runnable(None, dense, config.sparsity_config.format, "sparsity_config")
    problems += [
        Problem(f"config_groups.{group}", f"its target {target} quantizes attention, which cannot be run yet")
        for target, group in _attention_targets(config).items()
    ]
    # A group and the sparsity of its modules may share a problem.
    return list(dict.fromkeys([*problems, *_online_transforms(config)]))


def refuse_what_cannot_run(
    model: nn.Module | ModuleTable, config: QuantizationConfig, assignments: Mapping[str, Assignment]
) -> None:
    """Raise :class:`UnsupportedFormatError` for everything that ``model`` would not run correctly, by module."""
    problems: list[Problem] = []
    runnable: set[int] = set()  # most modules share their assignment, and nothing of its problems but the place
    for name, assignment in assignments.items():
        if id(assignment) in runnable:
            continue
        found = check_runnable(assignment.scheme, assignment.format, assignment.sparsity, name)
        if not found:
            runnable.add(id(assignment))
        problems += found
    attention = _attention_targets(config)
    for name, module in model.named_modules():
        group = attention.get(type(module).__name__)
        if group is not None:
            problems.append(Problem(name, f"the group {group} quantizes attention, which cannot be run yet"))
        problem = None
        if name in assignments and isinstance(module, (nn.Linear, nn.Embedding)):
            problem = subclass_problem(module)
        if problem is not None:
            problems.append(Problem(name, problem))
    problems += _online_transforms(config)
    if problems:
        raise UnsupportedFormatError("the checkpoint needs what cannot be run correctly here:", problems)


def transposed_layers(model: nn.Module, ignored: Container[str]) -> list[Problem]:
    """That ``model`` is made of transformers' Conv1D, as GPT-2 is, which the target Linear does not reach."""
    names = [
        name
        for name, module in model.named_modules()
        if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and name not in ignored
    ]
    if not names:
        return []
    counted = "is a Conv1D, which holds its weight" if len(names) == 1 else f"{len(names)} Conv1D modules hold weights"
    message = (
        f"{counted} transposed, [in, out]; no target can compress that, and it stays dense. Put an nn.Linear in the "
        "place of each, with weight.T for its weight and the same bias, or list them in ignore"
    )
    return [Problem(names[0] + (", …" if len(names) > 1 else ""), message)]


def _attention_targets(config: QuantizationConfig) -> dict[str, str]:
    """The classes of attention modules among the targets, and the group of each."""
    return {
        target: group
        for group, scheme in config.config_groups.items()
        if scheme.weights is None
        for target in scheme.targets
        if "attention" in target.lower()
    }


def _online_transforms(config: QuantizationConfig) -> list[Problem]:
    problems = []
    if config.transform_config is not None:
        for group, transform in config.transform_config.config_groups.items():
            for apply in transform.apply:
                if apply.location in _ONLINE_LOCATIONS:
                    place = f"transform_config.config_groups.{group}"
                    message = f"an online transform at {apply.location} of {', '.join(apply.targets)} cannot be run yet"
                    problems.append(Problem(place, message))
    return problems
