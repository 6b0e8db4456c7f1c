"""Mixtures of experts that run from packed tensors: :class:`CompressedExperts`.

transformers keeps the weights of all experts of a layer in a few parameters ``[E, O, I]``; a file has them one by one,
in two dimensions. Here they are stacked, each projection for itself: slice ``e`` of a tensor is the one of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from compressed_format import ops
from compressed_format.activations import WHOLE_TENSOR, activation_scale
from compressed_format.config import CompressionFormat, QuantizationScheme
from compressed_format.config.experts import ExpertStack
from compressed_format.modules.base import CompressedModule, compressed_modules
from compressed_format.modules.expert_values import range_of_experts, rows_at
from compressed_format.modules.offloading import offloaded_state, onloaded
from compressed_format.quantization import QuantizedWeight

__all__ = [
    "CompressedExpertLinear",
    "CompressedExperts",
    "compressed_experts_class",
    "fuse_gate_and_up",
    "original_class",
    "stack_tensors",
    "stored_modules",
    "unstacked_state",
]


class CompressedExpertLinear(CompressedModule):
    """One projection of all experts: the tensors of ``E`` weights ``[O, I]``, stacked.

    ``tensors`` maps the checkpoint's suffixes to tensors with a first dimension of ``E``.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        shape: tuple[int, int, int],
        scheme: QuantizationScheme | None,
        format: CompressionFormat,
        *,
        sparsity: CompressionFormat | None = None,
        dtype: torch.dtype,
    ) -> None:
        self._set_up(tensors, shape[1:], scheme, format, sparsity, dtype)
        self.num_experts, self.out_features, self.in_features = shape

    def forward(self, input: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """``input`` ``[T, I]`` and ``experts`` int64 ``[T, k]`` to ``[T, k, O]``, in the dtype of ``input``.

        Expert ``E`` stands for none: its outputs are zero. Under autocast, activations are rounded first, in their own
        dtype, and then multiplied in that of autocast, as torch does with any two ops.
        """
        weight = self._weight_tensors()  # checked before activations are rounded
        if self._input is None:
            output = ops.expert_linear(input, experts, *weight, *self._layout)
        elif not torch.is_autocast_enabled(input.device.type):
            static = self._parameters.get("input_scale"), self._parameters.get("input_zero_point")
            output = ops.expert_quantized_linear(input, *static, *self._input, experts, *weight, *self._layout)
        elif self._input_of_tokens:
            output = ops.expert_linear(self._quantize_input(input), experts, *weight, *self._layout)
        else:
            # The scales differ from expert to expert, so each token is rounded for each of its own.
            input = input.unsqueeze(1).expand(-1, experts.shape[1], -1)
            input = self._quantize_for_experts(input, experts, "input").flatten(0, 1)
            output = ops.expert_linear(input, experts.reshape(-1, 1), *weight, *self._layout)
            output = output.reshape(*experts.shape, self.out_features)
        return self._quantize_for_experts(output, experts, "output")

    @property
    def _input_of_tokens(self) -> bool:
        """Whether inputs are rounded by their own values, token by token, whoever the expert is."""
        return "input_scale" not in self._parameters and self._input is not None and self._input[3] != WHOLE_TENSOR

    def _quantize_for_experts(self, values: torch.Tensor, experts: torch.Tensor, end: str) -> torch.Tensor:
        """Round ``values`` ``[T, k, n]`` with the scales of each token's expert: the static ones, or those of the
        values of all tokens that go to it."""
        arguments = self._input if end == "input" else self._output
        if arguments is None:
            return values
        scale: torch.Tensor | None = self._parameters.get(f"{end}_scale")
        zero_point: torch.Tensor | None = self._parameters.get(f"{end}_zero_point")
        if scale is None and arguments.group_size != WHOLE_TENSOR:
            return ops.fake_quantize(values, None, None, *arguments)
        if scale is None:
            bits, is_float, symmetric, _ = arguments
            ends = range_of_experts(values, experts, self.num_experts)
            scale, zero_point = (
                None if found is None else found.unsqueeze(-1)
                for found in activation_scale(*ends, bits, is_float, symmetric)
            )
        routed = experts.clamp(max=self.num_experts - 1)
        return ops.fake_quantize(values, rows_at(scale, routed), rows_at(zero_point, routed), *arguments)

    def checkpoint_parts(
        self, name: str, given: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of each expert, which a checkpoint names ``<stack>.<expert>.<projection>``.

        Where some of the stacked tensors are ``given``, they are taken apart, and no others.
        """
        stack, _, projection = name.rpartition(".")
        tensors = {suffix: value.data for suffix, value in self._parameters.items() if value is not None}
        return {
            f"{stack}.{expert}.{projection}": self._part(expert, tensors if given is None else given)
            for expert in range(self.num_experts)
        }

    def _part(self, expert: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = {suffix: tensor[expert] for suffix, tensor in tensors.items()}
        if "compressed" in part and "row_offsets" in self._parameters:
            # Experts have different numbers of values that are not zero, and are padded to the largest.
            bitmask = self._parameters["bitmask"][expert]  # type: ignore[index]  # it is where row_offsets are
            values = _SET_BITS.to(bitmask.device)[bitmask.flatten().to(torch.int64)].sum()
            part["compressed"] = part["compressed"][: int(values)]
        return part

    @staticmethod
    def join_parts(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of all experts, stacked."""
        return {suffix: stack_tensors(suffix, [part[suffix] for part in parts]) for suffix in parts[0]}

    def quantized_weight(self) -> QuantizedWeight:
        """The weights ``[E, O, I]`` as codes, scales and zero points, checked as strictly as when a file is decoded."""
        found = [self._decoded(tensors) for tensors in self.checkpoint_parts("").values()]
        stacked = {
            name: None if getattr(found[0], name) is None else torch.stack([getattr(one, name) for one in found])
            for name in ("codes", "scale", "zero_point", "global_scale", "g_idx")
        }
        return QuantizedWeight(**stacked)  # type: ignore[arg-type]  # codes there always are

    def _dense_weight(self, packed: tuple[torch.Tensor | None, ...], dtype: torch.dtype) -> torch.Tensor:
        slices = (tuple(None if tensor is None else tensor[e] for tensor in packed) for e in range(self.num_experts))
        return torch.stack([ops.dequantize(*one, *self._layout, dtype) for one in slices])

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return (self.num_experts, *self._weight_shape)

    def extra_repr(self) -> str:
        shape = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {self._describe()}"


class CompressedExperts(nn.Module):
    """The experts of one layer; stands before the class of transformers whose place it takes.

    That class says how gate and up meet and what follows the down projection. Its weights are gone: in their place
    are the modules ``gate_proj`` (where there is a gate), ``up_proj`` and ``down_proj``.
    """

    expert_stack: ExpertStack
    gate_proj: CompressedExpertLinear
    up_proj: CompressedExpertLinear
    down_proj: CompressedExpertLinear
    # Of the class of transformers:
    has_gate: bool
    has_bias: bool
    is_concatenated: bool
    is_transposed: bool
    gate_up_proj_bias: torch.Tensor
    up_proj_bias: torch.Tensor
    down_proj_bias: torch.Tensor
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    # Whether that class leaves it to transformers how gate and up meet: act_fn(gate) * up. There is then no need to put
    # them into one tensor first, which would only be taken apart again.
    _applies_gate_by_default = False
    # transformers initialises a module by its class, and would look for the weights that are gone.
    _is_hf_initialized = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[T, H]`` through the experts ``top_k_index`` ``[T, k]``, weighted by ``top_k_weights`` ``[T, k]``."""
        tokens, slots = top_k_index.shape
        bias = top_k_index.clamp(max=self.expert_stack.num_experts - 1) if self.has_bias else None
        up = self.up_proj(hidden_states, top_k_index)
        if self.has_gate:
            gate = self.gate_proj(hidden_states, top_k_index)
            if bias is None and self._applies_gate_by_default:
                hidden = self.act_fn(gate) * up
            else:
                fused = fuse_gate_and_up(self, gate, up)
                hidden = self._apply_gate(fused if bias is None else fused + self.gate_up_proj_bias[bias])
        else:
            hidden = self.act_fn(up if bias is None else up + self.up_proj_bias[bias])
        output = self.down_proj(hidden.flatten(0, 1), top_k_index.reshape(-1, 1))
        output = output.reshape(tokens, slots, self.down_proj.out_features)
        if bias is not None:
            output = output + self.down_proj_bias[bias]
        if getattr(self, "has_post_expert_norm", False):
            output = self.post_expert_norm(output)
        weighted: torch.Tensor = output * top_k_weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    @property
    def projections(self) -> dict[str, CompressedExpertLinear]:
        """The modules that hold the weights, by name."""
        found = {"gate_proj": self.gate_proj} if self.has_gate else {}
        return {**found, "up_proj": self.up_proj, "down_proj": self.down_proj}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle is told how to make it again.
        return _blank_experts, (original_class(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"num_experts={self.expert_stack.num_experts}"


def fuse_gate_and_up(experts: Any, gate: torch.Tensor, up: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Both in one tensor, along ``dim`` from the end, as the class of ``experts`` has them: in a row, or in turn."""
    if experts.is_concatenated:
        return torch.cat((gate, up), dim)
    return torch.stack((gate, up), dim).flatten(dim - 1, dim)


@cache
def compressed_experts_class(original: Any) -> type[CompressedExperts]:
    """The class of compressed experts that takes the place of ``original``."""
    name = f"Compressed{original.__name__}"
    applied = getattr(original, "_apply_gate", None)
    place = getattr(applied, "__module__", None), getattr(applied, "__name__", None)
    members = {
        "__module__": __name__,
        "__doc__": CompressedExperts.__doc__,
        "_applies_gate_by_default": place == ("transformers.integrations.moe", "_default_apply_gate"),
    }
    return type(name, (CompressedExperts, original), members)


def original_class(compressed: type[nn.Module]) -> Any:
    """The class whose place ``compressed`` takes."""
    return compressed.__mro__[compressed.__mro__.index(CompressedExperts) + 1]


def _blank_experts(original: Any) -> CompressedExperts:
    kind = compressed_experts_class(original)
    return kind.__new__(kind)


def stack_tensors(suffix: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all experts, stacked; values without zeros are padded to the most that an expert has."""
    longest = max(tensor.shape[0] for tensor in tensors) if suffix == "compressed" else 0
    if suffix == "compressed" and any(tensor.shape[0] != longest for tensor in tensors):
        stacked = tensors[0].new_zeros((len(tensors), longest))
        for expert, tensor in enumerate(tensors):
            stacked[expert, : tensor.shape[0]] = tensor
        return stacked
    return torch.stack(list(tensors))


_SET_BITS = torch.tensor([byte.bit_count() for byte in range(256)], device="cpu")


def stored_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """Every compressed module of ``model`` by the name that a checkpoint has for it; experts are named one by one."""
    found: dict[str, CompressedModule] = {}
    for name, module in compressed_modules(model).items():
        if not isinstance(module, CompressedExpertLinear):
            found[name] = module
            continue
        stack, _, projection = name.rpartition(".")
        found |= {f"{stack}.{expert}.{projection}": module for expert in range(module.num_experts)}
    return found


def unstacked_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each shared tensor once, and those of experts one by one:
    ``<stack>.<expert>.<projection>.<suffix>``."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    experts = {name: module for name, module in model.named_modules() if isinstance(module, CompressedExpertLinear)}
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in offloaded_state(model, model.state_dict(keep_vars=True)).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        place, _, suffix = name.rpartition(".")
        if place in experts:
            if place not in parts:
                with onloaded(experts[place], place):
                    parts[place] = experts[place].checkpoint_parts(place)
            state |= {f"{stored}.{suffix}": tensors[suffix] for stored, tensors in parts[place].items()}
        else:
            state[name] = tensor
    return state
