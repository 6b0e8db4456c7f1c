"""Which of two layouts codes of 3, 5, 6 and 7 bits have, and what tells so."""

from __future__ import annotations

import re

from compressed_format.bitpack import packed_words, word_aligned_words
from compressed_format.checking.chunks import ChunkReader
from compressed_format.checkpoint import TensorSpec
from compressed_format.formats import PackLayout

__all__ = ["told_layout"]

_FIRST_DENSE = (0, 18)


def told_layout(
    packed: TensorSpec, bits: int, columns: int | None, version: str | None, reader: ChunkReader | None
) -> tuple[PackLayout, str] | None:
    """The layout of ``weight_packed`` ``[O, words]`` and the evidence, by the same rules as
    :func:`~compressed_format.formats.pack_layout`; None where only what nobody shall read can tell.

    ``columns`` is None where nobody has read ``weight_shape``.
    """
    if columns is not None and packed_words(columns, bits) != word_aligned_words(columns, bits):
        words, dense, aligned = packed.shape[-1], packed_words(columns, bits), word_aligned_words(columns, bits)
        if words not in (dense, aligned):
            return None
        layout = PackLayout.DENSE if words == dense else PackLayout.WORD_ALIGNED
        return layout, "in the other one, its rows would have another number of words"
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version or "")
    if match is not None and (int(match[1]), int(match[2])) >= _FIRST_DENSE:
        return PackLayout.DENSE, f"version {version} wrote it"
    if reader is None and match is None:
        return None
    if reader is None:
        return PackLayout.WORD_ALIGNED, f"version {version} wrote it; only its words, which were not read, could differ"
    unused = -1 << (32 // bits * bits)
    for _, part in reader.chunks(packed):
        if bool((part & unused).any()):
            return PackLayout.DENSE, "bits are set that the other one leaves empty"
    by_whom = f"version {version} wrote it, and " if match is not None else ""
    return PackLayout.WORD_ALIGNED, f"{by_whom}the {32 - 32 // bits * bits} upper bits of all words are empty"
