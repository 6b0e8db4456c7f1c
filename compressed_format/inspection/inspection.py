"""``Inspection``: what is in a checkpoint, as plain frozen data. Sizes are in bytes, ratios in dB."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compressed_format.errors import Problem
from compressed_format.inspection.kernels import Kernel

__all__ = [
    "InspectedModule",
    "InspectedScheme",
    "InspectedTensor",
    "Inspection",
    "LayerError",
    "decibels",
    "pooled_error",
]


@dataclass(frozen=True)
class LayerError:
    """How far a dequantized weight is from the dense one.

    ``signal`` and ``noise`` are the sums of the squares of the dense values and of the differences; ``worst_row`` is
    the output channel with the lowest signal-to-noise ratio, ``worst_row_snr`` that ratio in dB, and
    ``max_abs_error`` the largest difference. A ratio is infinite where nothing differs.
    """

    signal: float
    noise: float
    worst_row: int
    worst_row_snr: float
    max_abs_error: float

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio in dB: +inf where the weights are equal, -inf where only the dense one is zero."""
        return decibels(self.signal, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which has no infinity: a ratio that is not finite is null; ``exact`` tells +inf apart."""
        return {
            "snr_db": _finite(self.snr),
            "exact": self.noise == 0,
            "worst_row": self.worst_row,
            "worst_row_snr_db": _finite(self.worst_row_snr),
            "max_abs_error": _finite(self.max_abs_error),
        }


def decibels(signal: float, noise: float) -> float:
    """The ratio of two energies in dB; NaN where either is NaN."""
    if math.isnan(signal) or math.isnan(noise) or math.isinf(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and signal / noise > 0 else -math.inf


def pooled_error(errors: Iterable[LayerError]) -> LayerError | None:
    """The error of several weights as if they were one, whose worst row is that of the worst of them; None of none."""
    found = list(errors)
    if not found:
        return None
    # A NaN is worse than any ratio.
    worst = min(found, key=lambda error: -math.inf if math.isnan(error.worst_row_snr) else error.worst_row_snr)
    return LayerError(
        signal=math.fsum(error.signal for error in found),
        noise=math.fsum(error.noise for error in found),
        worst_row=worst.worst_row,
        worst_row_snr=worst.worst_row_snr,
        max_abs_error=max((error.max_abs_error for error in found), key=lambda value: (math.isnan(value), value)),
    )


@dataclass(frozen=True)
class InspectedScheme:
    """What the modules of one scheme have in common, and what they take together.

    ``title`` says it in a few words. ``groups`` are the names of the config's groups that say so; ``bits``, ``type``
    and ``strategy`` are None for weights that are sparse and not quantized; ``group_size`` and ``block_structure``
    are None for other strategies. ``activations`` describes how inputs and outputs are quantized, None where they are
    not. ``nbytes`` counts scales, zero points and all else that belongs to the weights; ``dense_nbytes`` is what the
    weights would take in the model's dtype. ``kernels`` are those that would run the modules on this machine.
    """

    title: str
    groups: tuple[str, ...]
    format: str
    bits: int | None
    type: str | None
    strategy: str | None
    group_size: int | None
    block_structure: tuple[int, int] | None
    symmetric: bool | None
    activations: str | None
    sparsity: str | None
    modules: int
    parameters: int
    nbytes: int
    dense_nbytes: int
    kernels: tuple[Kernel, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits for each value of the dense weight, with scales, zero points and all else; NaN of empty weights."""
        return bits_per_weight(self.nbytes, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "title": self.title,
            "groups": list(self.groups),
            "format": self.format,
            "bits": self.bits,
            "type": self.type,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "block_structure": None if self.block_structure is None else list(self.block_structure),
            "symmetric": self.symmetric,
            "activations": self.activations,
            "sparsity": self.sparsity,
            "modules": self.modules,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dense_bytes": self.dense_nbytes,
            "bits_per_weight": _finite(self.bits_per_weight),
            "kernels": [kernel.to_dict() for kernel in self.kernels],
        }


@dataclass(frozen=True)
class InspectedModule:
    """One compressed module. ``kind`` is ``"Linear"`` or ``"Embedding"``, ``scheme`` an index into the inspection's.

    ``shape`` is that of the dense weight; ``nbytes`` is of everything that is stored for it but a bias.
    """

    name: str
    kind: str
    scheme: int
    shape: tuple[int, ...]
    nbytes: int
    error: LayerError | None = None

    @property
    def parameters(self) -> int:
        """How many values the dense weight has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """As :attr:`InspectedScheme.bits_per_weight`."""
        return bits_per_weight(self.nbytes, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "scheme": self.scheme,
            "shape": list(self.shape),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bits_per_weight": _finite(self.bits_per_weight),
            "error": None if self.error is None else self.error.to_dict(),
        }


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor that is stored as it is: of a module that is not compressed, or the bias of one that is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def parameters(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "bytes": self.nbytes}


@dataclass(frozen=True)
class Inspection:
    """What is in the checkpoint at ``path``.

    ``dtype`` is the model's, and ``dtype_source`` says where that is known from. ``schemes`` are in falling order of
    their bytes, ``modules`` and ``tensors`` in the order of the checkpoint. ``unmatched`` are the modules that the
    ``reference`` has no equal of, and why; their error is None. ``warnings`` are those of the config.
    """

    path: str
    files: int
    dtype: str
    dtype_source: str
    schemes: tuple[InspectedScheme, ...]
    modules: tuple[InspectedModule, ...]
    tensors: tuple[InspectedTensor, ...]
    reference: str | None = None
    unmatched: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return self.compressed_nbytes + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def compressed_nbytes(self) -> int:
        """The bytes of compressed modules, without their biases."""
        return sum(scheme.nbytes for scheme in self.schemes)

    @property
    def dense_nbytes(self) -> int:
        """What all tensors would take with every compressed weight in the model's dtype."""
        return sum(scheme.dense_nbytes for scheme in self.schemes) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """The values of all tensors, those of compressed weights as if they were dense."""
        return self.compressed_parameters + sum(tensor.parameters for tensor in self.tensors)

    @property
    def compressed_parameters(self) -> int:
        """The values of the weights that are compressed."""
        return sum(scheme.parameters for scheme in self.schemes)

    @property
    def bits_per_weight(self) -> float:
        """Of compressed weights, with all that belongs to them; NaN where there are none."""
        return bits_per_weight(self.compressed_nbytes, self.compressed_parameters)

    @property
    def error(self) -> LayerError | None:
        """That of all modules that were compared with the reference, as one weight; None where none was."""
        return pooled_error(module.error for module in self.modules if module.error is not None)

    def largest(self, count: int) -> tuple[InspectedModule, ...]:
        """The ``count`` compressed modules with the most bytes, largest first."""
        return tuple(sorted(self.modules, key=lambda module: -module.nbytes)[:count])

    def worst(self, count: int) -> tuple[InspectedModule, ...]:
        """The ``count`` modules with the lowest signal-to-noise ratio, lowest first, NaN before all."""

        def ratio(module: InspectedModule) -> float:
            assert module.error is not None
            return -math.inf if math.isnan(module.error.snr) else module.error.snr

        return tuple(sorted((module for module in self.modules if module.error is not None), key=ratio)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; numbers that are not finite are null."""
        error = self.error
        return {
            "path": self.path,
            "files": self.files,
            "dtype": self.dtype,
            "dtype_source": self.dtype_source,
            "bytes": self.nbytes,
            "dense_bytes": self.dense_nbytes,
            "parameters": self.parameters,
            "compressed_bytes": self.compressed_nbytes,
            "compressed_parameters": self.compressed_parameters,
            "bits_per_weight": _finite(self.bits_per_weight),
            "schemes": [scheme.to_dict() for scheme in self.schemes],
            "modules": [module.to_dict() for module in self.modules],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "reference": self.reference,
            "error": None if error is None else {"snr_db": _finite(error.snr), "exact": error.noise == 0},
            "unmatched": [{"place": problem.place, "message": problem.message} for problem in self.unmatched],
            "warnings": [{"place": problem.place, "message": problem.message} for problem in self.warnings],
        }


def bits_per_weight(nbytes: int, parameters: int) -> float:
    """NaN where there are no parameters."""
    return 8 * nbytes / parameters if parameters else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
