"""Checks and examples that several tests share: comparison of bits, and the golden vectors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed_format import ops

GOLDEN = Path(__file__).parent / "golden"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """The same dtype, shape and bytes: -0.0 is not 0.0, and one NaN equals another only in all its bits."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    if not torch.equal(byte_view(actual), byte_view(expected)):
        as_text = "\n".join(str(tensor) for tensor in (actual, expected))
        raise AssertionError(f"{name} differs:\n{as_text}")


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and the same bits under each of them."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


def assert_product(
    actual: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``actual`` is ``input @ weight.T + bias`` but for roundings of the weight and of the result to its dtype.

    Kernels sum in an order of their own, and may round a weight or not, so that the last bits are theirs.
    """
    assert actual.shape == (*input.shape[:-1], weight.shape[0])
    wide, exact_weight = input.detach().double(), weight.detach().double()
    added = torch.zeros(weight.shape[0]).double() if bias is None else bias.detach().double()
    exact = wide @ exact_weight.T + added
    magnitude = wide.abs() @ exact_weight.abs().T + added.abs()
    # Sums are made in float32, and may be those of codes that are not zero where the weight is.
    summed = wide.abs().sum(-1, keepdim=True) * exact_weight.abs().amax(1)
    allowed = sum(torch.finfo(tensor.dtype).eps for tensor in (actual, weight)) * magnitude
    allowed += torch.finfo(torch.float32).eps * summed
    if not ((actual.detach().double() - exact).abs() <= allowed).all():
        raise AssertionError(f"is not the product:\n{actual}\n{exact}\nallowed are differences of\n{allowed}")


def use_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules compute products as the ops define them, bit for bit those of torch, and not as kernels make them.

    Where a sum differs in its last bit, the code of an activation made of it may differ by one.
    """
    for name in ops.__all__:
        if "linear" in name:
            monkeypatch.setattr(ops, name, getattr(torch.ops.compressed_format, f"{name}_reference").default)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order, one-dimensional."""
    # A copy, because a dimension of size one may have any stride, and a view as bytes wants the last one to be 1.
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def hexadecimal(tensor: torch.Tensor) -> str:
    """The bytes of a tensor as a file holds them."""
    return bytes(byte_view(tensor).tolist()).hex()


@cache
def golden_cases(directory: str) -> dict[str, Any]:
    """The cases of ``golden.json`` in one directory of golden vectors, those that the release could write."""
    cases = json.loads((GOLDEN / directory / "golden.json").read_text())["cases"]
    return {name: case for name, case in cases.items() if "error" not in case}


def golden_tensors(case: dict[str, Any], module: str = "lin") -> dict[str, torch.Tensor]:
    """The tensors of one module of a golden case, by suffix."""
    return {
        name.removeprefix(f"{module}."): golden_tensor(entry)
        for name, entry in case["tensors"].items()
        if name.startswith(f"{module}.")
    }


def golden_tensor(entry: dict[str, Any]) -> torch.Tensor:
    """A tensor out of its dtype, shape and bytes in hexadecimal."""
    raw = torch.tensor(list(bytes.fromhex(entry["hex"])), dtype=torch.uint8)
    return raw.view(getattr(torch, entry["dtype"].removeprefix("torch."))).reshape(entry["shape"])


def golden_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The dense weight that all golden vectors were made of."""
    index = torch.arange(rows * columns).reshape(rows, columns)
    return (((index * 37) % 101 - 50) / 16).to(dtype)


def golden_mask(rows: int, columns: int) -> torch.Tensor:
    """Which values of :func:`golden_weight` the 2:4 golden vectors keep."""
    quad = torch.arange(rows * columns // 4)
    first, second = quad % 4, (quad + 1 + (quad // 4) % 3) % 4
    second = torch.where(second == first, (second + 1) % 4, second)
    mask = torch.zeros(len(quad), 4, dtype=torch.bool)
    mask.scatter_(1, torch.stack((first, second), dim=1), True)
    return mask.reshape(rows, columns)
