"""Configs, written by hand or found in a checkpoint: what is wrong with them alone. Needs no torch."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressed_format.checking import codes
from compressed_format.checking.notebook import Notebook
from compressed_format.config import (
    FORMAT_VERSION,
    CompressionFormat,
    QuantizationConfig,
    QuantizationStatus,
    TransformLocation,
    resolve_targets,
)
from compressed_format.config.json_text import parse_json, read_bytes, repeated_keys
from compressed_format.config.report import Report, show
from compressed_format.errors import CheckpointError, ConfigError, Problem, TargetError

__all__ = ["ModelConfig", "authored_config", "is_of_a_model", "model_config", "read_json"]

# Names as they are in checkpoints, for patterns to be tried on where no names are known.
_USUAL_NAMES = ("model.layers.10.self_attn.q_proj", "model.layers.10.block_sparse_moe.experts.127.gate_proj", "lm_head")
_FUSED = (TransformLocation.WEIGHT_INPUT, TransformLocation.WEIGHT_OUTPUT)
_PLACES = ("quantization_config", "compression_config")
_SIGNS_OF_A_MODEL = (*_PLACES, "architectures", "model_type", "text_config")
_MXFP4_FAULT = (0, 13, 0)


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says: ``content`` as a whole, and ``config``, its ``quantization_config`` if that is readable.

    ``is_compressed`` says whether there is any, readable or not.
    """

    content: Mapping[str, Any]
    config: QuantizationConfig | None
    is_compressed: bool


def read_json(path: Path) -> Any:
    """The JSON in a regular file; raises :class:`CheckpointError` and :class:`ConfigError`."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(problems=[Problem(str(path), f"cannot be read: {error.strerror or error}")]) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(problems=[Problem(str(path), "is a folder, a device or a pipe, not a file")])
    return parse_json(read_bytes(path), str(path))


def is_of_a_model(content: Any) -> bool:
    """Whether parsed JSON is a model's config.json, and not a config written by hand."""
    return isinstance(content, Mapping) and any(key in content for key in _SIGNS_OF_A_MODEL)


def authored_config(path: Path, notebook: Notebook) -> QuantizationConfig | None:
    """The config that somebody wrote, if it is right."""
    try:
        config = QuantizationConfig.from_file(path)
    except ConfigError as error:
        notebook.add_error(codes.CONFIG, error)
        return None
    try:
        resolve_targets(_USUAL_NAMES, config)
    except TargetError as error:
        notebook.add_error(codes.TARGETS, error)
    _check_transforms(config, notebook)
    return config


def model_config(content: Any, notebook: Notebook, *, source: str = "config.json") -> ModelConfig:
    """What a model's config.json, or the config in a file's metadata, says."""
    if not isinstance(content, Mapping):
        notebook.add(codes.CONFIG, source, f"must be an object, not {show(content)}")
        return ModelConfig({}, None, is_compressed=False)
    place, raw = _find(content)
    if place is None:
        return ModelConfig(content, None, is_compressed=False)
    if place != "quantization_config":
        message = f"not every reader looks here; {codes.CONFIG_PLACE.way_out}"
        notebook.add(codes.CONFIG_PLACE, place, message)
    config = None
    try:
        config, warnings = QuantizationConfig.from_checkpoint(content)
        notebook.add_all(codes.CONFIG_DOUBT.of(problem) for problem in warnings)
    except (ConfigError, CheckpointError) as error:
        notebook.add_error(codes.CONFIG, error)
    if isinstance(raw, Mapping):
        report = Report(lenient=True)
        repeated_keys(raw, place, report)
        notebook.add_all(codes.CONFIG_DOUBT.of(problem) for problem in report.warnings)
        if config is not None or raw.get("config_groups") is not None:  # it is one of this format
            _check_status(raw, place, notebook)
            _check_version(raw, place, notebook)
    if config is not None:
        _check_transforms(config, notebook)
        _check_formats(config, notebook)
    return ModelConfig(content, config, is_compressed=True)


def _find(content: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Path and content of the ``quantization_config`` object, looked for where readers do."""
    if content.get("quantization_config") is not None:
        return "quantization_config", content["quantization_config"]
    nested = content.get("text_config")
    if isinstance(nested, Mapping) and nested.get("quantization_config") is not None:
        return "text_config.quantization_config", nested["quantization_config"]
    if content.get("compression_config") is not None:
        return "compression_config", content["compression_config"]
    if "config_groups" in content:
        return "quantization_config", content
    return None, None


def _check_status(raw: Mapping[str, Any], place: str, notebook: Notebook) -> None:
    status = raw.get("quantization_status")
    if status != QuantizationStatus.COMPRESSED.value and not (
        raw.get("sparsity_config") and not raw.get("config_groups")
    ):
        found = "is missing" if status is None else f"is {show(status)}"
        message = f'{found}, and must be "compressed": transformers leaves the weights random otherwise'
        notebook.add(codes.STATUS, f"{place}.quantization_status", message)


def _check_version(raw: Mapping[str, Any], place: str, notebook: Notebook) -> None:
    version = raw.get("version")
    if version is None:
        notebook.add(codes.NO_VERSION, f"{place}.version", f"is missing; {codes.NO_VERSION.way_out}")
        return
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", version) if isinstance(version, str) else None
    newest = tuple(int(part) for part in FORMAT_VERSION.split("."))
    if match is None:
        notebook.add(codes.VERSION, f"{place}.version", f"is {show(version)}, which is no release")
        return
    release = tuple(int(part or 0) for part in match.groups())
    if release[:2] > newest[:2]:
        message = f"is {show(version)}; releases up to {FORMAT_VERSION} are known, and newer ones may differ"
        notebook.add(codes.VERSION, f"{place}.version", message)
    groups = raw.get("config_groups")
    if release == _MXFP4_FAULT and isinstance(groups, Mapping):
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                continue
            if (weights.get("type"), weights.get("num_bits"), weights.get("group_size")) == ("float", 4, 32):
                message = f"MXFP4 written by {version}: its scales are four times too small; compress again"
                notebook.add(codes.MXFP4_FAULT, f"{place}.config_groups.{name}", message)


def _check_transforms(config: QuantizationConfig, notebook: Notebook) -> None:
    transforms = config.transform_config
    for name, scheme in ({} if transforms is None else transforms.config_groups).items():
        for index, applied in enumerate(scheme.apply):
            place = f"transform_config.config_groups.{name}.apply[{index}]"
            if applied.location in _FUSED:
                notebook.alike(codes.FUSED_TRANSFORM, place, "is part of the stored weights; there is nothing to do")
            else:
                message = f'is a rotation at run time ("{applied.location}"); {codes.ONLINE_TRANSFORM.way_out}'
                notebook.add(codes.ONLINE_TRANSFORM, place, message)


def _check_formats(config: QuantizationConfig, notebook: Notebook) -> None:
    if config.sparsity_config is not None:
        message = f"{config.sparsity_config.format} is loaded by no current server; {codes.LEGACY_FORMAT.way_out}"
        notebook.add(codes.LEGACY_FORMAT, "sparsity_config", message)
    for name, scheme in config.config_groups.items():
        if scheme.format is CompressionFormat.MARLIN_24:
            message = f"marlin-24 is loaded by no current server; {codes.LEGACY_FORMAT.way_out}"
            notebook.add(codes.LEGACY_FORMAT, f"config_groups.{name}", message)
