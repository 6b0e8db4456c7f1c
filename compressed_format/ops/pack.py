"""``compressed_format::pack_codes``: codes of 1 to 8 bits into the int32 words of a file.

Everything about the op but its native kernels is here: schema, checks, fake and definition. The definition is
:func:`compressed_format.bitpack.pack_codes`; the op has to return the same bits. Codes must lie in the range of
``bits``, which is for the caller to know: the op looks at the dtype, not at the values, and drops what does not fit.
"""

from __future__ import annotations

from typing import cast

import torch

from compressed_format import bitpack
from compressed_format.errors import OpArgumentError

__all__ = ["pack_codes"]

_library = torch.library.Library("compressed_format", "FRAGMENT")
_library.define("pack_codes(Tensor codes, int bits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("pack_codes_reference(Tensor codes, int bits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

_op = torch.ops.compressed_format.pack_codes.default


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 ``codes`` ``[..., n]`` into int32 ``[..., ceil(n * bits / 32)]`` with the fastest kernel there is."""
    return cast("torch.Tensor", _op(codes, bits))


def _check(codes: torch.Tensor, bits: int) -> None:
    if codes.dtype != torch.int8:
        raise OpArgumentError(f"pack_codes: codes must be torch.int8, not {codes.dtype}")
    if codes.ndim == 0:
        raise OpArgumentError("pack_codes: codes must have at least one dimension, whose rows are packed, but has none")
    if not 1 <= bits <= 8:
        raise OpArgumentError(f"pack_codes: bits must lie in 1 to 8, not {bits}")


def _reference(codes: torch.Tensor, bits: int) -> torch.Tensor:
    _check(codes, bits)
    return bitpack.pack_codes(codes, bits)


def _fake(codes: torch.Tensor, bits: int) -> torch.Tensor:
    _check(codes, bits)
    words = bitpack.packed_words(codes.shape[-1], bits)
    return codes.new_empty((*codes.shape[:-1], words), dtype=torch.int32)


def _checked(keys: torch.DispatchKeySet, codes: torch.Tensor, bits: int) -> torch.Tensor:
    _check(codes, bits)
    return cast("torch.Tensor", _op.redispatch(keys & _below_checks, codes, bits))


# An error raised by native code can only be a RuntimeError. So that arguments raise the same typed error whichever
# kernel would have run, they are checked where every call passes just before the kernels, in inference mode too.
_below_checks = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
_library.impl("pack_codes", _checked, "BackendSelect", with_keyset=True)

# The op is its reference on every device, until a native library registers a kernel for one.
for _name in ("pack_codes", "pack_codes_reference"):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compressed_format::{_name}", _fake, lib=_library)
