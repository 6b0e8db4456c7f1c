"""Quantizing and dequantizing weights, in plain torch: the definition of the numerics, bit for bit.

Everything here follows the eager CPU path of compressed-tensors 0.20.0: each elementary operation is rounded to the
dtype of its operands (for a bfloat16 weight, to bfloat16), the rounded scale is the one that quantizes, and values
are clamped before they are rounded. ``schema/README.md`` has the formulas with worked examples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compressed_format.blocks import (
    block_shape,
    dequantize_blocks,
    from_blocks,
    scale_shape,
    scales_over_blocks,
    to_blocks,
)
from compressed_format.config import QuantizationArgs, QuantizationStrategy
from compressed_format.errors import Problem, QuantizationError
from compressed_format.ops.quantize import quantize_weight
from compressed_format.scales import (
    code_dtype,
    code_range,
    compute_scale,
    least_error_range,
    round_to_codes,
    zero_point_dtype,
)

__all__ = [
    "QuantizedWeight",
    "dequantize",
    "fake_quantize",
    "group_size_problem",
    "quantize",
    "quantize_at_once",
    "weight_scales",
]

_EXTREMES = frozenset({None, "minmax", "static_minmax", "memoryless_minmax", "moving_average_minmax"})
_LEAST_ERROR = frozenset({"mse", "memoryless_mse"})
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """What a weight becomes when it is quantized, before any format has laid it out in tensors.

    ``codes`` is int8 or float8_e4m3fn ``[..., O, I]``; in the dense format it is the weight itself and ``scale`` is
    None. ``scale`` has :func:`scale_shape`, ``zero_point`` the same shape (None when symmetric), ``g_idx`` is int32
    ``[I]``, the group of each column (None when column ``j`` belongs to group ``j // group_size``).
    ``global_scale`` is reserved for NVFP4.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return self.codes.shape

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with every tensor on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)}
        return replace(self, **moved)


def weight_scales(
    weight: torch.Tensor, args: QuantizationArgs, *, g_idx: torch.Tensor | None = None, place: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of ``weight`` ``[..., O, I]`` from the smallest and largest value of each rectangle.

    With the observer ``mse``, from the range of :func:`~compressed_format.scales.least_error_range` instead, whose
    options are its ``observer_kwargs``. A weight is seen once, so the other observers do not differ.

    Raises :class:`QuantizationError` if the weight holds NaN or infinity, spans more than its dtype can hold, or is
    empty, if ``group_size`` does not divide ``I``, and if ``g_idx`` gives a group another number of columns.
    """
    if weight.dtype not in _SCALE_DTYPES:
        weight = weight.to(torch.float16)
    _check_shape(weight.shape, args, place)
    if g_idx is not None and args.group_size:
        columns = torch.bincount(g_idx, minlength=weight.shape[-1] // args.group_size)
        if (columns != args.group_size).any():
            message = f"g_idx gives its groups {columns.tolist()} columns, expected {args.group_size} each"
            raise QuantizationError(problems=[Problem(place, message)])
    if args.strategy is QuantizationStrategy.TENSOR:
        minimum, maximum = (bound.reshape(1) for bound in _range(weight, tuple(range(weight.ndim)), args, place))
    else:
        ordered = weight if g_idx is None else weight[..., torch.argsort(g_idx, stable=True)]
        blocks = to_blocks(ordered, *block_shape(args, weight.shape))
        minimum, maximum = (bound.squeeze(-1).squeeze(-2) for bound in _range(blocks, (-3, -1), args, place))
    if not (torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise _not_finite(weight, place)
    scale, zero_point = compute_scale(minimum, maximum, args)
    if not torch.isfinite(scale).all():
        message = f"spans {minimum.min().item():g} to {maximum.max().item():g}, a range that {weight.dtype} cannot hold"
        raise QuantizationError(problems=[Problem(place, message)])
    return scale, zero_point


def quantize(
    weight: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    place: str = "weight",
) -> QuantizedWeight:
    """Quantize ``weight`` ``[..., O, I]`` (float16, bfloat16 or float32).

    ``scale`` (and ``zero_point``, for asymmetric ``args``) may come from a calibration algorithm; otherwise they are
    found by :func:`weight_scales`. ``g_idx``, int32 ``[I]``, names the group of each column. ``place`` names the
    weight in errors. Codes are ``round(clamp(weight / scale + zero_point))``, ties to even.

    Raises :class:`QuantizationError` for NaN or infinity, for a ``group_size`` that does not divide ``I``, and for
    scales, zero points or groups that do not fit; :class:`UnsupportedFormatError` for number formats without a decoder.
    """
    codes_dtype = code_dtype(args, place)
    _check_shape(weight.shape, args, place)
    if args.strategy is not QuantizationStrategy.GROUP:
        g_idx = None
    if g_idx is not None:
        _check_groups(g_idx, weight.shape, args, place)
    if scale is not None:
        _check_given_scales(weight, args, scale, zero_point, place)
    made = None if g_idx is not None else quantize_at_once(weight, args, scale, zero_point)
    if made is not None:
        return QuantizedWeight(*made)
    if scale is None:
        scale, zero_point = weight_scales(weight, args, g_idx=g_idx, place=place)
    else:
        if not torch.isfinite(weight).all():
            raise _not_finite(weight, place)
    rows, columns = (1, 1) if g_idx is not None else block_shape(args, weight.shape)
    ratio = to_blocks(weight, rows, columns) / scales_over_blocks(scale, weight.ndim, g_idx)
    if zero_point is not None:
        ratio = ratio + scales_over_blocks(zero_point, weight.ndim, g_idx).to(weight.dtype)
    elif codes_dtype.is_floating_point:
        ratio = ratio + 0.0  # the zero point of files that exist, for which -0.0, of pruned weights, is the code 0
    codes = round_to_codes(ratio, *code_range(args), codes_dtype.is_floating_point).to(codes_dtype)
    return QuantizedWeight(from_blocks(codes, weight.shape), scale, zero_point, g_idx=g_idx)


def quantize_at_once(
    weight: torch.Tensor,
    args: QuantizationArgs,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    *,
    pack: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """Codes, scale and zero point by the op that native kernels run; with ``pack``, packed words instead of codes.

    None where :func:`quantize` has more to do or something to refuse: scales from an observer of errors, dtypes that
    kernels do not know, values or scales that are not finite.
    """
    fits_codes = weight.ndim >= 2 and weight.numel() > 0
    if not fits_codes or (scale is None and args.observer not in _EXTREMES):
        return None
    return quantize_weight(weight, args, scale, zero_point, pack=pack)


def dequantize(
    quantized: QuantizedWeight, args: QuantizationArgs | None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The dense weight ``(code - zero_point) * scale``, computed and rounded in the dtype of the scale.

    ``dtype`` casts the result; without it, the result has the scale's dtype.
    """
    dense = quantized.codes
    if quantized.scale is not None and args is not None:
        blocks = block_shape(args, quantized.shape)
        g_idx = quantized.g_idx if args.strategy is QuantizationStrategy.GROUP else None
        dense = dequantize_blocks(dense, quantized.scale, quantized.zero_point, g_idx, *blocks)
    return dense if dtype is None else dense.to(dtype)


def fake_quantize(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """``dequantize(quantize(weight))``: what ``weight`` is after a round trip through ``args``."""
    return dequantize(quantize(weight, args), args)


def _range(
    values: torch.Tensor, dim: tuple[int, ...], args: QuantizationArgs, place: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range over ``dim`` that codes should span, as the observer of ``args`` sees it; keeps the dimensions."""
    if args.observer in _EXTREMES:
        return values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    allowed = sorted(name for name in (*_EXTREMES, *_LEAST_ERROR) if name)
    if args.observer not in _LEAST_ERROR:
        message = f"the observer {args.observer!r} is not known for weights; there are {', '.join(allowed)}"
        raise QuantizationError(problems=[Problem(place, message)])
    try:
        return least_error_range(values, dim, args, **args.observer_kwargs)
    except (TypeError, ValueError) as error:
        raise QuantizationError(problems=[Problem(place, f"observer {args.observer}: {error}")]) from error


def _check_shape(shape: torch.Size, args: QuantizationArgs, place: str) -> None:
    if len(shape) < 2 or shape.numel() == 0:
        message = f"has shape {list(shape)}; only matrices, or stacks of them, that hold values can be quantized"
        raise QuantizationError(problems=[Problem(place, message)])
    if args.strategy is QuantizationStrategy.GROUP and args.group_size and shape[-1] % args.group_size:
        raise QuantizationError(problems=[Problem(place, group_size_problem(shape[-1], args.group_size))])


def _check_groups(g_idx: torch.Tensor, shape: torch.Size, args: QuantizationArgs, place: str) -> None:
    if g_idx.dtype != torch.int32 or tuple(g_idx.shape) != (shape[-1],):
        message = f"g_idx must be int32 [{shape[-1]}], not {g_idx.dtype} {list(g_idx.shape)}"
        raise QuantizationError(problems=[Problem(place, message)])
    groups, (least, largest) = scale_shape(args, shape)[-1], torch.aminmax(g_idx)
    if least < 0 or largest >= groups:
        message = f"g_idx names groups {int(least)} to {int(largest)}, expected 0 to {groups - 1}"
        raise QuantizationError(problems=[Problem(place, message)])


def group_size_problem(columns: int, group_size: int) -> str:
    """The sentence that says a group size does not divide, and which ones do."""
    fitting = [size for size in (256, 128, 96, 64, 48, 32, 16, 8) if columns % size == 0]
    way_out = f"group sizes that fit: {', '.join(map(str, fitting))}" if fitting else "no usual group size fits"
    return (
        f"group_size {group_size} does not divide its {columns} input features; {way_out}; "
        'or use strategy "channel", or list the module in ignore'
    )


def _check_given_scales(
    weight: torch.Tensor,
    args: QuantizationArgs,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    place: str,
) -> None:
    problems = []
    expected = scale_shape(args, weight.shape)
    if tuple(scale.shape) != expected:
        problems.append(Problem(place, f"the scale has shape {list(scale.shape)}, expected {list(expected)}"))
    if not torch.isfinite(scale).all() or (scale == 0).any():
        problems.append(Problem(place, "the scale holds NaN, infinity or zero"))
    if args.symmetric and zero_point is not None:
        problems.append(Problem(place, "a zero point was given, but the scheme is symmetric"))
    if not args.symmetric and (zero_point is None or tuple(zero_point.shape) != expected):
        found = "none" if zero_point is None else f"one of shape {list(zero_point.shape)}"
        problems.append(Problem(place, f"needs a zero point of shape {list(expected)}, found {found}"))
    elif zero_point is not None and not args.symmetric and zero_point.dtype != zero_point_dtype(args):
        message = f"needs a zero point of dtype {zero_point_dtype(args)}, found {zero_point.dtype}"
        problems.append(Problem(place, message))
    if problems:
        raise QuantizationError(problems=problems)


def _not_finite(weight: torch.Tensor, place: str) -> QuantizationError:
    index = (~torch.isfinite(weight)).nonzero()[0].tolist()
    value = weight[tuple(index)].item()
    return QuantizationError(
        problems=[Problem(place, f"holds {value} at index {index}; a weight must be finite to be quantized")]
    )
