"""The tensors of a module: weight, sparsity and static activations; and what of a scheme cannot run."""

from __future__ import annotations

import pytest
import torch

from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationScheme
from compressed_format.formats.module import check_runnable, module_tensor_specs

INT8 = QuantizationArgs(num_bits=8, strategy="channel")
STATIC = QuantizationArgs(num_bits=8, strategy="tensor")


def shapes(scheme: QuantizationScheme | None, format: str, sparsity: str | None = None) -> dict[str, object]:
    names = CompressionFormat(format), None if sparsity is None else CompressionFormat(sparsity)
    return {name: spec.shape for name, spec in module_tensor_specs(scheme, *names, (6, 16), 6).items()}


def test_static_activations_have_scales() -> None:
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=INT8,
        input_activations=QuantizationArgs(num_bits=8, strategy="group", group_size=4, symmetric=False),
        output_activations=STATIC,
    )
    assert shapes(scheme, "int-quantized") == {
        "weight": (6, 16),
        "weight_scale": (6, 1),
        "input_scale": (4,),
        "input_zero_point": (4,),
        "output_scale": (1,),
    }


def test_dynamic_activations_have_none() -> None:
    dynamic = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=INT8, input_activations=dynamic)
    assert shapes(scheme, "int-quantized") == {"weight": (6, 16), "weight_scale": (6, 1)}


def test_sparsity_replaces_the_weight_and_keeps_its_dtypes() -> None:
    scheme = QuantizationScheme(targets=["Linear"], weights=INT8)
    assert shapes(scheme, "int-quantized", "sparse-24-bitmask") == {
        "shape": (2, 1),
        "compressed": (6, 8),
        "bitmask": (6, 2),
        "weight_scale": (6, 1),
    }
    specs = module_tensor_specs(
        scheme, CompressionFormat.INT_QUANTIZED, CompressionFormat.SPARSE_24_BITMASK, (6, 16), 6
    )
    assert specs["compressed"].dtypes == (torch.int8,)
    assert shapes(None, "dense", "sparse-bitmask") == {
        "shape": (2,),
        "compressed": (None,),
        "bitmask": (6, 2),
        "row_offsets": (6,),
    }


def test_what_runs_has_no_problems() -> None:
    scheme = QuantizationScheme(targets=["Linear"], weights=INT8, input_activations=STATIC)
    assert check_runnable(scheme, CompressionFormat.INT_QUANTIZED, CompressionFormat.SPARSE_24_BITMASK, "lin") == []
    assert check_runnable(None, CompressionFormat.DENSE, CompressionFormat.SPARSE_BITMASK, "lin") == []


@pytest.mark.parametrize(
    ("fields", "format", "sparsity", "message"),
    [
        ({"weights": INT8}, "nvfp4-pack-quantized", None, "the format nvfp4-pack-quantized cannot be read or written"),
        ({"weights": INT8}, "int-quantized", "marlin-24", "the sparsity format marlin-24 cannot be decoded"),
        (
            {"weights": QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=16)},
            "naive-quantized",
            None,
            "float of 4 bits cannot be quantized or run yet",
        ),
        (
            {"weights": INT8, "input_activations": QuantizationArgs(num_bits=4, type="float", strategy="tensor")},
            "int-quantized",
            None,
            "activations of float 4 bits by tensor (dynamic: False) cannot be run yet",
        ),
        (
            {
                "weights": INT8,
                "input_activations": QuantizationArgs(
                    num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8", dynamic=True
                ),
            },
            "int-quantized",
            None,
            "activations of float 8 bits by group (dynamic: True) cannot be run yet",
        ),
    ],
)
def test_what_cannot_run(fields: dict[str, QuantizationArgs], format: str, sparsity: str | None, message: str) -> None:
    scheme = QuantizationScheme(targets=["Linear"], **fields)
    names = CompressionFormat(format), None if sparsity is None else CompressionFormat(sparsity)
    (problem,) = check_runnable(scheme, *names, "model.lin")
    assert problem.place == "model.lin"
    assert problem.message.startswith(message)


def test_more_than_one_problem() -> None:
    problems = check_runnable(None, CompressionFormat.MXFP4_PACK_QUANTIZED, CompressionFormat.MARLIN_24, "lin")
    assert len(problems) == 2
