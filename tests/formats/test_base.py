"""Scales are found to be finite, or the first that is not, wherever it stands."""

from __future__ import annotations

import pytest
import torch

from compressed_format import FormatError
from compressed_format.formats.base import FLOAT_DTYPES, check_scales


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    # Vectors, the rest behind them, and parts for several threads are each looked through by code of their own.
    for size in (1, 7, 64, 100, 70_001):
        for place in {0, size // 2, size - 1}:
            scale = torch.full((size, 1), 0.5, dtype=dtype)
            scale[place] = value
            with pytest.raises(FormatError) as caught:
                check_scales(scale, "lin.weight_scale")
            (problem,) = caught.value.problems
            assert problem.place == "lin.weight_scale"
            assert problem.message == f"holds {value} at index [{place}, 0], expected a finite scale"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_finite_scales_pass_up_to_the_largest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_scales(torch.full((300,), largest, dtype=dtype), "")
    check_scales(torch.tensor([-largest, 0.0, largest], dtype=dtype), "")
    check_scales(torch.empty(0, 3, dtype=dtype), "")
    check_scales(torch.ones((), dtype=dtype), "")
