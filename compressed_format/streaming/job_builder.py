"""A job put together: source, destination's files, units, and the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressed_format.checkpoint import Checkpoint, read_checkpoint
from compressed_format.checkpoint.companions import companion_files
from compressed_format.checkpoint.index import INDEX_SUFFIX, STEMS, Stem
from compressed_format.checkpoint.spans import read_span
from compressed_format.config import QuantizationConfig
from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.errors import ConfigError, Problem
from compressed_format.reading.reader import CONFIG_IN_METADATA, config_file
from compressed_format.streaming.job import Job
from compressed_format.streaming.outputs import OutputTensor, layer_order, place_tensors
from compressed_format.streaming.sources import SourceFile
from compressed_format.streaming.units import UNIT_BYTES, CopySpan, Placement, Task, TaskUnit

__all__ = ["JobBuilder", "Source"]

_UNIT_TASKS = 256
_SAMPLES = 8
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, its files as they are now, and the content of its ``config.json``: None without one."""

    checkpoint: Checkpoint
    files: Mapping[str, SourceFile]
    content: dict[str, Any] | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Source:
        """Raises :class:`CheckpointError` and :class:`ConfigError` for what cannot be read."""
        checkpoint = read_checkpoint(path)
        files = {}
        for name in checkpoint.files:
            status = checkpoint.status(name)
            files[name] = SourceFile(checkpoint.folder / name, status.st_size, status.st_mtime_ns)
        content = None
        config = config_file(checkpoint.folder) if _is_folder(checkpoint) else None
        if config is not None:
            content = parse_json(read_bytes(config), str(config))
            if not isinstance(content, dict):
                raise ConfigError(f"{config}: must be a JSON object, not {type(content).__name__}")
        return cls(checkpoint, files, content)

    @property
    def is_folder(self) -> bool:
        """Whether the checkpoint is a folder, with files beside the weights, and not a single file."""
        return _is_folder(self.checkpoint)

    @property
    def stem(self) -> Stem:
        """How the names of its files of tensors begin."""
        return next((stem for stem in STEMS if all(file.startswith(stem) for file in self.checkpoint.files)), "model")

    def left_behind(self) -> list[Problem]:
        """Tensors in the folder that are no part of the checkpoint, and so of nothing that is written."""
        if not self.is_folder:
            return []
        names = sorted(path.name for path in self.checkpoint.folder.glob("*.safetensors"))
        others = [name for name in names if name not in self.files]
        if not others:
            return []
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        return [Problem(others[0] + more, "is no part of the checkpoint, as its files tell, and is left behind")]

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from any other, and from itself once it has changed.

        Models of one architecture have files of the same size, and whoever unpacks archives may find all at one time:
        some of the bytes count, too.
        """
        found: dict[str, Any] = {name: [file.size, file.mtime_ns, _sampled(file)] for name, file in self.files.items()}
        if self.content is not None:
            found["config.json"] = hashlib.sha256(json.dumps(self.content).encode()).hexdigest()
        return found


def _is_folder(checkpoint: Checkpoint) -> bool:
    return checkpoint.path.is_dir() or checkpoint.path.name.endswith(INDEX_SUFFIX)  # which is one's, by another name


def _sampled(file: SourceFile) -> str:
    """A hash of a few pieces of a file, its end among them. Raises :class:`CheckpointError`."""
    found = hashlib.sha256()
    piece = bytearray(min(_SAMPLE_BYTES, file.size))
    for number in range(1, _SAMPLES + 1):
        read_span(file.path, (file.size - len(piece)) * number // _SAMPLES, piece)
        found.update(piece)
    return found.hexdigest()


class JobBuilder:
    """Collects what a job writes. A ``destination`` that ends in ``.safetensors`` becomes one file, else a folder."""

    def __init__(self, source: Source, destination: Path, max_shard_size: int) -> None:
        self.source, self.destination, self.max_shard_size = source, destination, max_shard_size
        self._modules: dict[str, list[OutputTensor]] = {}
        self._work: list[tuple[str, Callable[[Mapping[str, Placement]], Sequence[Task]]]] = []
        self._content: dict[str, Any] | None = source.content
        self._metadata = {key: value for key, value in source.checkpoint.metadata.items() if key != CONFIG_IN_METADATA}

    @property
    def is_file(self) -> bool:
        """Whether the destination is a single file."""
        return self.destination.name.endswith(".safetensors")

    def add(self, outputs: Sequence[OutputTensor], tasks: Callable[[Mapping[str, Placement]], Sequence[Task]]) -> None:
        """Tensors of one module, and the work that makes them once it is known where each of them goes."""
        for output in outputs:
            self._modules.setdefault(output.name.rpartition(".")[0], []).append(output)
        self._work.append((outputs[0].name, tasks))

    def copy(self, name: str) -> None:
        """A tensor of the source that stays as it is."""
        spec = self.source.checkpoint.spec(name)
        file = self.source.files[spec.file]

        def tasks(places: Mapping[str, Placement]) -> list[Task]:
            to = places[name]
            return [
                CopySpan(
                    file,
                    spec.start + done,
                    min(UNIT_BYTES, spec.nbytes - done),
                    Placement(to.file, to.start + done),
                )
                for done in range(0, spec.nbytes, UNIT_BYTES)
            ]

        self.add([OutputTensor(name, spec.dtype, spec.shape)], tasks)

    def set_config(self, config: QuantizationConfig | None) -> None:
        """Write ``config`` where readers look for it; None leaves a checkpoint that is not compressed."""
        if self.is_file:
            self._metadata |= {} if config is None else {CONFIG_IN_METADATA: json.dumps(config.to_dict())}
            return
        content = dict(self.source.content or {})
        content.pop("quantization_config", None)
        content.pop("compression_config", None)
        if isinstance(content.get("text_config"), dict):
            content["text_config"] = {
                key: value for key, value in content["text_config"].items() if key != "quantization_config"
            }
        if config is not None:
            content["quantization_config"] = config.to_dict()
        self._content = content or None

    def job(self, fingerprint: Mapping[str, Any]) -> Job:
        """All of it. Raises :class:`CheckpointError` for headers longer than readers take."""
        modules = [self._modules[name] for name in sorted(self._modules, key=layer_order)]
        outputs = place_tensors(
            modules,
            max_shard_size=self.max_shard_size,
            metadata={"format": "pt", **self._metadata},
            stem=self.source.stem,
            single=self.destination.name if self.is_file else None,
        )
        files: dict[str, bytes | Path] = {}
        if not self.is_file:
            if self.source.is_folder:
                files |= companion_files(self.source.checkpoint.folder, self.destination)
            if self._content is not None:
                files["config.json"] = _json_bytes(self._content)
            if outputs.index is not None:
                files[outputs.index[0]] = outputs.index[1]
        return Job(
            fingerprint={"source": self.source.fingerprint(), "max_shard_size": self.max_shard_size, **fingerprint},
            parts=outputs.parts,
            units=self._units(outputs.places),
            files=files,
        )

    def _units(self, places: Mapping[str, Placement]) -> list[TaskUnit]:
        """The work in the order of the layers, cut into pieces that are worth a worker's while, each of one file."""
        units: list[TaskUnit] = []
        gathered: list[Task] = []
        size = 0

        def close() -> None:
            nonlocal gathered, size
            if gathered:
                units.append(TaskUnit(f"{len(units):06d}", tuple(gathered)))
            gathered, size = [], 0

        for _, tasks in sorted(self._work, key=lambda work: layer_order(work[0])):
            for task in tasks(places):
                full = size + task.nbytes > UNIT_BYTES or len(gathered) >= _UNIT_TASKS
                if gathered and (full or gathered[0].sources != task.sources):
                    close()
                gathered.append(task)
                size += task.nbytes
        close()
        return units


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell out and UTF-8 cannot hold
        return f"{json.dumps(content, indent=2)}\n".encode()
