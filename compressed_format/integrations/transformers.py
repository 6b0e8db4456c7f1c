"""transformers: its own ``from_pretrained`` with this library's quantizer, and its names for checkpoint tensors.

Checkpoints keep saying ``quant_method: "compressed-tensors"``. For one call, the config is handed over under a name of
our own, so that no global table of transformers changes its meaning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressed_format.checkpoint import read_checkpoint
from compressed_format.compression import attach_config
from compressed_format.config import QuantizationConfig
from compressed_format.errors import CheckpointError, Problem
from compressed_format.formats.base import StoredTensor
from compressed_format.linear import compressed_modules
from compressed_format.renaming import module_names, rename_modules
from compressed_format.skeleton import Skeleton, dtype_misfit

__all__ = ["checkpoint_names", "load_pretrained"]

_METHOD = "compressed_format"


@register_quantization_config(_METHOD)
class CompressedFormatConfig(QuantizationConfigMixin):
    """A checkpoint's ``quantization_config``, as transformers carries it; writes itself as compressed-tensors."""

    def __init__(self, **content: Any) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self._content = {**content, "quant_method": "compressed-tensors"}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self._content)


@register_quantizer(_METHOD)
class CompressedFormatQuantizer(HfQuantizer):
    """Swaps compressed modules into the skeleton, before transformers loads tensors into it by name."""

    requires_calibration = True
    quantization_config: CompressedFormatConfig

    def __init__(self, quantization_config: CompressedFormatConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config, _ = QuantizationConfig.from_checkpoint(quantization_config.to_dict())
        self.skeleton: Skeleton | None = None
        # The checkpoint's name of each module of the model that holds tensors.
        self.stored_names: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored: dict[str, StoredTensor] = {}
        for file in checkpoint_files or []:
            checkpoint = read_checkpoint(file)
            stored.update({name: checkpoint.spec(name) for name in checkpoint})
        model_names = _model_names(model, stored)
        named = {model_names[name]: tensor for name, tensor in stored.items()}
        self.stored_names = module_names({renamed: name for name, renamed in model_names.items()})
        config = rename_modules(self.config, module_names(model_names), keep=False)
        state = model.state_dict()
        tied: Any = model.all_tied_weights_keys
        self.skeleton = Skeleton(model, config, named, tied=tied)
        _retie(model)
        for name, tensor in named.items():
            problem = (
                None if name in self.skeleton.packed or name not in state else dtype_misfit(tensor, state[name].dtype)
            )
            if problem is not None and name not in self.skeleton.explained:
                self.skeleton.problems.append(Problem(name, problem))
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for module in compressed_modules(model).values():
            module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        # Compressed modules see to their own tensors; KV-cache scales have been set on plain ones, as trainable.
        for name, parameter in model.named_parameters():
            if self.skeleton is not None and name in self.skeleton.packed:
                parameter.requires_grad_(False)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        names = getattr(converter, "target_patterns", None) or []
        packed = self.skeleton is not None and any(name in self.skeleton.packed for name in names)
        new: torch.dtype | None = None if packed else super().get_new_dtype(converter, param, dtype)
        return new

    @property
    def is_trainable(self) -> bool:
        # By adapters: gradients pass through packed weights. Trainer itself asks that there be some.
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def load_pretrained(
    path: Path, config: QuantizationConfig, *, dtype: torch.dtype | None, **from_pretrained: Any
) -> nn.Module:
    """Load a Hugging Face folder. ``from_pretrained`` goes to transformers; the rest is :func:`load_compressed`'s."""
    trust = {key: from_pretrained[key] for key in ("trust_remote_code",) if key in from_pretrained}
    try:
        model_config = transformers.AutoConfig.from_pretrained(path, **trust)
    except (ValueError, OSError) as error:
        message = f"{path}: transformers cannot tell which model this is ({error}); pass model="
        raise CheckpointError(message) from error
    model_config.quantization_config = {**config.to_dict(), "quant_method": _METHOD}
    model_class = _model_class(model_config, from_pretrained)
    with _quiet_report():
        model, info = model_class.from_pretrained(
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
    problems = [*skeleton.problems]
    found = dict.fromkeys(sorted(info["missing_keys"]), "is missing from the checkpoint")
    found |= dict.fromkeys(sorted(info["unexpected_keys"]), "is in the checkpoint, but the model has no such tensor")
    misshapen = {key: (stored, expected) for key, stored, expected in info["mismatched_keys"]}
    for key, tensor in model.state_dict().items():
        # Releases of transformers before 5.23 leave shapes to the quantizer, and load what does not fit.
        if tensor.shape != quantizer.shapes.get(key, tensor.shape):
            misshapen.setdefault(key, (tensor.shape, quantizer.shapes[key]))
    for key, (stored, expected) in misshapen.items():
        found[key] = f"has shape {list(stored)} in the checkpoint, and {list(expected)} in the model"
    problems += [Problem(key, message) for key, message in found.items() if key not in skeleton.explained]
    problems += [Problem("", message) for message in info.get("error_msgs") or ()]
    if problems:
        raise CheckpointError(f"{path} does not fit the model {model_class.__name__}:", problems)
    skeleton.finish(dtype)
    attach_config(model, skeleton.config)
    written = rename_modules(skeleton.config, quantizer.stored_names, keep=True)
    model.config.quantization_config = CompressedFormatConfig(**written.to_dict())
    loaded: nn.Module = model
    return loaded


def checkpoint_names(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The checkpoint's name of each entry of a transformers model's state dict.

    Follows the conversions with which the model was loaded backwards. Raises :class:`CheckpointError` where one of
    them rearranges the values of a tensor instead of renaming it: a packed tensor cannot follow that.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Tensors without values stand in: only names matter, and each keeps its identity through a renaming.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    reverted = revert_weight_conversion(model, dict(stand_ins))
    by_identity = {id(tensor): name for name, tensor in reverted.items()}
    names = {name: by_identity.get(id(tensor)) for name, tensor in stand_ins.items()}
    lost = [name for name, renamed in names.items() if renamed is None]
    if lost:
        message = "is rearranged by transformers when it is saved, which is not served yet"
        raise CheckpointError("the model cannot be saved:", [Problem(name, message) for name in lost])
    return {name: renamed for name, renamed in names.items() if renamed is not None}


def _model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """For each name of a stored tensor, the one that transformers will give it as it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = model.base_model_prefix
    # The prefix of the base model is judged by the tensors that exist before modules are swapped.
    state = dict(model.state_dict())
    for name in stored:
        module, _, suffix = name.rpartition(".")
        for prefixed in (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
            if f"{prefixed}.weight" in state:
                state.setdefault(f"{prefixed}.{suffix}", state[f"{prefixed}.weight"])
    return {name: rename_source_key(name, renamings, [], prefix, state)[0] for name in stored}


def _retie(model: Any) -> None:
    """Make transformers tie the tensors of compressed modules, where these share a weight, and no others of theirs."""
    compressed = compressed_modules(model)
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        own, other = (compressed.get(name.rpartition(".")[0]) for name in (target, source))
        if own is None and other is None:
            tied[target] = source
        elif own is not None and other is not None:
            for suffix, parameter in own._parameters.items():
                if parameter is not None and parameter is other._parameters.get(suffix):
                    tied[target.removesuffix("weight") + suffix] = source.removesuffix("weight") + suffix
    if tied != model.all_tied_weights_keys:
        model.all_tied_weights_keys = tied
        # Asked again whenever transformers ties anew, as when embeddings are resized.
        model._tied_weights_keys = dict(tied)


def _model_class(config: Any, from_pretrained: Mapping[str, Any]) -> Any:
    """The class named in ``architectures``, if transformers has it as a model; else the causal language model."""
    names = getattr(config, "architectures", None) or []
    if len(names) == 1 and not from_pretrained.get("trust_remote_code"):
        found = getattr(transformers, str(names[0]), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


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
