"""What a consumer will see of a checkpoint: groups, the layers each of them has, and their sizes. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from compressed_format.checking.findings import Code, Finding
from compressed_format.config import (
    Assignment,
    CompressionFormat,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    TransformLocation,
    resolve_targets,
)
from compressed_format.config.modules import NamedModule
from compressed_format.config.scheme import describe_scheme

__all__ = ["Layer", "LayerShape", "Plan", "Use", "likeness", "stacked_experts"]

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.+)")
_STACKED = re.compile(r".*\bexperts\.\w*proj(_packed|_scale|\.weight_packed|\.weight_scale)")
# The last parts of the names of layers that tensor parallelism splits along their inputs.
_SPLIT_BY_INPUTS = frozenset(
    {"o_proj", "down_proj", "out_proj", "wo", "w2", "c_proj", "fc2", "dense_4h_to_h", "dense", "proj_out"}
)
# Of those that it splits along their outputs, the ones of which a part is never shared.
_SPLIT_BY_OUTPUTS = frozenset({"q_proj", "wq", "query", "gate_proj", "up_proj", "w1", "w3", "fc1", "dense_h_to_4h"})
_ONLINE = frozenset(
    {TransformLocation.INPUT, TransformLocation.OUTPUT, TransformLocation.K_CACHE, TransformLocation.Q_ATTN}
)


class LayerShape(NamedTuple):
    """One Linear or Embedding of a checkpoint, compressed or not.

    ``shape`` is that of the dense weight, ``[O, I]``, or None where it is not known; ``classes`` are the names of its
    class and base classes, the most derived first.
    """

    shape: tuple[int, ...] | None
    classes: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True)
class Layer:
    """One layer, and what the config makes of it: ``assignment`` is None where it stays dense."""

    name: str
    shape: tuple[int, ...] | None
    classes: tuple[str, ...]
    assignment: Assignment | None
    ignored: bool

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def stack(self) -> str | None:
        """The name before the number of the expert, where the layer is a part of one."""
        match = _EXPERT.fullmatch(self.name)
        return match[1] if match else None

    @property
    def is_embedding(self) -> bool:
        return "Embedding" in self.classes

    @property
    def scheme(self) -> QuantizationScheme | None:
        return None if self.assignment is None else self.assignment.scheme

    @property
    def is_split_by_inputs(self) -> bool:
        """Whether tensor parallelism gives each GPU a part of its columns."""
        return self.leaf in _SPLIT_BY_INPUTS

    @property
    def is_split_by_outputs(self) -> bool:
        """Whether tensor parallelism gives each GPU a part of its rows, and no other one the same part."""
        return self.leaf in _SPLIT_BY_OUTPUTS

    @property
    def as_module(self) -> NamedModule:
        return NamedModule(self.name, self.classes)


@dataclass(frozen=True)
class Use:
    """A group as one kind of layer uses it: ordinary ones, embeddings, or experts. ``layers`` are none where only a
    config is known."""

    group: str
    scheme: QuantizationScheme
    format: CompressionFormat
    layers: tuple[Layer, ...]
    experts: bool = False
    embeddings: bool = False

    @property
    def place(self) -> str:
        return f"config_groups.{self.group}"

    @property
    def weights(self) -> QuantizationArgs | None:
        return self.scheme.weights

    @property
    def inputs(self) -> QuantizationArgs | None:
        return self.scheme.input_activations

    @property
    def group_size(self) -> int | None:
        weights = self.scheme.weights
        return None if weights is None or weights.strategy is not QuantizationStrategy.GROUP else weights.group_size

    def __str__(self) -> str:
        return f"{describe_scheme(self.scheme)} in {self.format.value}"


class Plan:
    """A config applied to layers, and the findings about it.

    ``tensors`` are names and shapes of a checkpoint's tensors, where there is one already; ``word_aligned`` the
    modules in the layout of releases before 0.18. Raises as
    :func:`~compressed_format.config.resolve_targets` does.
    """

    def __init__(
        self,
        config: QuantizationConfig,
        layers: Mapping[str, LayerShape],
        *,
        quantized: Container[str] = (),
        tensors: Mapping[str, Sequence[int]] | None = None,
        word_aligned: Collection[str] = (),
    ) -> None:
        self.config = config
        self.tensors = tensors or {}
        self.word_aligned = tuple(word_aligned)
        self._found: dict[tuple[Code, str], list[str]] = {}
        resolution = resolve_targets(
            {name: layer.classes for name, layer in layers.items()}, config, quantized=quantized
        )
        self.layers = tuple(
            Layer(name, layer.shape, layer.classes, resolution.assignments.get(name), name in resolution.ignored)
            for name, layer in layers.items()
        )

    def say(self, code: Code, place: str, message: str) -> None:
        """Make a finding. What is said of many places alike becomes one of them, at the first place."""
        self._found.setdefault((code, message), []).append(place)

    def findings(self) -> Iterator[Finding]:
        """The findings, in the order in which they were first made."""
        for (code, message), places in self._found.items():
            more = f" (the same in {len(places) - 1} more)" if len(places) > 1 else ""
            yield code.at(places[0], f"{code.consumer}: {message}{more}" if code.consumer else f"{message}{more}")

    @cached_property
    def uses(self) -> tuple[Use, ...]:
        """The groups with quantized weights; those of which no layer is known as ordinary layers' (or embeddings')."""
        found: dict[tuple[str, bool, bool], list[Layer]] = {}
        for layer in self.layers:
            assignment = layer.assignment
            if assignment is not None and assignment.group is not None:
                key = (assignment.group, layer.stack is not None, layer.is_embedding)
                found.setdefault(key, []).append(layer)
        used = {group for group, *_ in found}
        for group, scheme in self.config.config_groups.items():
            if group not in used:
                found[group, False, set(scheme.targets) == {"Embedding"}] = []
        uses = []
        for (group, experts, embeddings), layers in found.items():
            scheme = self.config.config_groups[group]
            if scheme.weights is not None:
                uses.append(Use(group, scheme, self.config.format_of(scheme), tuple(layers), experts, embeddings))
        return tuple(uses)

    @property
    def online_transforms(self) -> Iterator[tuple[str, TransformLocation]]:
        """Place and location of each rotation that is to be applied while the model runs."""
        transforms = self.config.transform_config
        for name, scheme in ({} if transforms is None else transforms.config_groups).items():
            for index, applied in enumerate(scheme.apply):
                if applied.location in _ONLINE:
                    yield f"transform_config.config_groups.{name}.apply[{index}]", applied.location

    @property
    def stacked(self) -> Iterator[str]:
        """The names of tensors that hold all experts of a layer, compressed."""
        return stacked_experts(self.tensors)


def stacked_experts(tensors: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """The names of those tensors, by their names and shapes, that hold all experts of a layer, compressed."""
    return (name for name, shape in tensors.items() if len(shape) == 3 and _STACKED.fullmatch(name))


def likeness(layer: Layer) -> tuple[object, ...] | None:
    """Equal for layers that are compressed alike; None for dense ones."""
    assignment = layer.assignment
    if assignment is None or (assignment.scheme is None and assignment.sparsity is None):
        return None
    scheme = assignment.scheme
    args = () if scheme is None else (scheme.weights, scheme.input_activations, scheme.output_activations)
    return (args, assignment.format, assignment.sparsity)
