"""``load_compressed`` of a Hugging Face folder: transformers' own ``from_pretrained`` with this library's quantizer.

For one call, the config is handed over under a name of our own, so that no global table of transformers changes its
meaning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from compressed_format.checkpoint import read_checkpoint
from compressed_format.config import QuantizationConfig
from compressed_format.errors import CheckpointError, CompressedFormatError, Problem
from compressed_format.integrations.quantization_config import METHOD
from compressed_format.integrations.quantizer import misshapen

__all__ = ["load_pretrained", "model_class", "refuse_more_layers_than"]

_COUNT_OF_LAYERS = re.compile(r"(\w+_)?(layers|depth|blocks|n_layer)|num_(local_|routed_)?experts")
_ALWAYS_FINE = 1000
_LONGEST_REASON = 2000


def load_pretrained(
    path: Path, config: QuantizationConfig, *, dtype: torch.dtype | None, **from_pretrained: Any
) -> nn.Module:
    """Load a Hugging Face folder. ``from_pretrained`` goes to transformers; the rest is :func:`load_compressed`'s."""
    if not from_pretrained.keys().isdisjoint(("tp_plan", "tp_size")):
        from compressed_format.integrations.tensor_parallel import with_distributed_config

        from_pretrained = with_distributed_config(from_pretrained)
    if "key_mapping" in from_pretrained:
        raise TypeError(
            "load_compressed takes no key_mapping: packed tensors find their modules by the names of the checkpoint; "
            "rename the tensors in the file"
        )
    if "quantization_config" in from_pretrained:
        raise TypeError(
            "load_compressed takes no quantization_config: the checkpoint has its own; decompress() the loaded model "
            "for a dense one, or call enable_transformers() and plain from_pretrained"
        )
    # Said outright: left open, transformers asks on the terminal whether to run code that lies in the folder.
    from_pretrained.setdefault("trust_remote_code", False)
    try:
        model_config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=from_pretrained["trust_remote_code"]
        )
        kind = model_class(model_config, from_pretrained)
    except Exception as error:  # it believes whatever the file says, and trips over it anywhere
        message = f"{path}: transformers cannot tell which model this is ({_words(error)}); pass model="
        raise CheckpointError(message) from error
    if from_pretrained.keys().isdisjoint(("subfolder", "variant")):
        # transformers opens the same files, but trusts their index, and has no word for what is wrong in them.
        refuse_more_layers_than(len(read_checkpoint(path)), model_config, path)
    # It may have been found in either of the two other places, which would be written again as they are.
    for owner, key in (
        (model_config, "compression_config"),
        (getattr(model_config, "text_config", None), "quantization_config"),
    ):
        if owner is not None and key in vars(owner):
            delattr(owner, key)
    model_config.quantization_config = {**config.to_dict(), "quant_method": METHOD}
    with (
        _quiet_report(),
        _built_by_transformers(f"{path}: transformers cannot build {kind.__name__} as config.json says"),
    ):
        model, info = kind.from_pretrained(
            path,
            config=model_config,
            dtype=dtype or "auto",
            output_loading_info=True,
            # A misshapen tensor is then reported like every other problem, instead of ending the search for them.
            ignore_mismatched_sizes=True,
            **from_pretrained,
        )
    quantizer = model.hf_quantizer
    skeleton = quantizer.skeleton
    found = dict.fromkeys(sorted(info["missing_keys"]), "is missing from the checkpoint")
    found |= dict.fromkeys(sorted(info["unexpected_keys"]), "is in the checkpoint, but the model has no such tensor")
    found |= misshapen(model, quantizer.shapes)
    for key, stored, expected in info["mismatched_keys"]:
        found[key] = f"has shape {list(stored)} in the checkpoint, and {list(expected)} in the model"
    problems = [*skeleton.problems]
    problems += [Problem(key, message) for key, message in found.items() if key not in skeleton.explained]
    problems += [Problem("", message) for message in info.get("error_msgs") or ()]
    if problems:
        raise CheckpointError(f"{path} does not fit the model {kind.__name__}:", problems)
    quantizer.finish(model, dtype)
    loaded: nn.Module = model
    return loaded


def model_class(config: Any, from_pretrained: Mapping[str, Any]) -> Any:
    """The class named in ``architectures``, if transformers has it as a model; else the causal language model of the
    config, or whatever writes text from other things."""
    names = getattr(config, "architectures", None) or []
    if len(names) == 1 and not from_pretrained.get("trust_remote_code"):
        found = getattr(transformers, str(names[0]), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if not from_pretrained.get("trust_remote_code"):
        writers = (transformers.AutoModelForImageTextToText, transformers.AutoModelForSeq2SeqLM)
        for auto in (transformers.AutoModelForCausalLM, *writers):
            if type(config) in auto._model_mapping:
                return auto
    return transformers.AutoModelForCausalLM


def refuse_more_layers_than(tensors: int, model_config: Any, path: Path) -> None:
    """Each layer has a tensor at least; millions of them, which a number in a config makes, would take for ever."""
    parts = [model_config, *(part for part in vars(model_config).values() if hasattr(part, "to_dict"))]
    for part in parts:
        for key, value in vars(part).items():
            if _COUNT_OF_LAYERS.fullmatch(key) and isinstance(value, int) and value > max(tensors, _ALWAYS_FINE):
                message = f"says {value}, and the checkpoint has {tensors} tensors"
                raise CheckpointError(problems=[Problem(f"{path / 'config.json'}: {key}", message)])


@contextmanager
def _built_by_transformers(message: str) -> Iterator[None]:
    """Turns what transformers and torch raise where a config asks for the impossible into :class:`CheckpointError`."""
    try:
        yield
    except CompressedFormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{message} ({_words(error)})") from error


def _words(error: Exception) -> str:
    """What an exception says, in one line and not at any length; with its class, if it says little by itself."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "…"
    return shown if type(error) in (OSError, ValueError) else f"{type(error).__name__}: {shown}"


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Mutes transformers' own table of keys that do not match: :class:`CheckpointError` tells all of them."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
