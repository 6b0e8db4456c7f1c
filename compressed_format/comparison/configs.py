"""In what the configs of two checkpoints differ, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressed_format.checkpoint import Checkpoint
from compressed_format.comparison.difference import ABSENT, KeyDifference
from compressed_format.config import QuantizationConfig
from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.config.report import child
from compressed_format.errors import ConfigError
from compressed_format.reading.reader import CONFIG_IN_METADATA

__all__ = ["config_differences", "key_differences", "metadata_differences"]

_FILE = "config.json"
_QUANTIZATION = "quantization_config"
# Lists whose order says nothing.
_SETS = frozenset({"ignore", "targets"})


def config_differences(first: Checkpoint, second: Checkpoint, *, quantization: bool) -> tuple[KeyDifference, ...]:
    """In what the configs of two checkpoints differ, by JSON path: ``config.json`` beside their files and, unless
    ``quantization`` is False, ``quantization_config``, which may also be in the metadata of a file.

    The latter is compared by what it means: a default that is written and one that is not are the same, and so are the
    spellings of older releases. Raises :class:`ConfigError` for what is no JSON object.
    """
    sides = [_split_content(checkpoint) for checkpoint in (first, second)]
    models = [model for model, _ in sides]
    found: list[KeyDifference] = []
    if ABSENT not in models:
        found += key_differences(*models)
    elif models[0] is not models[1]:
        found.append(KeyDifference(_FILE, *(ABSENT if model is ABSENT else "is there" for model in models)))
    if quantization:
        found += key_differences(*({} if how is ABSENT else {_QUANTIZATION: _meaning(how)} for _, how in sides))
    return tuple(found)


def metadata_differences(first: Checkpoint, second: Checkpoint) -> tuple[KeyDifference, ...]:
    """In what the metadata of headers differ, apart from a config that is there."""
    sides = [
        {key: value for key, value in checkpoint.metadata.items() if key != CONFIG_IN_METADATA}
        for checkpoint in (first, second)
    ]
    return tuple(key_differences(*sides))


def key_differences(first: Any, second: Any) -> Iterator[KeyDifference]:
    """Each place at which two JSON values differ, in the order of the first one's keys."""
    # A list of what is left to do, and not recursion: files may be nested as deeply as they like.
    waiting = [("", first, second)]
    while waiting:
        place, one, other = waiting.pop()
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            keys = dict.fromkeys((*one, *other))
            members = [(child(place, key), one.get(key, ABSENT), other.get(key, ABSENT)) for key in keys]
        elif isinstance(one, list) and isinstance(other, list):
            pairs = _paired(one, other) if place.rpartition(".")[2] in _SETS else _aligned(one, other)
            members = [(child(place, key), *sides) for key, *sides in pairs]
        else:
            if not _equal(one, other):
                yield KeyDifference(place, one, other)
            continue
        waiting.extend(reversed(members))


def _split_content(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """What ``config.json`` says of the model, and what it, or the metadata, says of its compression."""
    path = checkpoint.folder / _FILE
    content: Any = ABSENT
    found: list[Any] = []
    if path.is_file():
        content = parse_json(read_bytes(path), str(path))
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: must be a JSON object, not {type(content).__name__}")
        text_config = content.get("text_config")
        # In the order in which readers look for it.
        places = [(content, _QUANTIZATION), (text_config, _QUANTIZATION), (content, "compression_config")]
        found = [place.pop(key) for place, key in places if isinstance(place, dict) and place.get(key) is not None]
    written = checkpoint.metadata.get(CONFIG_IN_METADATA)
    if written is not None:
        found = [parse_json(written.encode(), f"{checkpoint.files[0]}: __metadata__.{CONFIG_IN_METADATA}")]
    # One that held nothing else says nothing of the model.
    return content or ABSENT, found[0] if found else ABSENT


def _meaning(quantization: Any) -> Any:
    """The object in today's form; as it stands if this library does not understand it."""
    try:
        return QuantizationConfig.from_checkpoint({_QUANTIZATION: quantization})[0].to_dict()
    except ConfigError:
        return quantization


def _aligned(one: list[Any], other: list[Any]) -> Iterator[tuple[int, Any, Any]]:
    for index in range(max(len(one), len(other))):
        yield index, one[index] if index < len(one) else ABSENT, other[index] if index < len(other) else ABSENT


def _paired(one: list[Any], other: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    for entry in [*one, *(entry for entry in other if entry not in one)]:
        yield str(entry), entry if entry in one else ABSENT, entry if entry in other else ABSENT


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) is not isinstance(other, bool):  # to Python, true is 1
        return False
    both_nan = one != one and other != other
    return bool(one == other or both_nan)
