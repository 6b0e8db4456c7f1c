"""The files beside a checkpoint's weights: tokenizer, templates, code; which of them go along to a new one."""

from __future__ import annotations

from pathlib import Path

from compressed_format.checkpoint.partial_folder import JOB_SUFFIX, LOCK_SUFFIX, PARTIAL_SUFFIX

__all__ = ["companion_files"]

# Files that hold weights in one way or another; the new ones take their place.
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json"}
)
_UNFINISHED = (PARTIAL_SUFFIX, JOB_SUFFIX, LOCK_SUFFIX)


def companion_files(folder: Path, destination: Path) -> dict[str, bytes | Path]:
    """Whatever in ``folder`` is no weight, and not ``config.json``, by its name relative to it.

    Hidden files and folders stay behind, and so do unfinished saves, and what an earlier save to a ``destination``
    inside ``folder`` has left.
    """
    files: dict[str, bytes | Path] = {}
    earlier = destination.resolve()
    for found in sorted(folder.rglob("*")):
        name = found.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        unfinished = any(part.endswith(_UNFINISHED) for part in name.parts)
        weights = any(found.name.endswith(suffix) for suffix in _WEIGHT_SUFFIXES)
        left = folder.resolve() != earlier and earlier in (folder.resolve() / name).parents
        if found.is_file() and not (hidden or unfinished or weights or left) and str(name) != "config.json":
            files[name.as_posix()] = found
    return files
