"""Embedding and output head: one weight, or two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressed_format.checking import codes
from compressed_format.checking.ignored import HEADS
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.stored import Stored
from compressed_format.checkpoint import TensorSpec
from compressed_format.errors import CheckpointError

__all__ = ["check_ties"]

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration")
_CHUNK = 2 * 1024 * 1024


def check_ties(content: Mapping[str, Any], stored: Stored, notebook: Notebook) -> None:
    """Note a head that contradicts ``tie_word_embeddings``, where config.json says something about it."""
    tied = _says(content)
    if tied is None:
        return
    embeddings = [name for name in stored.modules if name.rpartition(".")[2] in _EMBEDDINGS and _weighs(stored, name)]
    heads = [name for name in stored.modules if name.rpartition(".")[2] in HEADS and _weighs(stored, name)]
    if not embeddings:
        return
    architectures = content.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not tied and not heads and any(isinstance(name, str) and name.endswith(_WITH_HEAD) for name in names):
        message = f"tie_word_embeddings is false, and no {HEADS[0]} is stored; {codes.NO_HEAD.way_out}"
        notebook.add(codes.NO_HEAD, "config.json", message)
    if not tied or len(embeddings) != 1 or not heads or heads[0].rpartition(".")[2] != HEADS[0]:
        return
    same = _same(stored, stored.modules[embeddings[0]], stored.modules[heads[0]], notebook)
    if same is False:
        message = f"differs from {embeddings[0]}, which it is tied to; {codes.TIED_WEIGHTS.way_out}"
        notebook.add(codes.TIED_WEIGHTS, heads[0], message)
    elif same:
        message = f"is stored, and is the same as {embeddings[0]}, which it is tied to; {codes.TIED_TWICE.way_out}"
        notebook.add(codes.TIED_TWICE, heads[0], message)


def _says(content: Mapping[str, Any]) -> bool | None:
    """``tie_word_embeddings``, where it is written; classes of models have defaults of their own."""
    text = content.get("text_config")
    for place in (content, text if isinstance(text, Mapping) else {}):
        if isinstance(place.get("tie_word_embeddings"), bool):
            return bool(place["tie_word_embeddings"])
    return None


def _weighs(stored: Stored, name: str) -> bool:
    return name in stored.compressed or "weight" in stored.modules[name]


def _same(
    stored: Stored, one: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec], notebook: Notebook
) -> bool | None:
    """Whether two modules hold the same bytes; None where only bytes that nobody shall read could tell."""
    suffixes = (one.keys() | other.keys()) - {"bias"}
    for suffix in suffixes:
        if suffix not in one or suffix not in other:
            return False
        if (one[suffix].dtype, one[suffix].shape) != (other[suffix].dtype, other[suffix].shape):
            return False
    if stored.reader is None:
        return None
    try:
        return all(
            first == second
            for suffix in sorted(suffixes)
            for first, second in _pairs(stored, one[suffix], other[suffix])
        )
    except CheckpointError as error:
        notebook.add_error(codes.TENSOR_UNREADABLE, error)
        return None


def _pairs(stored: Stored, one: TensorSpec, other: TensorSpec) -> Iterator[tuple[bytearray, bytearray]]:
    assert stored.reader is not None
    for start in range(0, one.nbytes, _CHUNK):
        stop = min(start + _CHUNK, one.nbytes)
        yield (
            stored.reader.read(one, one.start + start, one.start + stop),
            stored.reader.read(other, other.start + start, other.start + stop),
        )
