"""Codes and scales: which values a code can take, and the scale and zero point of a range of values.

Plain torch, the definition of the numerics: every elementary operation is rounded to the dtype of its operands, as the
eager CPU path of compressed-tensors 0.20.0 does. ``schema/README.md`` has the formulas with worked examples.
"""

from __future__ import annotations

import torch

from compressed_format.config import QuantizationArgs, QuantizationType
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import Problem, UnsupportedFormatError

__all__ = [
    "check_shrinking",
    "code_dtype",
    "code_range",
    "compute_scale",
    "least_error_range",
    "round_to_codes",
    "scale_of_range",
    "zero_point_dtype",
]


def code_dtype(args: QuantizationArgs, place: str = "") -> torch.dtype:
    """The dtype of codes: int8 for integers of 1 to 8 bits, float8_e4m3fn for 8-bit floats.

    Raises :class:`UnsupportedFormatError` for float 4 and 6 (NVFP4 and MX formats).
    """
    if args.type is QuantizationType.INT and 1 <= args.num_bits <= 8 and args.scale_dtype is None:
        return torch.int8
    if args.type is QuantizationType.FLOAT and args.num_bits == 8 and args.scale_dtype is None:
        return torch.float8_e4m3fn
    scales = f" with scales of {args.scale_dtype}" if args.scale_dtype is not None else ""
    message = f"{args.type.value} of {args.num_bits} bits{scales} cannot be quantized or run yet (NVFP4 and MX formats)"
    raise UnsupportedFormatError(problems=[Problem(place, message)])


def code_range(args: QuantizationArgs) -> tuple[float, float]:
    """The smallest and the largest code: ``-2**(b-1) .. 2**(b-1) - 1``, or +-448 for float8_e4m3fn."""
    if args.type is QuantizationType.INT:
        return float(-(1 << (args.num_bits - 1))), float((1 << (args.num_bits - 1)) - 1)
    largest = DTYPES["float8_e4m3fn"].largest
    return -largest, largest


def zero_point_dtype(args: QuantizationArgs) -> torch.dtype:
    """The dtype of zero points: what the scheme says, else int8 for integer and float8_e4m3fn for float codes."""
    if args.zp_dtype is not None:
        return torch_dtype(args.zp_dtype)
    return torch.int8 if args.type is QuantizationType.INT else torch.float8_e4m3fn


def round_to_codes(ratio: torch.Tensor, lowest: float, highest: float, is_float: bool) -> torch.Tensor:
    """Clamp values in units of the scale to the range of codes, then round them, ties to even, keeping the dtype."""
    clamped = ratio.clamp(lowest, highest)
    return clamped.to(torch.float8_e4m3fn).to(ratio.dtype) if is_float else clamped.round()


def compute_scale(
    minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point for values that span ``[minimum, maximum]``, by :func:`scale_of_range`."""
    lowest, highest = code_range(args)
    return scale_of_range(minimum, maximum, lowest, highest, None if args.symmetric else zero_point_dtype(args))


def scale_of_range(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    lowest: float,
    highest: float,
    zero_point_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point for values that span ``[minimum, maximum]`` and codes that span ``[lowest, highest]``.

    Both come in the shape of ``minimum`` (``[1]``, if it has none), the scale in its dtype. Zero is always
    representable. Symmetric (``zero_point_dtype`` is None): ``scale = max(|min|, |max|) / (range / 2)`` with
    ``range = highest - lowest``, and no zero point. Asymmetric: ``scale = (max - min) / range`` and
    ``zero_point = round(clamp(lowest - min / scale))``. A scale of exactly zero becomes the dtype's epsilon.
    """
    minimum = minimum.clamp(max=0)
    maximum = maximum.clamp(min=0)
    # A tensor, because torch multiplies by the reciprocal of a number on some devices; filled where it lies, because a
    # copy from the host would wait for the device. Every span, and the half of it, is exact in every dtype.
    span = highest - lowest
    divisor = maximum.new_full((), span / 2 if zero_point_dtype is None else span)
    epsilon = torch.finfo(maximum.dtype).eps
    if zero_point_dtype is None:
        scale = torch.maximum(minimum.abs(), maximum) / divisor
        return _at_least_1d(torch.where(scale == 0, epsilon, scale)), None
    scale = (maximum - minimum) / divisor
    ratio = minimum / scale
    # The peer's `lowest` is a float32 scalar tensor, which decides the dtype of the difference where the range is a
    # scalar too: dynamic quantization of a whole tensor.
    wide = torch.promote_types(ratio.dtype, torch.float32) if ratio.ndim == 0 else ratio.dtype
    raw = (lowest - ratio.to(wide)).clamp(lowest, highest)
    # An all-zero row has divided by zero here. Its zero point is undefined in the peer (NaN cast to an integer, which
    # is 0 on x86), and 0 is what files hold.
    raw = raw.nan_to_num(0.0)
    zero_point = (raw if zero_point_dtype.is_floating_point else raw.round()).to(zero_point_dtype)
    return _at_least_1d(torch.where(scale == 0, epsilon, scale)), _at_least_1d(zero_point)


def least_error_range(
    values: torch.Tensor,
    dim: tuple[int, ...],
    args: QuantizationArgs,
    *,
    maxshrink: float = 0.2,
    grid: int = 20,
    norm: float = 2.4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range over ``dim`` that, shrunk, rounds ``values`` with the least ``sum(|rounded - value| ** norm)``.

    Smallest and largest value shrink together, in ``grid`` equal steps down to ``1 - maxshrink`` of them:
    clipping a few extremes can pay for finer steps everywhere else. The ranges keep the reduced dimensions.
    """
    check_shrinking(maxshrink, grid, norm)
    minimum, maximum = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    least = torch.full(minimum.shape, torch.inf, device=values.device)
    best = minimum, maximum
    is_float = args.type is QuantizationType.FLOAT
    for step in range(grid + 1):
        factor = 1 - maxshrink * step / grid
        shrunk = minimum * factor, maximum * factor
        scale, zero_point = compute_scale(*shrunk, args)
        offset = 0 if zero_point is None else zero_point.to(values.dtype)
        codes = round_to_codes(values / scale + offset, *code_range(args), is_float)
        error = ((codes - offset) * scale - values).abs().to(torch.float32).pow(norm).sum(dim, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, shrunk[0], best[0]), torch.where(better, shrunk[1], best[1])
    return best


def check_shrinking(maxshrink: float, grid: float, norm: float) -> None:
    """Raise :class:`ValueError` for options that :func:`least_error_range` cannot take."""
    if not (0 < maxshrink < 1 and isinstance(grid, int) and grid >= 1 and norm > 0):
        found = f"{maxshrink}, {grid} and {norm}"
        raise ValueError(f"maxshrink must lie in (0, 1), grid be a positive integer and norm be positive, not {found}")


def _at_least_1d(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(1) if values.ndim == 0 else values
