"""A checkpoint as a whole: its files, its config, and each of its modules against both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from compressed_format.checking import codes
from compressed_format.checking.cache_scales import check_cache_scales
from compressed_format.checking.chunks import ChunkReader
from compressed_format.checking.configs import ModelConfig, model_config, read_json
from compressed_format.checking.consumers import consumer_findings
from compressed_format.checking.files import check_companions, check_index, note_problems
from compressed_format.checking.ignored import check_names_of_modules
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.plan import LayerShape, stacked_experts
from compressed_format.checking.stored import ModuleCheck, Stored
from compressed_format.checking.ties import check_ties
from compressed_format.checking.values import check_cache_values, check_values
from compressed_format.checkpoint import Checkpoint, TensorSpec, read_checkpoint
from compressed_format.config import QuantizationConfig, resolve_targets
from compressed_format.config.layers import layer_classes
from compressed_format.errors import CheckpointError, ConfigError, TargetError
from compressed_format.reading.reader import CONFIG_IN_METADATA

__all__ = ["check_checkpoint"]

_CONFIG_FILES = ("config.json", "params.json")


def check_checkpoint(path: Path, notebook: Notebook, *, quick: bool, consumers: tuple[str, ...]) -> bool:
    """Note everything that is wrong with the checkpoint at ``path``; returns whether nothing could be opened."""
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        unreadable = note_problems(error, path, notebook)
        folder = path if path.is_dir() else path.parent
        found = _config_beside(folder, notebook) if path.is_dir() else None
        if found is not None and found.config is not None:
            notebook.add_all(consumer_findings(found.config, {}, consumers))
        return unreadable and found is None
    found = _config_of(checkpoint, notebook)
    check_index(checkpoint, notebook)
    if path.is_dir() or path.name.endswith(".json"):
        check_companions(checkpoint.folder, checkpoint.files, found.content, notebook)
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name in checkpoint:
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = checkpoint.spec(name)
    with ChunkReader(checkpoint) as reader:
        stored = Stored(modules, None if quick else reader)
        if found.config is None:
            _check_without_config(found, stored, notebook)
        else:
            _check_modules(checkpoint, found.config, stored, notebook, consumers)
        check_ties(found.content, stored, notebook)
    return False


def _config_of(checkpoint: Checkpoint, notebook: Notebook) -> ModelConfig:
    """The config in the metadata of a file, else that of the folder."""
    written = checkpoint.metadata.get(CONFIG_IN_METADATA)
    if written is None:
        return _config_beside(checkpoint.folder, notebook) or ModelConfig({}, None, is_compressed=False)
    place = f"{checkpoint.files[0]}: __metadata__.{CONFIG_IN_METADATA}"
    try:
        content = {"quantization_config": json.loads(written)}
    except (ValueError, RecursionError) as error:
        notebook.add(codes.CONFIG, place, f"is no valid JSON: {error}")
        return ModelConfig({}, None, is_compressed=True)
    return model_config(content, notebook, source=place)


def _config_beside(folder: Path, notebook: Notebook) -> ModelConfig | None:
    for name in _CONFIG_FILES:
        if not (folder / name).exists():
            continue
        try:
            return model_config(read_json(folder / name), notebook)
        except (ConfigError, CheckpointError) as error:
            notebook.add_error(codes.CONFIG, error)
            return ModelConfig({}, None, is_compressed=True)
    return None


def _check_without_config(found: ModelConfig, stored: Stored, notebook: Notebook) -> None:
    compressed = stored.compressed
    if found.is_compressed:
        return  # its mistakes have been told
    if not compressed:
        notebook.add(codes.NOT_COMPRESSED, "", "has no quantization_config; only the files were checked")
        return
    first, suffixes = next((name, stored.modules[name]) for name in stored.modules if name in compressed)
    message = f"has {', '.join(sorted(suffixes))}, and there is no quantization_config"
    notebook.add(codes.NO_CONFIG, first, f"{message} ({len(compressed)} modules in all); {codes.NO_CONFIG.way_out}")


def _check_modules(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    stored: Stored,
    notebook: Notebook,
    consumers: tuple[str, ...],
) -> None:
    shapes = {name: checkpoint.spec(name).shape for name in checkpoint}
    stacked = tuple(stacked_experts(shapes))
    classes = layer_classes(shapes)
    try:
        resolution = resolve_targets(classes, config, quantized=stored.compressed)
    except TargetError as error:
        notebook.add_error(codes.TARGETS, error)
        return
    for name in stacked:
        notebook.alike(codes.STACKED_EXPERTS, name, f"holds all experts of a layer; {codes.STACKED_EXPERTS.way_out}")
    of_stacks = {name.rpartition(".")[0] for name in stacked}
    check_names_of_modules(config, classes, resolution, stored, notebook)
    checks: dict[str, ModuleCheck] = {}
    for name, assignment in resolution.assignments.items():
        if name not in of_stacks and not stored.is_dense(name):
            check = ModuleCheck(name, classes[name], stored, assignment, config.version, notebook)
            check.headers()
            checks[name] = check
    check_cache_scales(config, stored, notebook)
    if stored.reader is not None:
        try:
            for check in checks.values():
                check_values(check, stored.reader, notebook)
            check_cache_values(stored.modules, stored.reader, notebook)
        except CheckpointError as error:
            notebook.add_error(codes.TENSOR_UNREADABLE, error)
    layers = {name: LayerShape(_dense_shape(name, checks, stored), (kind,)) for name, kind in classes.items()}
    aligned = [name for name, check in checks.items() if check.is_word_aligned]
    notebook.add_all(
        consumer_findings(config, layers, consumers, quantized=stored.compressed, tensors=shapes, word_aligned=aligned)
    )


def _dense_shape(name: str, checks: Mapping[str, ModuleCheck], stored: Stored) -> tuple[int, ...] | None:
    if name in checks:
        return checks[name].shape if checks[name].columns_known else None
    weight = stored.modules[name].get("weight")
    return None if weight is None else weight.shape
