"""What a quantization scheme does to activations: scales found from the values, rounding, and back.

Static scales come with the checkpoint; dynamic ones are those of the values themselves, of the whole tensor, of each
token (the last dimension, for inputs of any rank) or of each group along the last dimension.
"""

from __future__ import annotations

import torch

from compressed_format.config import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_format.dtypes import DTYPES
from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.scales import round_to_codes, scale_of_range

__all__ = [
    "WHOLE_TENSOR",
    "WHOLE_TOKEN",
    "activation_group_size",
    "activation_scale",
    "fake_quantize_activations",
]

WHOLE_TENSOR = 0
WHOLE_TOKEN = -1

_FLOAT8_LARGEST = DTYPES["float8_e4m3fn"].largest


def activation_group_size(args: QuantizationArgs, place: str = "") -> int:
    """How many values share a scale: :data:`WHOLE_TENSOR`, :data:`WHOLE_TOKEN`, or a number along the last dimension.

    Raises :class:`UnsupportedFormatError` for what no op can round activations to.
    """
    eight_bit_float = args.type is QuantizationType.FLOAT and args.num_bits == 8 and args.scale_dtype is None
    small_integer = args.type is QuantizationType.INT and 1 <= args.num_bits <= 8
    if (eight_bit_float or small_integer) and args.dynamic != "local":
        if args.strategy is QuantizationStrategy.TENSOR:
            return WHOLE_TENSOR
        if args.strategy is QuantizationStrategy.TOKEN:
            return WHOLE_TOKEN
        if args.strategy is QuantizationStrategy.GROUP and args.group_size is not None:
            return args.group_size
    message = (
        f"activations of {args.type.value} {args.num_bits} bits by {args.strategy.value} "
        f"(dynamic: {args.dynamic}) cannot be run yet"
    )
    raise UnsupportedFormatError(problems=[Problem(place, message)])


def fake_quantize_activations(
    input: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    is_float: bool,
    symmetric: bool,
    group_size: int,
) -> torch.Tensor:
    """Round activations ``[..., n]`` to codes and back; ``round(clamp(x / scale + zero_point))``, ties to even.

    ``scale`` and ``zero_point`` are the static ones: ``[1]``, or ``[n / group_size]``; with ``input``'s leading
    dimensions in front where tokens differ, as those of different experts do. Without ``scale``, both are found from
    the values by the formulas of weights, in the dtype of ``input``. ``group_size`` is the number of values that share
    one: :data:`WHOLE_TENSOR`, :data:`WHOLE_TOKEN`, or so many along the last dimension. The result has the
    dtype and shape of ``input``.
    """
    if input.numel() == 0:
        return input.clone(memory_format=torch.contiguous_format)
    lowest, highest = _code_range(bits, is_float)
    values = input.unflatten(-1, (-1, group_size)) if group_size > 0 else input
    if scale is None:
        minimum, maximum = (
            torch.aminmax(values)
            if group_size == WHOLE_TENSOR
            else (values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True))
        )
        scale, zero_point = activation_scale(minimum, maximum, bits, is_float, symmetric)
    elif group_size > 0:
        scale = scale.unsqueeze(-1)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    ratio = values / scale
    if zero_point is not None:
        ratio = ratio + zero_point.to(values.dtype)
    codes = round_to_codes(ratio, lowest, highest, is_float).to(scale.dtype)
    if zero_point is not None:
        codes = codes - zero_point.to(scale.dtype)
    return (codes * scale).reshape(input.shape).to(input.dtype).contiguous()


def activation_scale(
    minimum: torch.Tensor, maximum: torch.Tensor, bits: int, is_float: bool, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dynamic scale and zero point of activations that reach from ``minimum`` to ``maximum``."""
    stored = torch.float8_e4m3fn if is_float else torch.int8
    return scale_of_range(minimum, maximum, *_code_range(bits, is_float), None if symmetric else stored)


def _code_range(bits: int, is_float: bool) -> tuple[float, float]:
    if is_float:
        return -_FLOAT8_LARGEST, _FLOAT8_LARGEST
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
