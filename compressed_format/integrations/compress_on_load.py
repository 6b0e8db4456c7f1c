"""Dense weights that are compressed while transformers loads them, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from compressed_format.calibrate import needs_calibration
from compressed_format.compression.experts import compress_experts, expert_linears
from compressed_format.compression.in_place import places_of_modules
from compressed_format.compression.modules import check_modules, compress_module, treatment, value_problems
from compressed_format.compression.plan import PlannedStack, plan_compression
from compressed_format.compression.ties import announce_broken_ties
from compressed_format.config import Assignment, QuantizationConfig
from compressed_format.errors import CalibrationError, CheckpointError, Problem, QuantizationError
from compressed_format.integrations.checkpoint_names import own_names
from compressed_format.integrations.expert_conversion import ConversionByName
from compressed_format.integrations.tied_weights import retie
from compressed_format.modules.base import CompressedModule

__all__ = ["CompressionOnLoad"]


class CompressionOnLoad:
    """Compresses what ``config`` targets in ``model``, which is on the meta device, weight by weight as they arrive.

    The result is that of :func:`~compressed_format.compress` on the loaded model. ``stored`` holds the names of the
    checkpoint's tensors, as the model has them, and ``device_map`` is that of ``from_pretrained``. Raises what
    ``compress`` does, but for what only values tell, which :meth:`finish` raises. Static activation scales need data,
    and are a :class:`CalibrationError`.
    """

    def __init__(
        self, model: Any, config: QuantizationConfig, *, stored: Collection[str], device_map: Any = None
    ) -> None:
        self.model = model
        self._device_map: Mapping[str, Any] = device_map if isinstance(device_map, Mapping) else {}
        self.operation, self.conversion = _Compress(self), _CompressWeights(self)
        resolution, modules, stacks = plan = plan_compression(model, config)
        self._left: dict[str, Assignment] = {name: resolution.assignments[name] for name in modules}
        self._stacks: dict[str, PlannedStack] = stacks
        for name, assignment in resolution.assignments.items():
            if assignment.scheme is not None and needs_calibration(assignment.scheme):
                raise CalibrationError(
                    f"{name} has static activation scales, which need data: load the model without "
                    "quantization_config=, and call compress(model, config, calibration=...)"
                )
        check_modules(plan.targeted(plan.experts()), resolution, values=False)
        self._sharing = _sharing(model, stored)
        ties = {name: names for names in self._sharing.values() if len(names) > 1 for name in names}
        announce_broken_ties(model, ties, resolution)
        self._places = places_of_modules(model)
        self._problems: list[Problem] = []
        self._twins: list[tuple[CompressedModule, CompressedModule]] = []
        # transformers' own set of the names that it waits for, or has waited for in vain.
        self._missing: set[str] = set()

    def takes(self, name: str) -> bool:
        """Whether the tensor ``name`` of the dense model becomes part of a compressed module."""
        module, _, suffix = name.rpartition(".")
        if module in self._stacks:
            return self._stacks[module][0]._parameters[suffix] is not None and not suffix.endswith("_bias")
        return any(place in self._left for place in self._sharing.get(name, ()))

    def takes_weight(self, name: str) -> bool:
        """Whether the tensor ``name`` is the whole weight of a module to be compressed; that of experts is not."""
        return name.rpartition(".")[0] not in self._stacks and self.takes(name)

    def element_size(self, name: str, parameter: torch.Tensor) -> float:
        """How many bytes each element of a dense parameter takes once it is compressed, without its scales."""
        module, _, suffix = name.rpartition(".")
        of_stack = self._stacks[module][2].values() if module in self._stacks and self.takes(name) else ()
        candidates = [self._left.get(module) if suffix == "weight" else None, *of_stack]
        schemes = [found.scheme.weights for found in candidates if found is not None and found.scheme is not None]
        return max((args.num_bits / 8 for args in schemes if args is not None), default=float(parameter.element_size()))

    def arrived(self, name: str, tensor: torch.Tensor, missing: set[str]) -> dict[str, torch.Tensor]:
        """Put compressed modules, still without data, where the dense tensor ``name`` belongs; returns their tensors.

        transformers then puts these where its device map says, the disk included. ``missing`` holds the names that
        it still waits for.
        """
        self._missing = missing
        if name.rpartition(".")[0] in self._stacks:
            return self._expert_tensors(name, tensor, missing)
        tensors: dict[str, torch.Tensor] = {}
        twins: dict[Any, CompressedModule] = {}
        for place in self._sharing.get(name, ()):
            missing.discard(f"{place}.weight")
            assignment = self._left.pop(place, None)
            module = self.model.get_submodule(place)
            if assignment is None:
                tensors[f"{place}.weight"] = tensor
                continue
            module._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
            wrong = value_problems(module, assignment)
            self._problems += [Problem(place, problem.message) for problem in wrong]
            if wrong:
                tensors[f"{place}.weight"] = tensor
                continue
            compressed = compress_module(module, assignment, {}, place)
            emptied = {f"{place}.{suffix}": value for suffix, value in _emptied(compressed)}
            twin = twins.setdefault(treatment(assignment), compressed)
            if twin is not compressed:
                self._twins.append((compressed, twin))
            if twin is compressed or self._is_on_disk(place):  # where each name has tensors of its own
                tensors |= emptied
            else:
                missing.update(emptied)
            self._put(module, compressed)
        for compressed, twin in self._twins:
            compressed.share_weight(twin)  # again and again, for transformers puts new parameters into the twin
        retie(self.model)
        return tensors

    def finish(self) -> None:
        """Raise what was found while the weights arrived: NaN and the like, and weights that never did."""
        if self._problems:
            raise QuantizationError("weights that cannot be compressed:", self._problems)
        absent = [Problem(f"{name}.weight", _ABSENT) for name in self._left]
        absent += [Problem(name, _ABSENT) for name in self._stacks]
        for name, module in self.model.named_modules():
            bias = module._parameters.get("bias") if isinstance(module, CompressedModule) else None
            if f"{name}.bias" in self._missing and not getattr(bias, "_is_hf_initialized", bias is None):
                absent.append(Problem(f"{name}.bias", "is missing from the checkpoint"))
        if absent:
            raise CheckpointError(f"{self.model.config.name_or_path} does not fit the model:", absent)

    def _expert_tensors(self, name: str, tensor: torch.Tensor, missing: set[str]) -> dict[str, torch.Tensor]:
        """As :meth:`arrived`, for a stack of experts: it is compressed once all of its weights are there."""
        place, _, suffix = name.rpartition(".")
        module, stack, assignments = self._stacks[place]
        missing.discard(name)
        module._parameters[suffix] = nn.Parameter(tensor, requires_grad=False)
        if any(
            self.takes(f"{place}.{other}") and value.is_meta for other, value in module.named_parameters(recurse=False)
        ):
            return {}
        del self._stacks[place]
        for full_name, linear in expert_linears(module, stack, place).items():
            assignment = assignments[full_name.rpartition(".")[2]]
            wrong = () if assignment is None else value_problems(linear, assignment)
            self._problems += [Problem(full_name, problem.message) for problem in wrong]
        if self._problems:
            return {}
        compressed = compress_experts(module, stack, assignments, place, {})
        tensors = {
            f"{place}.{projection}.{suffix}": value
            for projection in assignments
            for suffix, value in _emptied(compressed.get_submodule(projection))
        }
        self._put(module, compressed)
        return tensors

    def _is_on_disk(self, name: str) -> bool:
        around = [place for place in self._device_map if not place or f"{name}.".startswith(f"{place}.")]
        return bool(around) and self._device_map[max(around, key=len)] == "disk"

    def _put(self, module: nn.Module, compressed: nn.Module) -> None:
        """``compressed`` in every place of ``module``; its tensors need no initialisation."""
        for part in compressed.modules():
            # A flag of transformers, which computes buffers that are in no checkpoint.
            part._is_hf_initialized = not part._buffers  # type: ignore[assignment]
        for parent, child in self._places[id(module)]:
            setattr(parent, child, compressed)


_ABSENT = "is missing from the checkpoint, and what is random cannot be compressed; list it in ignore"


class _CompressWeights(ConversionByName):
    """Compresses weights that transformers takes as they are stored, and would only give another name.

    It is a conversion because what comes out of one is written anew where it belongs on disk: transformers would leave
    it where it is in the dense checkpoint if it goes by the same name, as codes that are called ``weight``.
    """

    def __init__(self, compression: CompressionOnLoad) -> None:
        super().__init__()
        self.compression = compression

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        for own in own_names(source_key, self.compression.model.base_model_prefix, {}):
            if self.compression.takes_weight(own):
                return own, self.pattern
        return source_key, None

    def convert(self, layer_name: str, *args: Any, loading_info: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        ((tensor,),) = self.materialize_tensors().values()
        return self.compression.arrived(layer_name, tensor, loading_info.missing_keys)


class _Compress(ConversionOps):
    """What transformers applies to what it has made of dense tensors, if :meth:`CompressionOnLoad.takes` that."""

    def __init__(self, compression: CompressionOnLoad) -> None:
        self.compression = compression

    def convert(self, input_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        missing_keys: set[str] | None = kwargs.get("missing_keys")
        tensors: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.compression.takes(name):
                tensors |= self.compression.arrived(name, tensor, set() if missing_keys is None else missing_keys)
            else:
                tensors[name] = tensor
        return tensors


def _emptied(compressed: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a compressed module, which then has tensors without data in their place; not its bias."""
    for suffix, parameter in list(compressed._parameters.items()):
        if parameter is not None and suffix != "bias":
            compressed._parameters[suffix] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )
            yield suffix, parameter.data


def _sharing(model: Any, stored: Collection[str]) -> dict[str, tuple[str, ...]]:
    """For each weight by name: the modules that will have it, which are tied to each other and not stored apart."""
    modules = {
        f"{name}.weight": name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module._parameters.get("weight") is not None
    }
    sources = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target in modules and source in modules and not (target in stored and source in stored)
    }
    groups: dict[str, list[str]] = {}
    for weight, name in modules.items():
        groups.setdefault(sources.get(weight, weight), []).append(name)
    return {weight: tuple(groups[sources.get(weight, weight)]) for weight in modules}
