"""Configs of existing models: where they stand in a checkpoint, and what older releases wrote differently."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from compressed_format.config.config import QuantizationConfig
from compressed_format.config.json_text import parse_json, read_bytes, repeated_keys
from compressed_format.config.kinds import freeze
from compressed_format.config.report import Report, child, nearest, show
from compressed_format.errors import CheckpointError, Problem

__all__ = ["config_of_checkpoint"]

_Config = TypeVar("_Config", bound=QuantizationConfig)

_FILES = ("config.json", "params.json")
_PIPELINE_FILE = "model_index.json"
_MOST_GUESSES = 50
_SIGNS = ("config_groups", "quant_method", "sparsity_config", "transform_config", "kv_cache_scheme")
_SUBSTANCE = ("sparsity_config", "transform_config", "kv_cache_scheme")


def config_of_checkpoint(
    model: type[_Config], source: str | os.PathLike[str] | Mapping[str, Any], *, allow_unknown: bool
) -> tuple[_Config, tuple[Problem, ...]]:
    """See :meth:`QuantizationConfig.from_checkpoint`."""
    report = Report(lenient=True, allow_unknown=allow_unknown)
    name = ""
    content: Any = source
    if not isinstance(source, Mapping):
        path = _config_file(source, report)
        name = str(path)
        content = parse_json(read_bytes(path), name)
    raw = _find(content, report)
    if raw is None:
        report.finish(name)
    if name:
        repeated_keys(raw, "", report)
    fields = _todays_form(model, raw, report)
    config = model._read(fields, report, name, hidden=frozenset({"unknown"}))
    kept = freeze(report.unknown, "", report)
    return (config.model_copy(update={"unknown": kept}) if kept else config), tuple(report.warnings)


def _config_file(source: Any, report: Report) -> Path:
    if not isinstance(source, (str, os.PathLike)):
        report.error("", f"a checkpoint must be a path or an object, not {show(source)}")
        report.finish()
    try:
        path = Path(source)
        if not path.is_dir():
            return path
        for name in _FILES:
            if (path / name).is_file():
                return path / name
    except (OSError, ValueError, TypeError) as error:  # TypeError: a path of bytes
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(problems=[Problem(show(str(source)), f"cannot be read: {reason}")]) from error
    message = f"holds neither {' nor '.join(_FILES)}"
    if (path / _PIPELINE_FILE).is_file():
        message += f", but {_PIPELINE_FILE}: it is a whole pipeline, whose models are in folders of their own"
    raise CheckpointError(problems=[Problem(str(path), message)])


def _find(content: Any, report: Report) -> Any:
    """The ``quantization_config`` object in a whole ``config.json``, or the bare object that was given."""
    if not isinstance(content, Mapping):
        report.error("", f"a config must be an object, not {show(content)}")
        return None
    text_config = content.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, Mapping) else None
    for found in (content.get("quantization_config"), nested, content.get("compression_config")):
        if found is not None:
            if isinstance(found, Mapping):
                return found
            report.error("quantization_config", f"must be an object, not {show(found)}")
            return None
    if any(key in content for key in _SIGNS):
        return content
    report.error("quantization_config", "is missing: the model is not compressed")
    return None


def _todays_form(model: type[QuantizationConfig], raw: Mapping[Any, Any], report: Report) -> dict[Any, Any]:
    """The object as a release of today would write it; unknown top-level keys are gathered under ``extra``."""
    version = raw.get("version")
    report.version = version if isinstance(version, str) else None
    known = [name for name in model.model_fields if name not in model.derived]
    fields = {key: value for key, value in raw.items() if key in known or not isinstance(key, str)}
    others = {key: value for key, value in raw.items() if key not in fields}
    for key in islice(others, _MOST_GUESSES):
        guess = nearest(key, known, cutoff=0.8)
        if guess is not None and guess not in fields:
            report.warn(child("", key), f"unknown key, did you mean {guess}?")
    fields["extra"] = freeze(others, "", report)
    fields.setdefault("version", None)
    if fields.get("config_groups") is None:
        fields["config_groups"] = {}
        method = raw.get("quant_method", "compressed-tensors")
        if not any(raw.get(key) for key in _SUBSTANCE):
            hint = "" if _is_ours(method) else f": this is a checkpoint of {show(method)}"
            report.error("config_groups", f"is missing, and nothing else says what is compressed{hint}")
    return fields


def _is_ours(method: Any) -> bool:
    return isinstance(method, str) and method.lower().replace("_", "-") == "compressed-tensors"
