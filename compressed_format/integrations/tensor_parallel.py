"""transformers' tensor parallelism: its plans and styles, for models whose modules are compressed or not.

transformers applies its styles before it loads tensors, and each process then reads its part of each file. While a
compressed model is loaded, styles of our own stand in for them: they split compressed modules as
:mod:`compressed_format.parallel.sharding` says, and leave all others to the styles of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from transformers.distributed import tensor_parallel as transformers_parallel
from transformers.distributed.configuration_utils import DistributedConfig

from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.modules.base import CompressedModule, is_split
from compressed_format.modules.experts import CompressedExperts
from compressed_format.modules.linear import CompressedEmbedding, CompressedLinear
from compressed_format.parallel.split_weight import Sharding, plan_of, shard_tensor
from compressed_format.parallel.tensor_parallel import Layouts, add_layout_hooks

__all__ = ["refuse_other_splits", "restore_styles", "serve_styles", "split_what_was_tied", "with_distributed_config"]

# Any, because releases differ in where these come from.
_STYLES: Any = vars(transformers_parallel)["ALL_PARALLEL_STYLES"]
_wildcard: Any = vars(transformers_parallel)["replace_layer_number_by_wildcard"]
_WHOLE = Layouts(Replicate(), Replicate())
# By style: the dimension that is split of a Linear's weight, and of an Embedding's, where it is meant for them.
_SERVED: dict[str, tuple[int | None, int | None, Layouts]] = {
    "colwise": (0, 1, Layouts(Replicate(), Shard(-1))),
    "colwise_gather_output": (0, 1, _WHOLE),
    "colwise_rep": (0, 1, _WHOLE),
    "rowwise": (1, None, Layouts(Shard(-1), Replicate())),
    "rowwise_split_input": (1, 0, _WHOLE),
    "rowwise_rep": (1, 0, _WHOLE),
    "embedding_rowwise": (None, 0, _WHOLE),
    "embedding_colwise": (None, 1, _WHOLE),
}
# Styles that split nothing, and leave inputs and outputs what they are.
_HARMLESS = frozenset({"replicate", "mla_kv_a_proj", "replicated_with_grad_allreduce"})


class _Style(transformers_parallel.TensorParallelLayer):
    """A style of transformers that splits compressed modules too."""

    def __init__(self, name: str) -> None:
        self.name, self.original = name, _STYLES[name]
        self.linear, self.embedding, self.layouts = _SERVED[name]

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        if not isinstance(module, CompressedModule):
            self.original.validate_param(module, param, mesh, parameter_name=parameter_name)
        elif module._sharding is None:
            place = (parameter_name or param).rpartition(".")[0]
            dim = self.dimension(module)
            if dim is None:
                message = f"is a {type(module).__name__}, which the style {self.name} does not split"
                raise UnsupportedFormatError(problems=[Problem(place, message)])
            module._sharding = Sharding(plan_of(module, dim, mesh.size(), place), mesh)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if not isinstance(module, CompressedModule):
            self.original.shard_param(module, param, mesh)
        elif isinstance(module._sharding, Sharding) and module._parameters[param] is not None:
            shard_tensor(module, param, module._sharding.plan, mesh, None)

    def install_forward(self, module: nn.Module, mesh: Any) -> Any:
        if not isinstance(module, CompressedModule):
            return self.original.install_forward(module, mesh)
        add_layout_hooks(module, mesh, self.layouts)
        return module

    def dimension(self, module: CompressedModule) -> int | None:
        if isinstance(module, CompressedEmbedding):
            return self.embedding
        return self.linear if isinstance(module, CompressedLinear) else None


def with_distributed_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` with ``tp_plan`` and ``tp_size``, which it deprecates, as it wants them."""
    kept = {name: value for name, value in arguments.items() if name not in ("tp_plan", "tp_size")}
    if "distributed_config" in kept:
        raise TypeError("tp_plan and tp_size are part of distributed_config; give it them, or give them alone")
    config = DistributedConfig(tp_plan=arguments.get("tp_plan"), tp_size=arguments.get("tp_size"))
    return {**kept, "distributed_config": config}


def serve_styles(model: Any, *, compressed: bool = True) -> None:
    """Before ``model`` is split: make transformers' styles those that split compressed modules too.

    Nothing happens to a model that is not going to be split. ``compressed`` says whether it is, already.

    Raises :class:`UnsupportedFormatError` that lists every compressed module which the plan would split, or sum, in a
    way that is not served; also for one that is still to be compressed, from parts of its weights.
    """
    requested = getattr(model.config, "distributed_config", None)
    split = {kind for kind in ("tp", "ep", "fsdp", "dp") if (getattr(requested, f"{kind}_size", None) or 1) > 1}
    if split and not compressed:
        message = "a model cannot be compressed while its parts are loaded by different processes; compress and save it"
        raise UnsupportedFormatError(f"{type(model).__name__}: {message} in one, and load that")
    experts = [name for name, module in model.named_modules() if isinstance(module, CompressedExperts)]
    if experts and not split.isdisjoint(("fsdp", "dp")):
        message = "is stacked of whole experts as it is loaded; load the model without, and call fully_shard on it"
        raise UnsupportedFormatError("transformers cannot shard:", [Problem(name, message) for name in experts])
    if split.isdisjoint(("tp", "ep")):
        return
    given = getattr(requested, "tp_plan", None)
    plan = {**(model._tp_plan or {}), **(given if isinstance(given, Mapping) else {})}
    problems = list(_problems(model, plan))
    if problems:
        raise UnsupportedFormatError(f"{type(model).__name__} cannot be split like this:", problems)
    for name in _SERVED:
        if name in _STYLES and not isinstance(_STYLES[name], _Style):
            _STYLES[name] = _Style(name)
    _untie(model)


def restore_styles() -> None:
    """After a model is loaded: the names of styles mean again what they meant."""
    for name in _SERVED:
        style = _STYLES.get(name)
        if isinstance(style, _Style):
            del _STYLES[name]
            if _STYLES.get(name) is not style.original:
                _STYLES[name] = style.original


def _untie(model: nn.Module) -> None:
    """Give each compressed module parameters of its own; transformers ties them again when it has loaded them."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, CompressedModule):
            for name, value in module._parameters.items():
                if value is not None and id(value) in seen:
                    module._parameters[name] = nn.Parameter(torch.empty_like(value), requires_grad=value.requires_grad)
                seen.add(id(value))


def split_what_was_tied(model: nn.Module) -> None:
    """Split the tensors of modules that are to be split, and have got those of one that is not."""
    for module in model.modules():
        if isinstance(module, CompressedModule) and isinstance(module._sharding, Sharding):
            for name, value in module._parameters.items():
                if value is not None and not is_split(value):
                    shard_tensor(module, name, module._sharding.plan, module._sharding.mesh, None)


def refuse_other_splits(model: nn.Module) -> None:
    """Raise :class:`UnsupportedFormatError` for compressed modules that something else has split."""
    problems = [
        Problem(name, "was split without regard to words and groups, by something that does not know packed tensors")
        for name, module in model.named_modules()
        if isinstance(module, CompressedModule)
        and module._sharding is None
        and not _is_fully_sharded(module)
        and any(is_split(value) for value in module._parameters.values() if value is not None)
    ]
    if problems:
        raise UnsupportedFormatError("compressed modules cannot run from what they hold:", problems)


def _is_fully_sharded(module: nn.Module) -> bool:
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def _problems(model: nn.Module, plan: Mapping[str, str]) -> Iterator[Problem]:
    for name, module in model.named_modules():
        style = plan.get(_wildcard(name), "replicate")
        inside = [part for part in module.modules() if isinstance(part, CompressedModule)]
        if not inside or style in _HARMLESS:
            continue
        if isinstance(module, (CompressedLinear, CompressedEmbedding)):
            if style not in _SERVED:
                yield Problem(name, f"is compressed, and the style {style} of the plan is not served for such modules")
        elif style not in _SERVED:
            message = (
                f"holds compressed modules, whose results the style {style} of the plan would change; give another"
            )
            yield Problem(name, message)
