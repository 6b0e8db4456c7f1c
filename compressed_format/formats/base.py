"""What every format is: a name, the tensors it stores, and the two translations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from compressed_format import ops
from compressed_format.blocks import block_shape
from compressed_format.config import ActivationOrdering, CompressionFormat, QuantizationArgs, QuantizationStrategy
from compressed_format.errors import FormatError, Problem
from compressed_format.quantization import QuantizedWeight
from compressed_format.scales import code_range

__all__ = [
    "FLOAT_DTYPES",
    "Format",
    "StoredTensor",
    "TensorSpec",
    "check_codes",
    "check_scales",
    "check_tensors",
    "check_zero_point",
    "decode_g_idx",
    "dense_weight",
    "g_idx_spec",
    "require_args",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor must look like: one of ``dtypes``, and ``shape``, where None stands for any size."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int | None, ...]

    def problem(self, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a tensor of this dtype and shape, or None."""
        if dtype not in self.dtypes:
            return f"has dtype {_name(dtype)}, expected {' or '.join(map(_name, self.dtypes))}"
        fits = len(shape) == len(self.shape) and all(
            expected in (None, found) for expected, found in zip(self.shape, shape, strict=True)
        )
        if fits:
            return None
        expected = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"has shape {list(shape)}, expected [{expected}]"


class StoredTensor(Protocol):
    """What is known of a tensor before it is read: the name of its dtype, and its shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Format(ABC):
    """One way to lay a weight out in tensors.

    Tensors go by their suffix: the checkpoint's name is ``<module>.<suffix>``. ``place`` is the module's name, for
    errors.
    """

    name: CompressionFormat

    @abstractmethod
    def tensor_specs(self, shape: tuple[int, ...], args: QuantizationArgs | None) -> dict[str, TensorSpec]:
        """The tensors of a weight of ``shape`` ``[..., O, I]``, by suffix, in the order they are written."""

    @abstractmethod
    def encode(
        self, quantized: QuantizedWeight, args: QuantizationArgs | None, *, place: str = ""
    ) -> dict[str, torch.Tensor]:
        """The tensors that hold ``quantized``. Raises :class:`FormatError` for codes or scales out of range."""

    @abstractmethod
    def decode(
        self, tensors: Mapping[str, torch.Tensor], args: QuantizationArgs | None, *, place: str = ""
    ) -> QuantizedWeight:
        """The inverse of :meth:`encode`. Raises :class:`FormatError` for anything that :meth:`encode` cannot write."""


def check_tensors(
    tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], place: str, optional: tuple[str, ...] = ()
) -> None:
    """Raise one :class:`FormatError` that lists each missing, misshapen or mistyped tensor."""
    problems = []
    for suffix, spec in specs.items():
        name = f"{place}.{suffix}" if place else suffix
        if suffix in tensors:
            problem = spec.problem(tensors[suffix].dtype, tuple(tensors[suffix].shape))
            if problem:
                problems.append(Problem(name, problem))
        elif suffix not in optional:
            problems.append(Problem(name, f"is missing; found {', '.join(sorted(tensors)) or 'no tensors'}"))
    if problems:
        raise FormatError(problems=problems)


def check_codes(codes: torch.Tensor, args: QuantizationArgs, place: str) -> None:
    """Raise :class:`FormatError` for the first code outside the range of ``args`` (int) or that is NaN (float)."""
    if codes.numel() == 0:
        return
    if codes.dtype.is_floating_point:
        # float8_e4m3fn has no infinity, and NaN is all bits but the sign: found on bytes, a fourth of the time.
        magnitude = codes.view(torch.uint8) & 0x7F
        if int(magnitude.max()) != 0x7F:
            return
        bad = magnitude == 0x7F
        allowed = "a finite float8_e4m3fn value"
    elif args.num_bits == 8 * codes.element_size():
        return
    else:
        lowest, highest = code_range(args)
        smallest, largest = torch.aminmax(codes)
        if lowest <= smallest and largest <= highest:
            return
        bad = (codes < lowest) | (codes > highest)
        allowed = f"{int(lowest)} to {int(highest)} for {args.num_bits} bits"
    if bad.any():
        index = bad.nonzero()[0].tolist()
        value = codes[tuple(index)].to(torch.float32).item()
        raise FormatError(problems=[Problem(place, f"holds the code {value:g} at index {index}, expected {allowed}")])


def check_zero_point(quantized: QuantizedWeight, args: QuantizationArgs, place: str) -> None:
    """Raise :class:`FormatError` for a zero point that symmetric ``args`` have no tensor for."""
    if quantized.zero_point is not None and args.symmetric:
        raise FormatError(problems=[Problem(f"{place}.weight_zero_point", "was given, but the scheme is symmetric")])


def check_scales(scale: torch.Tensor, place: str) -> None:
    """Raise :class:`FormatError` for a scale that is NaN or infinite."""
    if not _all_finite(scale):
        index = (~torch.isfinite(scale)).nonzero()[0].tolist()
        value = scale[tuple(index)].item()
        raise FormatError(problems=[Problem(place, f"holds {value} at index {index}, expected a finite scale")])


def _all_finite(values: torch.Tensor) -> bool:
    if values.dtype not in FLOAT_DTYPES or values.numel() == 0:
        return bool(torch.isfinite(values).all())
    # NaN is the least and the largest of all that it is among. One pass without copies, where isfinite takes five.
    least, largest = torch.aminmax(values)
    return math.isfinite(float(least)) and math.isfinite(float(largest))


def require_args(args: QuantizationArgs | None, name: CompressionFormat) -> QuantizationArgs:
    """``args``, which a quantized format cannot do without."""
    if args is None:
        raise FormatError(f"the format {name.value} needs a weights scheme, found none")
    return args


def g_idx_spec(shape: tuple[int, ...], args: QuantizationArgs) -> dict[str, TensorSpec]:
    """The spec of ``weight_g_idx``, which files have where GPTQ reordered columns across groups."""
    if args.actorder is not ActivationOrdering.GROUP:
        return {}
    return {"weight_g_idx": TensorSpec((torch.int32,), (shape[-1],))}


def decode_g_idx(g_idx: torch.Tensor | None, columns: int, groups: int, place: str) -> torch.Tensor | None:
    """A stored ``weight_g_idx``, or None where it is absent or unset (-1): columns are then in their groups' order."""
    if g_idx is None:
        return None
    check_tensors({"weight_g_idx": g_idx}, {"weight_g_idx": TensorSpec((torch.int32,), (columns,))}, place)
    if bool((g_idx == -1).any()):
        return None
    if g_idx.numel() and not (int(g_idx.min()) >= 0 and int(g_idx.max()) < groups):
        found = f"{int(g_idx.min())} to {int(g_idx.max())}"
        raise FormatError(
            problems=[Problem(f"{place}.weight_g_idx", f"names groups {found}, expected 0 to {groups - 1}")]
        )
    return g_idx


def dense_weight(
    checked: QuantizedWeight, shape: tuple[int, ...], args: QuantizationArgs | None, dtype: torch.dtype | None
) -> torch.Tensor:
    """As :func:`~compressed_format.quantization.dequantize`, by the op: of a weight that a format has checked.

    Its codes may still be packed, in the dense layout.
    """
    codes, scale, zero_point = checked.codes, checked.scale, checked.zero_point
    if scale is None or args is None:
        return codes if dtype is None else codes.to(dtype)
    if 0 in shape:  # an empty part of a weight may come with the scales of a block that it lies in
        return scale.new_empty(shape, dtype=dtype)
    g_idx = checked.g_idx if args.strategy is QuantizationStrategy.GROUP else None
    # Kernels take scales that lie together, and a range of columns may have cut them out of longer rows.
    scale, zero_point = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
    layout = (args.num_bits, shape[-1], *block_shape(args, shape))
    return ops.dequantize(codes, scale, zero_point, g_idx, None, *layout, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
