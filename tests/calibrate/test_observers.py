"""Observers: the range each of them finds, batch by batch, and settings that mean nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compressed_format.activations import fake_quantize_activations
from compressed_format.calibrate import OBSERVERS, observer_for
from compressed_format.config import QuantizationArgs
from compressed_format.errors import CalibrationError, UnsupportedFormatError
from tests.checks import FLOATS, assert_same_bits, golden_cases, golden_tensors


def args_of(observer: str | None = None, *, group: int = 0, **fields: Any) -> QuantizationArgs:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "tensor"}
    return QuantizationArgs(**{"num_bits": 8, "observer": observer, **strategy, **fields})


def observed(args: QuantizationArgs, *batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    observer = observer_for(args, "lin")
    for batch in batches:
        observer.observe(batch)
    return observer.scale()


@pytest.mark.parametrize("name", [None, "minmax", "static_minmax", "memoryless_minmax"])
def test_minmax_spans_all_batches(name: str | None) -> None:
    batches = torch.tensor([[1.0, -2.0]]), torch.tensor([[255.0], [0.5]]), torch.tensor([3.0])
    scale, zero_point = observed(args_of(name), *batches)
    assert scale.tolist() == [2.0]  # 255 / 127.5
    assert zero_point is None


def test_minmax_with_zero_points() -> None:
    scale, zero_point = observed(args_of(symmetric=False), torch.tensor([-55.0, 100.0]), torch.tensor([[200.0]]))
    assert scale.tolist() == [1.0]
    assert zero_point.tolist() == [-128 + 55]
    assert zero_point.dtype == torch.int8


def test_static_input_scales_of_a_golden_vector() -> None:
    """A range of -3 to 3, in bfloat16 and float8, as the release itself wrote it."""
    golden = golden_tensors(golden_cases("v0.20.0")["fp8_tensor_static"])["input_scale"]
    scale, _ = observed(args_of(type="float"), torch.tensor([[-3.0, 1.0, 3.0]], dtype=torch.bfloat16))
    assert_same_bits(scale, golden)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("group", [0, 4])
def test_scales_have_the_dtype_and_shape_of_the_activations(dtype: torch.dtype, observer: str, group: int) -> None:
    values = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = observed(args_of(observer, group=group, symmetric=False), values, values * 2)
    assert scale.dtype == dtype
    assert zero_point.dtype == torch.int8
    assert scale.shape == zero_point.shape == ((3,) if group else (1,))


@pytest.mark.parametrize("observer", list(OBSERVERS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_observed_one_by_one(observer: str, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 3, 12, generator=generator) * size for size in (1.0, 7.0, 0.2)]
    scale, zero_point = observed(args_of(observer, group=4, symmetric=symmetric), *batches)
    for group in range(3):
        slices = [batch[..., 4 * group : 4 * group + 4] for batch in batches]
        alone, zero_alone = observed(args_of(observer, symmetric=symmetric), *slices)
        torch.testing.assert_close(scale[group], alone[0], rtol=1e-6, atol=0)
        if not symmetric:
            assert zero_point[group] == zero_alone[0]


def test_the_moving_average_moves_by_its_momentum() -> None:
    first, second, third = (torch.tensor([[-bound, bound]]) for bound in (127.5, 255.0, 0.0))
    args = args_of("moving_average_minmax", observer_kwargs={"momentum": 0.5})
    assert observed(args, first)[0].tolist() == [1.0]
    assert observed(args, first, second)[0].tolist() == [1.5]
    assert observed(args, first, second, third)[0].tolist() == [0.75]
    quick = args_of("moving_average_minmax", observer_kwargs={"momentum": 1.0})
    assert observed(quick, first, second)[0].tolist() == [2.0]
    assert observed(args_of("moving_average_minmax"), first, second)[0].item() == pytest.approx(1.01)


@pytest.mark.parametrize("name", ["mse", "memoryless_mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_observer_clips_what_stands_out(name: str, symmetric: bool) -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    values[0, 0] = 6.0
    options = {"maxshrink": 0.5, "norm": 2.0}
    fields = {"num_bits": 4, "symmetric": symmetric}
    clipped = observed(args_of(name, observer_kwargs=options, **fields), values)
    widest = observed(args_of("minmax", **fields), values)
    assert clipped[0] < widest[0]
    errors = [
        (fake_quantize_activations(values, *found, 4, False, symmetric, 0) - values).square().sum()
        for found in (clipped, widest)
    ]
    assert errors[0] < errors[1]


def test_the_mse_observer_leaves_alone_what_fits() -> None:
    values = torch.arange(-127, 128, 1.0)
    for fields in ({"symmetric": False}, {"type": "float"}):
        args, plain = args_of("mse", **fields), args_of("minmax", **fields)
        if fields == {"symmetric": False}:
            assert_same_bits(observed(args, values)[0], observed(plain, values)[0])
        assert observed(args, values)[0] <= observed(plain, values)[0]


def test_the_mse_observer_averages_its_batches() -> None:
    values = torch.arange(-127, 128, 1.0)
    args = args_of("mse", symmetric=False, observer_kwargs={"momentum": 0.5})
    assert observed(args, values, values * 3)[0].item() == pytest.approx(2 * 254 / 255)


def test_batches_without_values_change_nothing() -> None:
    values = torch.tensor([[-127.5, 3.0]])
    assert observed(args_of(), torch.zeros(0, 2), values, torch.zeros(3, 0))[0].tolist() == [1.0]


def test_no_data_at_all() -> None:
    with pytest.raises(CalibrationError, match="no calibration input reached it"):
        observed(args_of())
    with pytest.raises(CalibrationError, match="no calibration input reached it"):
        observed(args_of(), torch.zeros(0, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("observer", list(OBSERVERS))
def test_values_that_are_not_finite(value: float, observer: str) -> None:
    with pytest.raises(CalibrationError, match="the calibration data leads to NaN or infinity"):
        observed(args_of(observer), torch.tensor([1.0, value]))


def test_a_group_size_that_does_not_divide() -> None:
    """Two tokens of 12 values are three whole eights, but no token is."""
    with pytest.raises(CalibrationError, match="group_size 8 does not divide the 12 values of a token"):
        observed(args_of(group=8), torch.zeros(2, 12))


@pytest.mark.parametrize(
    ("observer", "options", "message"),
    [
        ("histogram", {}, "the observer 'histogram' is not known; there are minmax, static_minmax, "),
        ("minmax", {"momentum": 0.5}, "the observer minmax takes no momentum; allowed: nothing"),
        ("mse", {"bins": 2, "a": 1}, "the observer mse takes no a, bins; allowed: momentum, maxshrink, grid, norm"),
        ("moving_average_minmax", {"momentum": 0}, r"observer moving_average_minmax: momentum must lie in \(0, 1\]"),
        ("moving_average_minmax", {"momentum": 1.5}, r"observer moving_average_minmax: momentum must lie in \(0, 1\]"),
        ("moving_average_minmax", {"momentum": "fast"}, "observer moving_average_minmax: "),
        ("mse", {"maxshrink": 0}, r"observer mse: maxshrink must lie in \(0, 1\).* not 0, 20 and 2\.4"),
        ("mse", {"grid": 0}, "observer mse: .*not 0.2, 0 and 2.4"),
        ("mse", {"grid": 1.5}, "observer mse: .*not 0.2, 1.5 and 2.4"),
        ("mse", {"norm": -1}, "observer mse: .*not 0.2, 20 and -1"),
    ],
)
def test_observers_that_mean_nothing(observer: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"^model.lin: {message}"):
        observer_for(args_of(observer, observer_kwargs=options), "model.lin")


def test_number_formats_that_cannot_run() -> None:
    with pytest.raises(UnsupportedFormatError, match="cannot be run yet"):
        observer_for(args_of(type="float", num_bits=4), "lin")
