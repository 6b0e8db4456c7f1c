"""What transformers calls while ``from_pretrained`` builds, fills and saves a compressed model.

One quantizer serves every way in: :func:`~compressed_format.load_compressed`, which reaches it under a name of our own,
and plain ``from_pretrained`` once :func:`~compressed_format.enable_transformers` has put it in the place of
transformers' own. Checkpoints keep saying ``quant_method: "compressed-tensors"``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import load_state_dict
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from compressed_format.checkpoint import read_checkpoint
from compressed_format.compression.attached_config import attach_config
from compressed_format.compression.in_place import decompress
from compressed_format.config import QuantizationConfig
from compressed_format.errors import CheckpointError, CompressedFormatWarning, Problem
from compressed_format.formats.base import StoredTensor
from compressed_format.integrations.checkpoint_names import checkpoint_names, model_names, renamed_experts
from compressed_format.integrations.compress_on_load import CompressionOnLoad
from compressed_format.integrations.expert_conversion import StackExperts, remember_conversions
from compressed_format.integrations.model_dtype import say_computing_dtype
from compressed_format.integrations.quantization_config import METHOD, CompressedTensorsConfig
from compressed_format.integrations.tied_weights import retie
from compressed_format.loading.fitting import dtype_misfit
from compressed_format.loading.skeleton import Skeleton
from compressed_format.modules.base import compressed_modules, is_of_weight
from compressed_format.renaming import module_names, rename_modules
from compressed_format.save import saved_config

__all__ = ["CompressedFormatQuantizer", "attach_quantizer", "misshapen"]


@register_quantizer(METHOD)
class CompressedFormatQuantizer(HfQuantizer):
    """Swaps compressed modules into a model before its tensors are loaded, or compresses dense ones as they arrive."""

    requires_calibration = False
    quantization_config: CompressedTensorsConfig

    def __init__(self, quantization_config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> None:
        """``quantization_config`` is one of transformers, a mapping or a :class:`QuantizationConfig`."""
        carried = CompressedTensorsConfig.of(quantization_config)
        super().__init__(carried, pre_quantized=pre_quantized, **kwargs)
        if isinstance(quantization_config, QuantizationConfig):
            self.config = quantization_config
        elif not pre_quantized and carried.authored:
            self.config = QuantizationConfig.from_dict(carried.to_dict())
        else:
            self.config, problems = QuantizationConfig.from_checkpoint(carried.to_dict())
            for problem in problems:
                warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
        if carried.use_optimized_inference:
            message = "use_optimized_inference means nothing here: compressed modules always run from packed tensors"
            warnings.warn(message, CompressedFormatWarning, stacklevel=2)
        # Whoever has asked by our own name lists all problems together with what transformers finds.
        self.reports_itself = carried.quant_method != METHOD
        self.skeleton: Skeleton | None = None
        self.compression: CompressionOnLoad | None = None
        # The checkpoint's name of each module of the model that holds tensors.
        self.stored_names: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored: dict[str, StoredTensor] = {}
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        pickled: list[str] = []
        for file in checkpoint_files or []:
            if not self.pre_quantized and not str(file).endswith(".safetensors"):
                # A dense checkpoint of another kind, which transformers loads; it has both of two tied weights.
                pickled += load_state_dict(file, map_location="meta")
                continue
            checkpoint = read_checkpoint(file)
            for name in checkpoint:
                stored[name] = checkpoint.spec(name)
                readers[name] = lambda name=name, of=checkpoint: of[name]  # type: ignore[misc]
        names = self.names = model_names(model, (*stored, *pickled))
        self.stored_names = module_names({renamed: name for name, renamed in names.items()})
        if not self.pre_quantized:
            _share(model, compressed=False)
            # As in compress(), the author may have spoken of either naming.
            config = rename_modules(self.config, module_names(names), keep=False)
            placed = kwargs.get("device_map")
            self.compression = CompressionOnLoad(model, config, stored=set(names.values()), device_map=placed)
            self.config = rename_modules(self.config, module_names(names), keep=True)
            return
        named = {names[name]: tensor for name, tensor in stored.items()}
        config = rename_modules(self.config, module_names(names), keep=False)
        if self.reports_itself:
            new = _new_layers(model, named)
            config = config.model_copy(update={"ignore": tuple(dict.fromkeys((*config.ignore, *new)))})
        state = model.state_dict()
        self.skeleton = Skeleton(model, config, named, tied=model.all_tied_weights_keys)
        # transformers tells of tensors that it has no place for by its own names.
        self.skeleton.explained |= renamed_experts(model, self.skeleton.explained)
        retie(model)
        rearranged = {source for recipe in self.skeleton.recipes.values() for source in recipe.sources}
        for name, tensor in named.items():
            as_it_is = name in state and name not in self.skeleton.packed | rearranged
            problem = dtype_misfit(tensor, state[name].dtype) if as_it_is else None
            if problem is not None and name not in self.skeleton.explained:
                self.skeleton.problems.append(Problem(name, problem))
        by_model_name = {renamed: readers[name] for name, renamed in names.items()}
        self.skeleton.problems += self.skeleton.zero_point_problems(lambda name: by_model_name[name]())
        # transformers would fuse experts that do not fit as if they were dense ones, and fail over it.
        if self.reports_itself or not self.skeleton.experts_fit:
            problems = [*self.skeleton.problems, *_left_over(model, named, self.skeleton)]
            _refuse(model, problems)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for module in compressed_modules(model).values():
            # Buffers that are in no checkpoint, as the scale of Gemma's embedding, are computed by transformers.
            module._is_hf_initialized = not module._buffers
        _share(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.compression is not None:
            self.compression.finish()
            attach_quantizer(model, self.config, quantizer=self)
            return
        if self.skeleton is None:
            return
        _have_shared(model)
        # Compressed modules see to their own tensors; KV-cache scales have been set on plain ones, as trainable.
        for name, parameter in model.named_parameters():
            if name in self.skeleton.packed:
                parameter.requires_grad_(False)
        if self.reports_itself:
            found = misshapen(model, self.shapes)
            _refuse(model, [Problem(name, message) for name, message in found.items()])
            self.finish(model)

    def finish(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """Check the values that were loaded, and leave ``model`` as it is saved and run. Call it once, last.

        ``dtype`` becomes that of the compressed modules' weights.
        """
        assert self.skeleton is not None
        self.skeleton.finish(dtype)
        self.config = self.skeleton.config
        attach_config(model, self.config)
        if self.quantization_config.dequantize:
            decompress(model)
        else:
            written = rename_modules(self.config, self.stored_names, keep=True)
            attach_quantizer(model, self.config, quantizer=self, written=written)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        if self.compression is not None:
            return [self.compression.conversion, *weight_conversions]
        if self.skeleton is None or not self.skeleton.recipes:
            return weight_conversions
        # Before those of dense experts, whose names are the same where packed ones go by "weight".
        return [StackExperts(self.skeleton.model, self.skeleton.recipes, self.names), *weight_conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if isinstance(converter, StackExperts):
            return None
        names = getattr(converter, "target_patterns", None) or []
        packed = self.skeleton is not None and any(name in self.skeleton.packed for name in names)
        new: torch.dtype | None = None if packed else super().get_new_dtype(converter, param, dtype)
        return new

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.compression is not None and self.compression.takes(param_name)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self.compression is not None:
            return self.compression.element_size(param_name, param)
        return float(param.element_size())

    def get_quantize_ops(self) -> Any:
        assert self.compression is not None
        return self.compression.operation

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Before a model is saved: ``config.json`` is to say what its modules are now, by the checkpoint's names."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            written = rename_modules(saved_config(model), _renamed_modules(model), keep=True)
            model.config.quantization_config = CompressedTensorsConfig(**written.to_dict())
        return None, {}

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)  # type: ignore[no-untyped-call]
        remember_conversions(model)
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
                if isinstance(vars(module).get("hf_quantizer"), PartOfModel):
                    del module.hf_quantizer

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return decompress(model) if dtype is None else decompress(model).to(dtype)

    @property
    def is_trainable(self) -> bool:
        # By adapters: gradients pass through packed weights. Trainer itself asks that there be some.
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _share(model: Any, *, compressed: bool = True) -> None:
    """Prepare a model that is going to be split between processes."""
    if getattr(model.config, "distributed_config", None) is not None:
        from compressed_format.integrations.tensor_parallel import serve_styles

        serve_styles(model, compressed=compressed)


def _have_shared(model: Any) -> None:
    if getattr(model.config, "distributed_config", None) is not None:
        from compressed_format.integrations.tensor_parallel import (
            refuse_other_splits,
            restore_styles,
            split_what_was_tied,
        )

        restore_styles()
        split_what_was_tied(model)
        refuse_other_splits(model)


class PartOfModel(HfQuantizer):
    """Stands in the models within a compressed one, which cannot be saved alone: the config is that of the whole."""

    is_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        raise CheckpointError(
            "the model is part of a compressed one, whose config and names its tensors go by; save the whole model, "
            "or compress the part by itself"
        )


def attach_quantizer(
    model: Any,
    config: QuantizationConfig,
    *,
    quantizer: CompressedFormatQuantizer | None = None,
    written: QuantizationConfig | None = None,
) -> None:
    """Make the compressed ``model`` one that transformers knows to be quantized: it trains adapters, and saves itself.

    ``config`` is that of its modules, and ``written`` what stands in the model's own config.
    """
    attach_config(model, config)
    written = written or saved_config(model)
    quantizer = quantizer or CompressedFormatQuantizer(config)
    quantizer.quantization_config = CompressedTensorsConfig(**written.to_dict())
    retie(model)
    remember_conversions(model)
    say_computing_dtype(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._is_quantized = True
            if module is not model and compressed_modules(module) and "hf_quantizer" not in vars(module):
                module.hf_quantizer = PartOfModel(quantizer.quantization_config)  # type: ignore[assignment]


def misshapen(model: nn.Module, expected: Mapping[str, torch.Size]) -> dict[str, str]:
    """What was loaded into ``model`` in another shape than it has; releases before 5.23 leave that to quantizers."""
    return {
        name: f"has shape {list(tensor.shape)} in the checkpoint, and {list(expected[name])} in the model"
        for name, tensor in model.state_dict().items()
        if name in expected and tensor.shape != expected[name]
    }


def _refuse(model: Any, problems: list[Problem]) -> None:
    if problems:
        path = Path(model.config.name_or_path)
        raise CheckpointError(f"{path} does not fit the model {type(model).__name__}:", problems)


def _new_layers(model: Any, stored: Iterable[str]) -> list[str]:
    """Layers that a checkpoint of another class cannot have, since that has none: transformers initialises them."""
    classes = getattr(model.config, "architectures", None) or [type(model).__name__]
    prefix = f"{model.base_model_prefix}."
    if type(model).__name__ in classes or len(prefix) == 1:
        return []
    known = {name.rpartition(".")[0] for name in (*stored, *model.all_tied_weights_keys)} | _modules_of(
        classes[0], model.config
    )
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
        and known.isdisjoint((name, f"{prefix}{name}", name.removeprefix(prefix)))
    ]


def _modules_of(class_name: str, config: Any) -> set[str]:
    """The names of all modules in a model of a class of transformers; none for a class that it does not have."""
    found = getattr(transformers, class_name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return set()
    with torch.device("meta"):
        built = found(deepcopy(config))
    return {name for name, _ in built.named_modules()}


def _left_over(model: Any, stored: Mapping[str, StoredTensor], skeleton: Skeleton) -> Iterator[Problem]:
    """Modules that are stored packed and that nothing in ``model`` takes although it has them; biases that are missing.

    Of what is not compressed, transformers itself tells.
    """
    taken = {source for recipe in skeleton.recipes.values() for source in recipe.sources}
    taken |= skeleton.explained | model.state_dict().keys()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    told: set[str] = set()
    for name in sorted(stored.keys() - taken):
        module, _, suffix = name.rpartition(".")
        packed = (is_of_weight(suffix) and suffix.startswith("weight_")) or suffix in ("compressed", "bitmask")
        if packed and module not in told and not any(pattern.search(name) for pattern in ignored):
            told.add(module)
            if _has_place(model, module):
                message = f"is in the checkpoint, but no target of the config reaches {module}, which would stay random"
                yield Problem(name, message)
    for name, compressed in compressed_modules(model).items():
        if compressed._parameters.get("bias") is not None and f"{name}.bias" not in stored:
            yield Problem(f"{name}.bias", "is missing from the checkpoint")


def _has_place(model: Any, name: str) -> bool:
    """Whether ``model`` has the module ``name``, or one that holds its weight among others'; not a layer too few."""
    while name:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            name = name.rpartition(".")[0]
            continue
        return not isinstance(module, (nn.ModuleList, transformers.PreTrainedModel))
    return False


def _renamed_modules(model: Any) -> dict[str, str]:
    return module_names(checkpoint_names(model))
