"""An inspection by layer and by part of a layer: what tables and plots show of models of any length.

The experts of a layer count as one row, so that thousands of them stay readable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from compressed_format.config.layers import layer_class
from compressed_format.inspection.inspection import (
    InspectedModule,
    InspectedTensor,
    Inspection,
    LayerError,
    bits_per_weight,
    pooled_error,
)
from compressed_format.inspection.names import LayerName, layer_name, layer_order, without_experts, without_numbers

__all__ = ["Layer", "ModuleRow", "Part", "TensorRow", "layers_of", "module_rows", "parts_of", "tensor_rows"]

_SMALL = 0.005
"""Layers outside of stacks with a smaller share of the bytes than this are shown together."""


@dataclass
class Layer:
    """One layer, or (``name`` None) all small ones that are in no stack.

    ``nbytes`` and ``parameters`` are by scheme, of compressed modules; ``other_nbytes`` is what is not compressed.
    ``members`` are the names of what is in it outside of stacks.
    """

    name: LayerName | None
    nbytes: dict[int, int] = field(default_factory=dict)
    parameters: dict[int, int] = field(default_factory=dict)
    other_nbytes: int = 0
    members: list[str] = field(default_factory=list)

    @property
    def total_nbytes(self) -> int:
        return sum(self.nbytes.values()) + self.other_nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of all compressed weights of this layer; NaN where there are none."""
        return bits_per_weight(sum(self.nbytes.values()), sum(self.parameters.values()))

    def add(self, other: Layer) -> None:
        """Count ``other`` as a part of this one."""
        for mine, more in ((self.nbytes, other.nbytes), (self.parameters, other.parameters)):
            for scheme, count in more.items():
                mine[scheme] = mine.get(scheme, 0) + count
        self.other_nbytes += other.other_nbytes
        self.members += other.members


def layers_of(inspection: Inspection) -> list[Layer]:
    """The layers in the order of the model: embeddings, stacks of layers by number, and what is in no stack."""
    layers: dict[str, Layer] = {}

    def layer_at(module: str) -> Layer:
        name = layer_name(module)
        return layers.setdefault(name.layer, Layer(name, members=[] if name.index is not None else [module]))

    for module in inspection.modules:
        layer = layer_at(module.name)
        layer.add(Layer(None, {module.scheme: module.nbytes}, {module.scheme: module.parameters}))
    for tensor in inspection.tensors:
        layer_at(tensor.name.rpartition(".")[0] or tensor.name).other_nbytes += tensor.nbytes
    names = [layer.name for layer in layers.values() if layer.name is not None]
    ordered = [layers[name.layer] for name in sorted(layer_order(names), key=_section)]
    alone = [layer for layer in ordered if layer.name is not None and layer.name.index is None]
    small = [layer for layer in alone if layer.total_nbytes < _SMALL * inspection.nbytes]
    if len(small) < 2:
        return ordered
    rest = Layer(None)
    for layer in small:
        rest.add(layer)
    return [*(layer for layer in ordered if layer not in small), rest]


def _section(name: LayerName) -> int:
    """What is in front of all stacks, the stacks, and what is behind them."""
    if name.index is not None:
        return 1
    return 0 if layer_class(name.stack) == "Embedding" else 2


@dataclass(frozen=True)
class ModuleRow:
    """One compressed module, or all experts of a layer that have the same name but for their number.

    ``shape`` is that of each; ``error`` is that of all as if they were one weight, whose worst row is in ``worst``.
    """

    name: str
    kind: str
    scheme: int
    shape: tuple[int, ...]
    count: int
    parameters: int
    nbytes: int
    error: LayerError | None
    worst: str | None

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self.nbytes, self.parameters)


def module_rows(inspection: Inspection) -> list[ModuleRow]:
    """The compressed modules, experts together, in the order of the model."""
    together: dict[tuple[str, int, tuple[int, ...]], list[InspectedModule]] = {}
    for module in inspection.modules:
        together.setdefault((without_experts(module.name), module.scheme, module.shape), []).append(module)
    names = {key: layer_name(key[0]) for key in together}
    place = {name.layer: index for index, name in enumerate(sorted(layer_order(names.values()), key=_section))}
    ordered = sorted(together, key=lambda key: place[names[key].layer])
    return [_row(key[0], together[key]) for key in ordered]


def _row(name: str, modules: list[InspectedModule]) -> ModuleRow:
    compared = [(module.name, module.error) for module in modules if module.error is not None]
    error = pooled_error(error for _, error in compared)
    worst = None
    if error is not None:
        worst = next(
            name
            for name, one in compared
            if one.worst_row == error.worst_row and repr(one.worst_row_snr) == repr(error.worst_row_snr)
        )
    return ModuleRow(
        name,
        modules[0].kind,
        modules[0].scheme,
        modules[0].shape,
        len(modules),
        sum(module.parameters for module in modules),
        sum(module.nbytes for module in modules),
        error,
        worst,
    )


@dataclass(frozen=True)
class Part:
    """The rows that are the same part of each layer of a stack, by the layer's index: all its ``q_proj``.

    ``stack`` None stands for what is the part of no stack, in the order of the model.
    """

    stack: str | None
    name: str
    rows: tuple[tuple[int, ModuleRow], ...]


def parts_of(rows: Iterable[ModuleRow]) -> list[Part]:
    """The parts that several layers have, in the order of the model, and then all that is left, as one."""
    together: dict[tuple[str, str], list[tuple[int, ModuleRow]]] = {}
    alone: list[ModuleRow] = []
    for row in rows:
        name = layer_name(row.name)
        if name.index is None:
            alone.append(row)
        else:
            together.setdefault((name.stack, name.part), []).append((name.index, row))
    parts: list[Part] = []
    for (stack, part), members in together.items():
        if len(members) == 1:
            alone.append(members[0][1])
        else:
            parts.append(Part(stack, part or stack, tuple(sorted(members, key=lambda member: member[0]))))
    if alone:
        parts.append(Part(None, "outside of stacks" if parts else "all modules", tuple(enumerate(alone))))
    return parts


@dataclass(frozen=True)
class TensorRow:
    """The tensors that are not compressed and whose names differ in numbers only; ``shapes`` are those they have."""

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    count: int
    nbytes: int


def tensor_rows(inspection: Inspection) -> list[TensorRow]:
    """What is not compressed, the most bytes first."""
    together: dict[str, list[InspectedTensor]] = {}
    for tensor in inspection.tensors:
        together.setdefault(without_numbers(tensor.name), []).append(tensor)
    rows = [
        TensorRow(
            name if len(tensors) > 1 else tensors[0].name,
            tuple(dict.fromkeys(tensor.dtype for tensor in tensors)),
            tuple(dict.fromkeys(tensor.shape for tensor in tensors)),
            len(tensors),
            sum(tensor.nbytes for tensor in tensors),
        )
        for name, tensors in together.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes)
