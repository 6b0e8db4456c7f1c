"""The tensors of one compressed module: those of its weight, and the static scales of its activations."""

from __future__ import annotations

import torch

from compressed_format.activations import WHOLE_TENSOR, activation_group_size
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationScheme
from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.formats import SPARSITY_FORMATS, format_named
from compressed_format.formats.base import FLOAT_DTYPES, TensorSpec
from compressed_format.scales import code_dtype, zero_point_dtype

__all__ = ["check_runnable", "module_tensor_specs"]


def check_runnable(
    scheme: QuantizationScheme | None, format: CompressionFormat, sparsity: CompressionFormat | None, place: str
) -> list[Problem]:
    """What of a module's scheme cannot be run here, each problem naming ``place`` and the feature."""
    problems: list[Problem] = []
    if sparsity is not None and sparsity not in SPARSITY_FORMATS:
        problems.append(Problem(place, f"the sparsity format {sparsity.value} cannot be decoded"))
    try:
        format_named(format, place)
        if scheme is None:
            return problems
        if scheme.weights is not None:
            code_dtype(scheme.weights, place)
        for args in (scheme.input_activations, scheme.output_activations):
            if args is not None:
                activation_group_size(args, place)
    except UnsupportedFormatError as error:
        problems.extend(error.problems or [Problem(place, error.message)])
    return problems


def module_tensor_specs(
    scheme: QuantizationScheme | None,
    format: CompressionFormat,
    sparsity: CompressionFormat | None,
    shape: tuple[int, int],
    out_features: int,
) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint holds for a module with a weight of ``shape`` ``[O, I]``, but its bias.

    ``out_features`` is the width of its outputs: ``O`` for a Linear, ``I`` for an Embedding.
    """
    weights = None if scheme is None else scheme.weights
    specs = format_named(format).tensor_specs(shape, weights)
    if sparsity is not None:
        values = specs.pop("weight")
        sparse = dict(SPARSITY_FORMATS[sparsity].tensor_specs(shape))
        sparse["compressed"] = TensorSpec(values.dtypes, sparse["compressed"].shape)
        specs = {**sparse, **specs}
    if scheme is not None:
        specs |= _activation_specs("input", scheme.input_activations, shape[1])
        specs |= _activation_specs("output", scheme.output_activations, out_features)
    return specs


def _activation_specs(name: str, args: QuantizationArgs | None, features: int) -> dict[str, TensorSpec]:
    if args is None or args.dynamic:
        return {}
    group_size = activation_group_size(args)
    shape = (1,) if group_size == WHOLE_TENSOR else (features // group_size,)
    specs = {f"{name}_scale": TensorSpec(FLOAT_DTYPES, shape)}
    if not args.symmetric:
        specs[f"{name}_zero_point"] = TensorSpec((zero_point_dtype(args), torch.int8), shape)
    return specs
