"""Which weights of a byte servers know with which activations: int8 and float8. vLLM and SGLang share these rules."""

from __future__ import annotations

from compressed_format.config import QuantizationArgs, QuantizationStrategy, QuantizationType

__all__ = ["float8_experts_problem", "float8_problem", "int8_problem", "is_dynamic_token"]

_S = QuantizationStrategy
_BLOCK_COLUMNS = 128


def is_dynamic_token(args: QuantizationArgs | None) -> bool:
    """Whether each token has a scale of its own."""
    return args is not None and args.strategy is _S.TOKEN and args.dynamic is True


def int8_problem(weights: QuantizationArgs, inputs: QuantizationArgs) -> str | None:
    """What of an int-quantized layer with quantized inputs is not served, or None."""
    if weights.num_bits != 8:
        return f"stores int{weights.num_bits} weights in bytes, and only int8 ones are served so; use pack-quantized"
    if not weights.symmetric or weights.strategy not in (_S.TENSOR, _S.CHANNEL):
        return "int8 weights with quantized inputs must be symmetric, by tensor or channel"
    fits = inputs.type is QuantizationType.INT and inputs.num_bits == 8
    if not fits or not (is_dynamic_token(inputs) or _is_static_tensor(inputs)):
        return "inputs of int8 weights must be int8, static by tensor or dynamic by token"
    return None


def float8_problem(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> str | None:
    """What of a layer of float8 weights is not served, or None."""
    if not weights.symmetric or weights.strategy not in (_S.TENSOR, _S.CHANNEL, _S.BLOCK):
        return "float8 weights must be symmetric, by tensor, channel or block"
    if inputs is None:
        return None
    if inputs.type is not QuantizationType.FLOAT or inputs.num_bits != 8:
        return "inputs of float8 weights must be float8"
    if weights.strategy is _S.BLOCK:
        by_group = inputs.strategy is _S.GROUP and inputs.group_size == _BLOCK_COLUMNS and inputs.dynamic is True
        return None if by_group else f"inputs of float8 blocks must be dynamic by groups of {_BLOCK_COLUMNS}"
    if inputs.dynamic:
        return None if inputs.strategy in (_S.TOKEN, _S.TENSOR) else "dynamic inputs must be by token or tensor"
    return None if inputs.symmetric and _is_static_tensor(inputs) else "static inputs must be symmetric, by tensor"


def float8_experts_problem(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> str | None:
    """What of float8 experts is not served, or None; they are known to pass :func:`float8_problem`."""
    if weights.strategy is _S.BLOCK and inputs is not None:
        return None
    if weights.strategy is _S.CHANNEL and is_dynamic_token(inputs):
        return None
    if weights.strategy is _S.TENSOR and inputs is not None and inputs.strategy is _S.TENSOR:
        return None
    return "float8 experts must be by tensor with inputs by tensor, by channel with dynamic tokens, or by block"


def _is_static_tensor(args: QuantizationArgs) -> bool:
    return args.strategy is _S.TENSOR and not args.dynamic
