"""Whether config and tensors agree about which modules are compressed, and ``ignore`` names the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from compressed_format.checking import codes
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.stored import Stored
from compressed_format.config import QuantizationConfig, TargetResolution
from compressed_format.config.matching import TargetTable
from compressed_format.config.modules import NamedModule
from compressed_format.config.patterns import is_pattern
from compressed_format.config.report import nearest, show

__all__ = ["HEADS", "check_names_of_modules"]

HEADS = ("lm_head", "embed_out", "output_layer", "output", "proj_out", "score", "decoder")
"""What the last part of an output layer's name is. Configs name it where it is tied and has no tensors, too."""
_MOST_SUGGESTIONS = 20
_DEEPEST_HEAD = 2


def check_names_of_modules(
    config: QuantizationConfig,
    classes: Mapping[str, str],
    resolution: TargetResolution,
    stored: Stored,
    notebook: Notebook,
) -> None:
    """Note modules that are compressed and should not be, the reverse, and entries that mean nothing."""
    _check_modules(config, classes, resolution, stored, notebook)
    _check_ignore_entries(config, resolution, stored, notebook)
    without_weights = {
        f"config_groups.{name}.targets" for name, group in config.config_groups.items() if not group.weights
    }
    heads = tuple(
        f"{show(target)} matches no module"
        for group in config.config_groups.values()
        for target in group.targets
        if target.rpartition(".")[2] in HEADS
    )
    for problem in resolution.warnings:
        # Entries of ignore are looked at above; of attention modules, and of heads that are tied, no tensor tells.
        if problem.place == "ignore" or problem.place in without_weights or problem.message.startswith(heads):
            continue
        of_targets = problem.place.startswith(("config_groups.", "sparsity_config."))
        notebook.add_all([(codes.TARGET_UNMATCHED if of_targets else codes.RESOLUTION).of(problem)])


def _check_modules(
    config: QuantizationConfig,
    classes: Mapping[str, str],
    resolution: TargetResolution,
    stored: Stored,
    notebook: Notebook,
) -> None:
    targets = TargetTable(
        target for group in config.config_groups.values() for target in group.targets if group.weights
    )
    for name, kind in classes.items():
        assignment, entry = resolution.assignments.get(name), resolution.ignored.get(name)
        if name in stored.compressed:
            found = ", ".join(sorted(stored.modules[name]))
            if assignment is not None:
                continue
            if entry is not None:
                message = f"is ignored by {show(entry)}, and has {found}; {codes.IGNORED_COMPRESSED.way_out}"
                notebook.add(codes.IGNORED_COMPRESSED, name, message)
            else:
                message = f"has {found}, and no target of the config means it; {codes.UNCLAIMED.way_out}"
                notebook.add(codes.UNCLAIMED, name, message)
        elif entry is None and stored.is_dense(name):
            quantized = assignment is not None and (
                assignment.sparsity or (assignment.scheme and assignment.scheme.weights)
            )
            # A router is spared by this library, and not by readers for which it is a Linear like others.
            target = targets.winner(NamedModule(name, (kind,)))
            if quantized or target is not None:
                by = show(target or (assignment.target if assignment else ""))
                message = f"is meant by the target {by}, and its weight is dense: add {show(name)} to ignore"
                notebook.add(codes.DENSE_TARGETED, name, message)
            elif kind == "Linear" and assignment is None and targets.targets:
                message = f"is dense, and neither a target nor ignored: add {show(name)} to ignore"
                notebook.add(codes.DENSE_UNNAMED, name, message)


def _check_ignore_entries(
    config: QuantizationConfig, resolution: TargetResolution, stored: Stored, notebook: Notebook
) -> None:
    """Entries that match no module with tensors.

    Files name modules as the checkpoint does and as the model does, for readers of both kinds: an entry that matches
    nothing is fine where one is ignored that is called alike at the end. Heads may be tied, and have no tensors then.
    """
    entries = TargetTable(config.ignore)
    modules = [NamedModule(name, ()) for name in stored.modules]
    parents = {parent for name in stored.modules for parent in _parents(name)}
    outer = {parent for parent in parents if parent.count(".") < _DEEPEST_HEAD}
    modules += [NamedModule(f"{parent}.{head}".lstrip("."), ()) for parent in sorted(outer) for head in HEADS]
    for module in modules:
        entries.winner(module)
    leaves = {name.rpartition(".")[2] for name in resolution.ignored} | set(HEADS)
    for index, entry in enumerate(entries.unmatched(modules)):
        if not is_pattern(entry) and "." not in entry and entry[:1].isupper():
            continue  # a class, of which names tell nothing
        message = f"{show(entry)} matches no module of the checkpoint"
        if entry in parents:
            message = (
                f"{show(entry)} names a module without a weight, and nothing below it; write {show('re:' + entry)}"
            )
        elif not is_pattern(entry):
            if entry.rpartition(".")[2] in leaves:
                continue
            guess = nearest(entry, stored.modules, cutoff=0.8) if index < _MOST_SUGGESTIONS else None
            message += f"; did you mean {show(guess)}?" if guess else ""
        notebook.add(codes.IGNORE_UNMATCHED, "ignore", message)


def _parents(name: str) -> Iterator[str]:
    """The names of the modules that a module is in, the outermost first; that of the whole is empty."""
    yield ""
    for index, symbol in enumerate(name):
        if symbol == ".":
            yield name[:index]
