"""Which tensors of a checkpoint a config compresses, and what the written config says of the others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from compressed_format.checking.plan import LayerShape
from compressed_format.compression.modules import treatment
from compressed_format.compression.plan import unscaled_caches
from compressed_format.config import (
    FORMAT_VERSION,
    QuantizationConfig,
    QuantizationStatus,
    TargetResolution,
    expand_ignore,
    resolve_targets,
)
from compressed_format.config.layers import OF_COMPRESSED
from compressed_format.config.modules import NamedModule
from compressed_format.errors import CheckpointError, Problem, TargetError
from compressed_format.renaming import rename_modules
from compressed_format.streaming.architecture import Architecture
from compressed_format.streaming.compression_plan import PlannedWeight, check_weights, plan_weight
from compressed_format.streaming.job_builder import Source
from compressed_format.streaming.weights import FusedExperts, SourceWeight, fused_experts, source_weights

__all__ = ["TargetPlan", "architecture_of", "plan_targets"]

_DISAGREEMENT = "looks like {} by its name, and is of the class {} in the architecture, which decides"
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TargetPlan:
    """The ``weights`` that are not copied as they are, the tensors of the source that these ``consumed``, and the
    ``config`` that describes the result, under the checkpoint's names. ``layers`` are its Linear and Embedding modules,
    compressed or not."""

    weights: list[PlannedWeight]
    consumed: frozenset[str]
    config: QuantizationConfig
    layers: dict[str, LayerShape]
    warnings: list[Problem]


@dataclass(frozen=True)
class _Modules:
    """What can be compressed, by module, and the classes of these and of others that ``ignore`` may have to name."""

    weights: dict[str, SourceWeight]
    fused: dict[str, FusedExperts]
    classes: dict[str, tuple[str, ...]]
    tied: dict[str, str]
    names: Mapping[str, str]
    doubts: list[Problem]


def plan_targets(source: Source, config: QuantizationConfig, device: str | None) -> TargetPlan:
    """What ``config`` makes of ``source``. Raises whatever keeps it from being done; nothing is written."""
    _refuse_compressed(source)
    modules = _modules(source)
    stored_names = {own: stored for stored, own in modules.names.items()}
    resolution = resolve_targets(modules.classes, rename_modules(config, stored_names, keep=False))
    doubts = [*modules.doubts, *resolution.warnings]
    if not any(name in modules.weights for name in resolution.assignments):
        raise TargetError("the config reaches no weight of this checkpoint, so nothing would be compressed:", doubts)
    resolution, told = _without_tied(resolution, modules)
    told += _stored_though_tied(resolution, modules, source)
    check_weights(modules.weights, resolution)
    _refuse_experts_told_apart(resolution, modules.weights)
    planned: dict[str, PlannedWeight] = {}
    for weights in _stored_together(modules, source):
        if any(weight.module in resolution.assignments for weight in weights):
            for weight in weights:
                planned[weight.module] = plan_weight(weight, resolution.assignments.get(weight.module), device)
    consumed = {found.weight.tensor for found in planned.values()}
    told += unscaled_caches(config)
    return TargetPlan(
        list(planned.values()),
        frozenset(consumed),
        _written_config(rename_modules(config, stored_names, keep=True), modules, resolution),
        _layers(modules),
        [*doubts, *told],
    )


def _refuse_compressed(source: Source) -> None:
    """Raise :class:`CheckpointError` for a source that holds compressed weights already."""
    content = source.content or {}
    found = next((name for name in source.checkpoint if name.rpartition(".")[2] in OF_COMPRESSED), None)
    if content.get("quantization_config") is not None or found is not None:
        where = "config.json has a quantization_config" if found is None else f"{found} is there"
        message = f"is compressed already ({where}); decompress_checkpoint makes a dense one of it first"
        raise CheckpointError(problems=[Problem(str(source.checkpoint.path), message)])


def _modules(source: Source) -> _Modules:
    """The modules of ``source``: by the names of its tensors, and by its architecture where that is known."""
    checkpoint, content = source.checkpoint, source.content or {}
    model_type = content.get("model_type")
    fused = fused_experts(checkpoint, model_type if isinstance(model_type, str) else None)
    architecture = architecture_of(source)
    names: Mapping[str, str] = {}
    doubts: list[Problem] = []
    by_name = {name: (weight.kind,) for name, weight in source_weights(checkpoint, source.files, {}).items()}
    weights = source_weights(checkpoint, source.files, {} if architecture is None else architecture.classes)
    classes: dict[str, tuple[str, ...]] = {name: (weight.kind,) for name, weight in weights.items()}
    tied: dict[str, str] = {}
    if architecture is not None:
        names, tied = architecture.names, dict(architecture.tied)
        doubts += _disagreements(by_name, weights, architecture)
        classes |= architecture.classes
        fused = {name: _as_built(experts, architecture) for name, experts in fused.items()}
    elif _names_an_architecture(source):
        message = (
            f"{content['model_type']!r} is no architecture that transformers builds here; names alone tell which "
            "tensors are weights of Linear and Embedding modules"
        )
        doubts.append(Problem("config.json: model_type", message))
    if architecture is None and content.get("tie_word_embeddings") is True and "lm_head" not in weights:
        embeddings = [name for name, weight in weights.items() if weight.kind == "Embedding"]
        tied = {"lm_head": embeddings[0]} if len(embeddings) == 1 else {}
        classes |= dict.fromkeys(tied, ("Linear",))
    for experts in fused.values():
        for weight in experts.weights(source.files):
            weights[weight.module] = weight
            classes[weight.module] = (weight.kind,)
    return _Modules(weights, fused, classes, tied, names, doubts)


def architecture_of(source: Source) -> Architecture | None:
    """What transformers knows of it, where it is installed and knows anything."""
    if not _names_an_architecture(source):
        return None
    from compressed_format.integrations.architecture import known_architecture

    return known_architecture(source.checkpoint.folder, source.checkpoint)


def _names_an_architecture(source: Source) -> bool:
    """Whether ``config.json`` says which model this is, and transformers is there to be asked."""
    return "model_type" in (source.content or {}) and find_spec("transformers") is not None


def _disagreements(
    classes: Mapping[str, tuple[str, ...]], weights: Mapping[str, SourceWeight], architecture: Architecture
) -> list[Problem]:
    """Where the names suggest another class than the architecture has."""
    told: dict[str, list[str]] = defaultdict(list)
    for name, (kind,) in classes.items():
        built = architecture.classes.get(name)
        if built is None:
            told[f"is no module of the architecture in config.json; it is taken for a {kind} by its name"].append(name)
        elif kind not in built and not _is_router(built):
            told[_DISAGREEMENT.format(f"a {kind}", built[0])].append(name)
    for name, weight in weights.items():
        if name not in classes:
            told[_DISAGREEMENT.format("neither Linear nor Embedding", weight.kind)].append(name)
    for name in architecture.missing:
        told["is a module of the architecture, and no tensor of the checkpoint is its weight"].append(name)
    return [
        Problem(names[0], message + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""))
        for message, names in told.items()
    ]


def _is_router(classes: Sequence[str]) -> bool:
    return NamedModule("", tuple(classes)).is_router


def _as_built(experts: FusedExperts, architecture: Architecture) -> FusedExperts:
    """``experts`` as the architecture holds them, which shapes alone do not tell in full."""
    layout = architecture.stacks.get(experts.name)
    if layout is None or layout.stack != experts.stack:
        return experts
    return replace(experts, transposed=layout.transposed, interleaved=layout.interleaved, called=layout.called)


def _without_tied(resolution: TargetResolution, modules: _Modules) -> tuple[TargetResolution, list[Problem]]:
    """``resolution`` without the modules that have no tensor of their own, and are not compressed as their twin is.

    In a checkpoint they are what the tensor is that they share.
    """
    kept, told = dict(resolution.assignments), []
    for name, owner in modules.tied.items():
        own, other = kept.get(name), kept.get(owner)
        if own is not None and (other is None or treatment(own) != treatment(other)):
            del kept[name]
            how = "stays dense" if other is None else "is compressed otherwise"
            message = (
                f"shares the weight of {owner}, which {how}, and has no tensor of its own: it stays tied to that; "
                "compress(model, config) and save_compressed can take the two apart"
            )
            told.append(Problem(name, message))
    return replace(resolution, assignments=type(resolution.assignments)(kept)), told


def _stored_though_tied(resolution: TargetResolution, modules: _Modules, source: Source) -> Iterator[Problem]:
    """A head that has a tensor of its own, though ``config.json`` ties it, and is not treated as the embedding is."""
    embeddings = [name for name, weight in modules.weights.items() if weight.kind == "Embedding"]
    tied = (source.content or {}).get("tie_word_embeddings") is True
    for name in modules.weights if tied else ():
        owner = next((owner for owner in embeddings if name.rpartition(".")[2] == "lm_head"), None)
        if owner is None or modules.weights[name].matrix.shape != modules.weights[owner].matrix.shape:
            continue
        own, other = resolution.assignments.get(name), resolution.assignments.get(owner)
        if (None if own is None else treatment(own)) != (None if other is None else treatment(other)):
            message = (
                f"is stored, though config.json ties it to {owner}, which is treated otherwise: whoever ties the two "
                'does not see this one; add it to ignore, or set "tie_word_embeddings" to false in config.json'
            )
            yield Problem(name, message)


def _refuse_experts_told_apart(resolution: TargetResolution, weights: Mapping[str, SourceWeight]) -> None:
    """Raise :class:`TargetError` where the experts of a layer are not all compressed alike: none could run them."""
    treatments: dict[tuple[str, str], dict[object, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in weights:
        match = _EXPERT.fullmatch(name)
        if match:
            assignment = resolution.assignments.get(name)
            kind = None if assignment is None else (treatment(assignment), assignment.scheme)
            treatments[match[1], match[3]][kind].append(name)
    problems = []
    for (_, projection), kinds in treatments.items():
        if len(kinds) > 1:
            rarest = min(kinds.values(), key=len)
            message = (
                f"is treated differently from {projection} of the other experts (and {len(rarest) - 1} more); "
                "a target or an ignore entry must reach all of a layer's experts or none"
            )
            problems.append(Problem(rarest[0], message))
    if problems:
        raise TargetError("experts of one layer have to be compressed alike:", problems)


def _stored_together(modules: _Modules, source: Source) -> Iterator[list[SourceWeight]]:
    """The weights in parcels that are written one by one if any of them is compressed: stacked experts."""
    parcels: dict[str, list[SourceWeight]] = defaultdict(list)
    for experts in modules.fused.values():
        parcels[experts.name] = [modules.weights[weight.module] for weight in experts.weights(source.files)]
    stacked = {weight.module for parcel in parcels.values() for weight in parcel}
    yield from parcels.values()
    yield from ([weight] for name, weight in modules.weights.items() if name not in stacked)


def _layers(modules: _Modules) -> dict[str, LayerShape]:
    shapes = {name: weight.matrix.shape for name, weight in modules.weights.items()}
    return {name: LayerShape(shapes.get(name), modules.classes[name]) for name in modules.weights.keys() | modules.tied}


def _written_config(config: QuantizationConfig, modules: _Modules, resolution: TargetResolution) -> QuantizationConfig:
    """``config`` as it stands in the checkpoint: with all that is not compressed in ``ignore``, and, as some readers go
    by the checkpoint's names and some by the model's, with both."""
    ignore = dict.fromkeys((*config.ignore, *expand_ignore(modules.classes, resolution)))
    changes = {
        "ignore": tuple(ignore),
        "quantization_status": QuantizationStatus.COMPRESSED,
        "version": FORMAT_VERSION,
    }
    return rename_modules(config.model_copy(update=changes), modules.names, keep=True)
