"""Whether config and tensors agree about which modules are compressed, and ``ignore`` names the others."""

from __future__ import annotations

from collections.abc import Mapping

from compressed_format.checking import codes
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.stored import Stored
from compressed_format.config import QuantizationConfig, TargetResolution
from compressed_format.config.matching import TargetTable
from compressed_format.config.modules import NamedModule
from compressed_format.config.patterns import is_pattern
from compressed_format.config.report import nearest, show

__all__ = ["HEADS", "check_names_of_modules"]

HEADS = ("lm_head", "embed_out", "output_layer", "output", "proj_out", "score")
"""What the last part of the name of an output layer is, which ``ignore`` names where it is tied, too."""
_MOST_SUGGESTIONS = 20


def check_names_of_modules(
    config: QuantizationConfig,
    classes: Mapping[str, str],
    resolution: TargetResolution,
    stored: Stored,
    notebook: Notebook,
) -> None:
    """Note modules that are compressed and should not be, the reverse, and entries that mean nothing."""
    _check_modules(config, classes, resolution, stored, notebook)
    _check_ignore_entries(config, stored, notebook)
    without_weights = {
        f"config_groups.{name}.targets" for name, group in config.config_groups.items() if not group.weights
    }
    for problem in resolution.warnings:
        if problem.place == "ignore" or problem.place in without_weights:
            continue  # looked at above; targets of attention modules, which no tensor's name tells
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


def _check_ignore_entries(config: QuantizationConfig, stored: Stored, notebook: Notebook) -> None:
    """Entries that match no module with tensors; heads may be tied, and then have none."""
    entries = TargetTable(config.ignore)
    known = [NamedModule(name, ()) for name in stored.modules]
    prefixes = {name.rpartition(".")[0] for name in stored.modules} | {""}
    parents = {prefix.rpartition(".")[0] for prefix in prefixes} | prefixes
    heads = [
        NamedModule(f"{parent}.{head}".lstrip("."), ()) for parent in parents if parent.count(".") < 2 for head in HEADS
    ]
    for module in (*known, *heads):
        entries.winner(module)
    names = set(stored.modules)
    every_parent = {name[:index] for name in names for index, symbol in enumerate(name) if symbol == "."}
    for index, entry in enumerate(entries.unmatched([*known, *heads])):
        if not is_pattern(entry) and "." not in entry and entry[:1].isupper():
            continue  # a class, of which names tell nothing
        message = f"{show(entry)} matches no module of the checkpoint"
        if entry in every_parent:
            message = (
                f"{show(entry)} names a module without a weight, and nothing below it: write {show('re:' + entry)}"
            )
        elif not is_pattern(entry) and index < _MOST_SUGGESTIONS:
            leaf = entry.rpartition(".")[2]
            same = next((name for name in names if name.rpartition(".")[2] == leaf), None)
            guess = same or nearest(entry, names, cutoff=0.8)
            message += f"; did you mean {show(guess)}?" if guess else ""
        notebook.add(codes.IGNORE_UNMATCHED, "ignore", message)
