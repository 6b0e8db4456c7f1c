"""The ops on compressed weights: schema, checks, fake, autograd and autocast of each.

Every ``<op>`` has a twin ``<op>_reference`` that always runs the definition in :mod:`.reference`. Until a native
library registers a kernel for a device, ``<op>`` is that definition too. Packed tensors, scales and zero points have
no gradient; activations and bias have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from compressed_format import bitpack
from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference

__all__ = [
    "FLOATS",
    "LAYOUT",
    "WEIGHT",
    "check_linear",
    "check_weight",
    "define_op",
    "dequantize",
    "embedding",
    "fake_linear",
    "gradients_of_linear",
    "library",
    "linear",
    "refuse_gradients",
    "register_autocast",
]

WEIGHT = "Tensor weight, Tensor? scale, Tensor? zero_point, Tensor? g_idx, Tensor? bitmask"
LAYOUT = "int bits, int columns, int block_rows, int block_columns"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

library = torch.library.Library("compressed_format", "FRAGMENT")


def define_op(
    name: str,
    arguments: str,
    definition: Callable[..., torch.Tensor],
    check: Callable[..., None],
    fake: Callable[..., torch.Tensor],
    check_values: Callable[..., None] | None = None,
) -> Callable[..., torch.Tensor]:
    """Register the op ``name`` and its twin, and return what calls it.

    Arguments that it cannot take raise :class:`OpArgumentError` from there, whichever kernel runs. ``check_values``
    raises another error for values that kernels refuse.
    """

    def checked(*args: Any) -> torch.Tensor:
        check(*args)
        return definition(*args)

    def checked_fake(*args: Any) -> torch.Tensor:
        check(*args)
        return fake(*args)

    for op in (name, f"{name}_reference"):
        library.define(f"{op}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compressed_format::{op}", checked_fake, lib=library)
    op = getattr(torch.ops.compressed_format, name).default

    def call(*args: Any) -> torch.Tensor:
        try:
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return cast(torch.Tensor, op(*args))
            # What torch calls for the sake of gradients is written in Python, and would take a third of a small call.
            with torch._C._AutoDispatchBelowAutograd():
                return cast(torch.Tensor, op(*args))
        except RuntimeError:
            # All that native code can raise, and to check first what is right nearly always takes longer than to
            # multiply: only now find out whether the arguments were wrong, and which.
            check(*args)
            if check_values is not None:
                check_values(*args)
            raise

    return call


def check_weight(
    op: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
) -> None:
    def fail(argument: str, message: str) -> None:
        raise OpArgumentError(f"{op}: {argument} {message}")

    packed = weight.dtype == torch.int32
    if not packed and weight.dtype not in (*FLOATS, torch.int8, torch.float8_e4m3fn):
        fail("weight", f"must be int32 words, int8 or float8_e4m3fn codes, or a float dtype, not {weight.dtype}")
    if not 1 <= bits <= 8:
        fail("bits", f"must lie in 1 to 8, not {bits}")
    if block_rows < 1 or block_columns < 1:
        fail("block_rows and block_columns", f"must be positive, not {block_rows} and {block_columns}")
    if scale is None and (packed or weight.dtype in (torch.int8, torch.float8_e4m3fn)):
        fail("scale", "is missing; only a weight of plain values goes without")
    if columns < 0:
        fail("columns", f"must not be negative, not {columns}")
    if bitmask is not None:
        if packed:
            fail("bitmask", "goes with int8 or float8_e4m3fn codes or plain values, not with packed words")
        if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or bitmask.shape[1] != -(-columns // 8):
            fail("bitmask", f"must be uint8 [rows, {-(-columns // 8)}], not {bitmask.dtype} {list(bitmask.shape)}")
        rows = bitmask.shape[:1]
    else:
        stored = bitpack.packed_words(columns, bits) if packed else columns
        if weight.ndim < 2 or weight.shape[-1] != stored:
            fail("weight", f"must have {stored} elements a row for {columns} columns, not shape {list(weight.shape)}")
        rows = weight.shape[:-1]
    if scale is None:
        return
    if scale.dtype not in FLOATS:
        fail("scale", f"must have a float dtype, not {scale.dtype}")
    expected = (*rows[:-1], -(-rows[-1] // block_rows), -(-columns // block_columns))
    if tuple(scale.shape) not in (expected, (1,)):
        fail("scale", f"must have shape {list(expected)}, or [1] for the whole weight, not {list(scale.shape)}")
    if zero_point is not None:
        if tuple(scale.shape) == (1,):
            expected = (1,)
            if zero_point.dtype == torch.int32:
                fail("zero_point", "must not be packed where the whole weight has one")
        elif zero_point.dtype == torch.int32:
            expected = (*expected[:-2], bitpack.packed_words(expected[-2], bits), expected[-1])
        if tuple(zero_point.shape) != expected:
            fail("zero_point", f"must have shape {list(expected)}, not {list(zero_point.shape)}")
    if g_idx is not None and (g_idx.dtype != torch.int32 or tuple(g_idx.shape) != (columns,)):
        fail("g_idx", f"must be int32 [{columns}], not {g_idx.dtype} {list(g_idx.shape)}")


def _rows(weight: torch.Tensor, bitmask: torch.Tensor | None) -> torch.Size:
    return weight.shape[:-1] if bitmask is None else bitmask.shape[:1]


# dequantize ----------------------------------------------------------------------------------------------------------


def _check_dequantize(*arguments: Any) -> None:
    *weight, dtype = arguments if len(arguments) == 10 else (*arguments, None)
    check_weight("dequantize", *weight)
    if dtype is not None and dtype not in FLOATS:
        raise OpArgumentError(f"dequantize: dtype must be a float dtype, not {dtype}")


def _fake_dequantize(
    weight: torch.Tensor,
    scale: Any,
    zero_point: Any,
    g_idx: Any,
    bitmask: Any,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Any:
    own = weight.dtype if scale is None else scale.dtype
    return weight.new_empty((*_rows(weight, bitmask), columns), dtype=own if dtype is None else dtype)


dequantize = define_op(
    "dequantize",
    f"{WEIGHT}, {LAYOUT}, ScalarType? dtype=None",
    reference.dequantize,
    _check_dequantize,
    _fake_dequantize,
)


# linear --------------------------------------------------------------------------------------------------------------


def check_linear(
    op: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: Any,
    zero_point: Any,
    g_idx: Any,
    bitmask: Any,
    bias: torch.Tensor | None,
    *layout: int,
) -> None:
    check_weight(op, weight, scale, zero_point, g_idx, bitmask, *layout)
    rows = _rows(weight, bitmask)
    if len(rows) != 1:
        raise OpArgumentError(f"{op}: weight must be a matrix, not {len(rows) + 1}-dimensional")
    if input.dtype not in FLOATS:
        raise OpArgumentError(f"{op}: input must have a float dtype, not {input.dtype}")
    if input.ndim < 1 or input.shape[-1] != layout[1]:
        raise OpArgumentError(f"{op}: input must have {layout[1]} columns, not shape {list(input.shape)}")
    if bias is not None and (tuple(bias.shape) != tuple(rows) or bias.dtype not in FLOATS):
        raise OpArgumentError(f"{op}: bias must be [{rows[0]}] floats, not {bias.dtype} {list(bias.shape)}")


def _check_linear(*args: Any) -> None:
    check_linear("linear", *args)


def fake_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: Any,
    zero_point: Any,
    g_idx: Any,
    bitmask: Any,
    bias: Any,
    *layout: int,
) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], _rows(weight, bitmask)[0]))


linear = define_op(
    "linear",
    f"Tensor input, {WEIGHT}, Tensor? bias, {LAYOUT}",
    reference.linear,
    _check_linear,
    fake_linear,
)


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, scale, zero_point, g_idx, bitmask, bias, *layout = inputs
    ctx.save_for_backward(weight, scale, zero_point, g_idx, bitmask)
    ctx.layout = layout
    ctx.bias_dtype = None if bias is None else bias.dtype


def refuse_gradients(op: str, needed: Iterable[bool]) -> None:
    """Raise where a tensor of :data:`WEIGHT` was to be trained: it would stay as it is, without a word."""
    names = [argument.split()[-1] for argument in WEIGHT.split(", ")]
    wanted = [name for name, need in zip(names, needed, strict=True) if need]
    if wanted:
        raise OpArgumentError(
            f"{op}: {', '.join(wanted)} must not require a gradient, as the tensors of a compressed weight have none; "
            "freeze them by requires_grad_(False), or decompress() the model to train its weights"
        )


def gradients_of_linear(
    op: str, ctx: Any, gradient: torch.Tensor, first: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of input and bias of an op whose weight's tensors begin at argument number ``first``."""
    refuse_gradients(op, ctx.needs_input_grad[first : first + 5])
    to_input = to_bias = None
    if ctx.needs_input_grad[0]:
        dense = dequantize(*ctx.saved_tensors, *ctx.layout)
        to_input = gradient @ dense.to(gradient.dtype)
    if ctx.needs_input_grad[first + 5]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return to_input, to_bias


def _backward_of_linear(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_input, to_bias = gradients_of_linear("linear", ctx, gradient, 1)
    return (to_input, *[None] * 5, to_bias, *[None] * 4)


for _name in ("linear", "linear_reference"):
    torch.library.register_autograd(
        f"compressed_format::{_name}", _backward_of_linear, setup_context=_save_for_linear, lib=library
    )


def register_autocast(name: str, device: str, key: torch._C.DispatchKey) -> None:
    """Under ``torch.autocast``, multiply in its dtype, as torch's own linear does; float64 stays what it is."""
    op = getattr(torch.ops.compressed_format, name).default

    def with_cast(input: torch.Tensor, *rest: Any) -> Any:
        if input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(input, *rest)

    library.impl(name, with_cast, key.name)


for _name in ("linear", "linear_reference"):
    register_autocast(_name, "cpu", torch._C.DispatchKey.AutocastCPU)
    register_autocast(_name, "cuda", torch._C.DispatchKey.AutocastCUDA)


# embedding -----------------------------------------------------------------------------------------------------------


def _check_embedding(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
    check_weight("embedding", weight, *rest)
    if indices.dtype not in (torch.int64, torch.int32):
        raise OpArgumentError(f"embedding: indices must be int64 or int32, not {indices.dtype}")
    if len(_rows(weight, rest[3])) != 1:
        raise OpArgumentError(f"embedding: weight must be a matrix, not shape {list(weight.shape)}")


def _fake_embedding(
    indices: torch.Tensor, weight: torch.Tensor, scale: Any, zero_point: Any, g_idx: Any, bitmask: Any, *layout: int
) -> torch.Tensor:
    dtype = weight.dtype if scale is None else scale.dtype
    return weight.new_empty((*indices.shape, layout[1]), dtype=dtype)


def _check_indices(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
    rows = _rows(weight, rest[3])[0]
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        found = f"{int(indices.min())} to {int(indices.max())}"
        raise IndexError(f"embedding: index out of range: the table has {rows} rows, and indices are {found}")


embedding = define_op(
    "embedding",
    f"Tensor indices, {WEIGHT}, {LAYOUT}",
    reference.embedding,
    _check_embedding,
    _fake_embedding,
    _check_indices,
)
