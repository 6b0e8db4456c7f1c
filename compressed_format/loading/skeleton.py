"""Turns a freshly built model into one that can take a checkpoint's tensors as they are, and finishes it after.

The two ways of loading share this: a module given by the caller, and transformers' ``from_pretrained``. Only headers
are read before the tensors are in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from frozendict import frozendict
from torch import nn

from compressed_format.bitpack import unpack_codes
from compressed_format.compression.experts import dense_stacks, projection_assignments
from compressed_format.compression.modules import compressed_successor, treatment
from compressed_format.compression.unserved import refuse_what_cannot_run
from compressed_format.config import (
    FORMAT_VERSION,
    Assignment,
    QuantizationConfig,
    resolve_targets,
)
from compressed_format.errors import CompressedFormatWarning, FormatError, Problem, UnsupportedFormatError
from compressed_format.formats import SPARSITY_FORMATS
from compressed_format.formats.base import StoredTensor, decode_g_idx
from compressed_format.loading.experts import StackedExperts, dense_recipes, stack_experts
from compressed_format.loading.fitting import FitTable, meta_tensor
from compressed_format.loading.fused_experts import Recipe
from compressed_format.loading.kv_cache import keep_cache_scales
from compressed_format.loading.older_layouts import modernize, older_layout, without_marlin
from compressed_format.modules.base import CompressedModule, is_of_weight, is_split
from compressed_format.modules.first_use import check_scales_of
from compressed_format.modules.module_table import ModuleTable
from compressed_format.modules.offloading import is_offloaded, onloaded

__all__ = ["Skeleton"]

_OF_PACKED_WEIGHTS = frozenset({"weight_packed", "weight_scale", "compressed"})


class Skeleton:
    """Swaps compressed modules into ``model`` for what ``config`` targets.

    ``stored`` describes the checkpoint's tensors by the model's names for them; ``read`` yields one of them. Without it
    all that is swapped in is on the meta device, and with it what is ``placed``: the tensors that a single module
    takes as they are, by name, hold their values at once. ``tied`` maps parameters that will be
    tied once they are loaded to those they will be; others share one already. Afterwards ``problems`` holds what
    does not fit, ``experts_fit`` whether all stacks of experts do, ``packed`` the names that must keep their stored
    dtype, and ``explained`` the names that need no further word, because a problem or a warning has told of them.

    Raises :class:`UnsupportedFormatError` for everything that would not run correctly, by feature and module.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QuantizationConfig,
        stored: Mapping[str, StoredTensor],
        *,
        tied: Mapping[str, str] = frozendict(),
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.problems: list[Problem] = []
        self.packed: set[str] = set()
        self.explained: set[str] = set()
        self.experts_fit = True
        self.placed: dict[str, nn.Parameter] = {}
        self._read = read
        self.modules = ModuleTable(model)
        self._twins = _modules_sharing_weights(self.modules, tied)
        self._fits = FitTable()
        self._modules: dict[str, CompressedModule] = {}
        # Where zero points are stored that the scheme has none of: the assignment, and the rows of the weight.
        self._zero_points: dict[str, tuple[Assignment, int]] = {}
        self.recipes: dict[str, Recipe] = {}
        self._dense_recipes: dict[str, Recipe] = {}
        by_module: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            module, _, suffix = name.rpartition(".")
            by_module.setdefault(module, {})[suffix] = tensor
        packed = {name for name, tensors in by_module.items() if not tensors.keys().isdisjoint(_OF_PACKED_WEIGHTS)}
        resolution = resolve_targets(self.modules, config, quantized=packed)
        for problem in resolution.warnings:
            warnings.warn(str(problem), CompressedFormatWarning, stacklevel=4)
        refuse_what_cannot_run(self.modules, config, resolution.assignments)
        for name, (experts, stack) in dense_stacks(self.modules).items():
            assignments = projection_assignments(name, stack, resolution)
            if assignments:
                self._swap_experts(name, stack_experts(name, experts, stack, assignments, by_module, self._fits))
            else:
                self._dense_recipes |= dense_recipes(name, experts, stack)
        without_weight: dict[str, Assignment] = {}
        for name, assignment in resolution.assignments.items():
            if not self.modules.is_first_name(name):
                continue  # one of a stack of experts
            owns = [place for place in self.modules.names(name) if _holds_weight(by_module.get(place, {}))]
            if owns:
                self._swap(name, assignment, by_module[owns[0]], place=owns[0])
            else:
                without_weight[name] = assignment
        for name, assignment in without_weight.items():
            self._swap_twin(name, assignment, by_module, resolution.assignments)
        self.packed |= keep_cache_scales(model, by_module, self.explained)
        self._pass_over(_computed_buffers(self.modules, stored))

    def all_recipes(self, stored: Container[str]) -> dict[str, Recipe]:
        """How tensors of the model that are not ``stored`` as they are can be made, for whoever loads them alone.

        transformers has its own way for uncompressed experts, and goes by :attr:`recipes` for compressed ones.
        """
        dense = {
            target: recipe
            for target, recipe in self._dense_recipes.items()
            if all(source in stored for source in recipe.sources)
        }
        return {**self.recipes, **dense}

    def zero_point_problems(self, read: Callable[[str], torch.Tensor]) -> list[Problem]:
        """What is wrong with zero points that are stored where a symmetric scheme has none: those that are not zero.

        ``read`` yields a stored tensor by the model's name for it; it is asked for these only.
        """
        problems = []
        for name, (assignment, rows) in self._zero_points.items():
            tensor = read(name)
            if tensor.dtype == torch.int32 and assignment.scheme is not None and assignment.scheme.weights is not None:
                bits = assignment.scheme.weights.num_bits
                rows = self._modules[name.rpartition(".")[0]]._weight_shape[0]
                packed = tensor.reshape(-1, tensor.shape[-1]).T.contiguous()
                if tensor.any() and packed.shape[1] * 32 >= rows * bits:
                    tensor = unpack_codes(packed, bits, rows)
            if tensor.to(torch.float32).count_nonzero():
                message = f"holds zero points that are not zero, but the scheme is symmetric ({assignment.reason})"
                problems.append(Problem(name, message))
        return problems

    def finish(self, dtype: torch.dtype | None = None) -> None:
        """Check what must not be run, and re-encode layouts that are read but not run. Call it once, last.

        Scales are looked at when a module is first used, unless they are split between processes then.

        ``dtype`` becomes that of the compressed modules' weights and of embeddings looked up. Tensors that accelerate
        has offloaded are read for it, and those that are re-encoded are offloaded again.

        Raises :class:`FormatError` for values that contradict the format, and :class:`UnsupportedFormatError` for
        modules that are on the meta device and would have to be re-encoded.
        """
        problems: list[Problem] = []
        unread: list[Problem] = []
        done: dict[nn.Parameter | None, CompressedModule] = {}
        re_encoded = {"word-aligned": 0, "unpacked zero-point": 0, "marlin-24": 0}
        for name, module in self._modules.items():
            if dtype is not None:
                vars(module)["dtype"] = dtype
            vars(module)["_unchecked"] = name
            if module._sharding is not None:
                problems += module._sharding.problems(module, self.config.version, name)
                continue
            values = [value for value in module._parameters.values() if value is not None]
            if any(type(value) is not nn.Parameter and is_split(value) for value in values):
                problems += self._problems_of_whole(name, module)
                continue
            weight = module._parameters[module._weight_name]
            twin = done.setdefault(weight, module)
            # What is offloaded is kept for each module under its own name, so that twins are finished one by one.
            offloaded = is_offloaded(module)
            if twin is not module and not offloaded:
                module.share_weight(twin)
                continue
            if module._modules:
                values = list(module.parameters())
            if not offloaded and any(value.is_meta for value in values):
                # Whoever loads the model has the values; what they need not be asked for is checked.
                layout = older_layout(module)
                if layout is not None:
                    message = (
                        f"is stored in the {layout} layout, which is re-encoded as it is loaded; load it on a device"
                    )
                    unread.append(Problem(name, message))
                continue
            try:
                with onloaded(module, name) if offloaded else nullcontext():
                    _check_values(name, module)
                    legacy = modernize(name, module, self.config.version)
            except FormatError as error:
                problems.extend(error.problems)
                continue
            if twin is not module:
                module.share_weight(twin)
            elif legacy is not None:
                re_encoded[legacy] += 1
        if any(module._sharding is not None for module in self._modules.values()):
            from compressed_format.parallel.gathering import problems_of_all

            problems = problems_of_all(problems)
        if problems:
            raise FormatError("the checkpoint contradicts itself:", problems)
        if unread:
            raise UnsupportedFormatError("the checkpoint needs what cannot be done on the meta device:", unread)
        for legacy, count in re_encoded.items():
            if count:
                message = f"{count} modules were stored in the {legacy} layout, and are held as pack-quantized now"
                warnings.warn(message, CompressedFormatWarning, stacklevel=4)
        if any(re_encoded.values()):
            self.config = without_marlin(self.config).model_copy(update={"version": FORMAT_VERSION})

    def _pass_over(self, computed: list[str]) -> None:
        """compressed-tensors stores all buffers of what it compresses, as the scale of Gemma's embedding."""
        if computed:
            counted = f"{computed[0]} is" if len(computed) == 1 else f"{len(computed)} tensors ({computed[0]}, …) are"
            message = f"{counted} in the checkpoint, but computed by the model; what is stored is not used"
            warnings.warn(message, CompressedFormatWarning, stacklevel=5)
            self.explained.update(computed)

    def _problems_of_whole(self, name: str, module: CompressedModule) -> list[Problem]:
        from compressed_format.parallel.gathering import problems_of_whole

        def check() -> None:
            check_scales_of(name, module)
            _check_values(name, module)
            modernize(name, module, self.config.version)

        return problems_of_whole(name, module, check)

    def _swap(
        self,
        name: str,
        assignment: Assignment,
        stored: Mapping[str, StoredTensor],
        twin: CompressedModule | None = None,
        *,
        place: str | None = None,
    ) -> None:
        """Put a compressed module wherever the module ``name`` is; it shares its weight with ``twin``.

        Where all of ``stored`` is stored for one ``place``, it holds these tensors, if there is a way to read them.
        """
        module = self.modules[name]
        assert isinstance(module, (nn.Linear, nn.Embedding))  # nothing else is ever assigned
        # As module.weight is, in a tenth of the time.
        weight = module._parameters["weight"]
        assert weight is not None
        rows, columns = weight.shape
        fit = self._fits.fit(
            name, assignment, stored, (rows, columns), columns if isinstance(module, nn.Embedding) else rows
        )
        if fit.problems:
            self.explained.update(f"{name}.{suffix}" for suffix in (*stored, "weight"))
            self.problems += fit.problems
            return
        for suffix in fit.needless:
            self.explained.add(f"{name}.{suffix}")
            self._zero_points[f"{name}.{suffix}"] = assignment, rows
        if self._read is None or place is None:
            tensors = {suffix: meta_tensor(tensor) for suffix, tensor in fit.tensors.items()}
            compressed = compressed_successor(module, tensors, assignment, weight)
        else:
            sources = {suffix: f"{place}.{suffix}" for suffix in fit.tensors}
            tensors = {suffix: self._read(source) for suffix, source in sources.items()}
            compressed = compressed_successor(module, tensors, assignment, weight)
            held: Any = compressed._parameters
            self.placed.update([(source, held[suffix]) for suffix, source in sources.items()])
        if twin is not None:
            compressed.share_weight(twin)
        self._modules[name] = compressed
        self.modules.replace(name, compressed)
        self.packed.update([f"{found}.{suffix}" for found in self.modules.names(name) for suffix in tensors])

    def _swap_experts(self, name: str, found: StackedExperts) -> None:
        self.problems += found.problems
        self.explained |= found.explained | found.needless.keys()
        self._zero_points |= found.needless
        if found.module is None:
            self.experts_fit = False
            return
        self.recipes |= found.recipes
        for projection, module in found.module.projections.items():
            if module.scheme is not None or module.sparsity is not None:
                self._modules[f"{name}.{projection}"] = module
                for place in self.modules.names(name):
                    self.packed.update(f"{place}.{projection}.{suffix}" for suffix in module._parameters)
        self.modules.replace(name, found.module)

    def _swap_twin(
        self,
        name: str,
        assignment: Assignment,
        by_module: Mapping[str, Mapping[str, StoredTensor]],
        assignments: Mapping[str, Assignment],
    ) -> None:
        """As :meth:`_swap`, for a module without a weight of its own: it is tied to another one, or misses it."""
        own = by_module.get(name, {})
        for other in self._twins.get(name, ()):
            conflict = None
            if other not in assignments and "weight" in by_module.get(other, {}):
                conflict = f"which is stored dense, but {assignment.reason}; list {name} in ignore"
            elif other in self._modules and treatment(assignments[other]) != treatment(assignment):
                conflict = f"where {assignments[other].reason}, but {assignment.reason}"
            if conflict is not None:
                self.problems.append(Problem(f"{name}.weight", f"is that of {other}, {conflict}"))
                self.explained.add(f"{name}.weight")
                return
            if other in self._modules:
                stored = next(
                    by_module[place] for place in self.modules.names(other) if _holds_weight(by_module.get(place, {}))
                )
                weight = {suffix: tensor for suffix, tensor in stored.items() if is_of_weight(suffix)}
                self._swap(name, assignment, {**own, **weight}, self._modules[other])
                return
        self._swap(name, assignment, own)


def _computed_buffers(modules: ModuleTable, stored: Container[str]) -> list[str]:
    """The names of ``stored`` tensors that are buffers which no state dict holds, since the model computes them."""
    return [
        place
        for name, module in modules.named_modules()
        if module._non_persistent_buffers_set
        for suffix in sorted(module._non_persistent_buffers_set)
        if (place := f"{name}.{suffix}".lstrip(".")) in stored
    ]


def _check_values(name: str, module: CompressedModule) -> None:
    """Raise :class:`FormatError` for values by which memory would be read that is not the tensor's.

    Few modules have any, so that most are not looked at; what else spoils a result is found at the first use.
    """
    if module.sparsity is None and "weight_g_idx" not in module._parameters:
        return
    parts = module.checkpoint_parts(name)
    if not [place for place, tensors in parts.items() if _check_tensors(place, module, tensors)]:
        module._parameters.pop("weight_g_idx", None)


def _check_tensors(place: str, module: CompressedModule, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Check the tensors of one weight; whether its ``weight_g_idx`` means anything."""
    if module.sparsity is not None:
        expected, found = list(module._weight_shape), tensors["shape"].flatten().tolist()
        if found != expected:
            message = f"says {found}, but the module's weight is {expected}"
            raise FormatError(problems=[Problem(f"{place}.shape", message)])
        SPARSITY_FORMATS[module.sparsity].check(tensors, place=place)
    if "weight_g_idx" not in tensors:
        return False
    # None: never set by the release that wrote it.
    groups = tensors["weight_scale"].shape[-1]
    return decode_g_idx(tensors["weight_g_idx"], module._weight_shape[1], groups, place) is not None


def _modules_sharing_weights(modules: ModuleTable, tied: Mapping[str, str]) -> dict[str, list[str]]:
    """For each module whose weight others have too, or will have by ``tied``: these others."""
    weights = {
        name: id(weight)
        for name, module in modules.named_modules()
        if (weight := module._parameters.get("weight")) is not None
    }
    for target, source in tied.items():
        names = target.removesuffix(".weight"), source.removesuffix(".weight")
        if all(name in weights for name in names):
            weights[names[0]] = weights[names[1]]
    owners: dict[int, list[str]] = {}
    for name, identity in weights.items():
        owners.setdefault(identity, []).append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    return {name: [other for other in names if other != name] for names in shared for name in names}


def _holds_weight(stored: Mapping[str, StoredTensor]) -> bool:
    return any(is_of_weight(suffix) for suffix in stored)
