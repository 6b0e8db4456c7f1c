"""``open_checkpoint``: a checkpoint of any size as its modules and tensors, of which only what is asked for is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from frozendict import frozendict

from compressed_format.checkpoint import Checkpoint, TensorSpec, read_checkpoint
from compressed_format.config import QuantizationConfig, TargetResolution, resolve_targets
from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.config.layers import OF_COMPRESSED, layer_classes
from compressed_format.errors import CheckpointError, ConfigError, Problem
from compressed_format.reading.stored_module import StoredModule

__all__ = ["CONFIG_IN_METADATA", "CheckpointReader", "config_file", "open_checkpoint"]

Framework = Literal["pt", "np"]

CONFIG_IN_METADATA = "quantization_config"
"""The key in the metadata of a file that holds the config of a checkpoint that has no folder, and no config.json."""


class CheckpointReader(Mapping[str, Any]):
    """The raw tensors of a checkpoint by name, mapped, and its :attr:`modules`.

    ``reader[name]`` is a tensor, of torch or of numpy as the checkpoint was opened for; see
    :class:`~compressed_format.checkpoint.Checkpoint` for how long it is valid. ``config`` is the
    ``quantization_config``, None of a checkpoint that is not compressed, and ``warnings`` what is odd about it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: QuantizationConfig | None,
        warnings: tuple[Problem, ...],
        framework: Framework,
    ) -> None:
        self.path, self.folder, self.files = checkpoint.path, checkpoint.folder, checkpoint.files
        self.metadata: Mapping[str, str] = checkpoint.metadata
        self.config, self.warnings, self.framework = config, warnings, framework
        self.checkpoint = checkpoint

    def spec(self, name: str) -> TensorSpec:
        """Dtype, shape and place of a tensor, from its header alone. Raises ``KeyError``."""
        return self.checkpoint.spec(name)

    def __getitem__(self, name: str) -> Any:
        if self.framework == "pt":
            return self.checkpoint[name]
        from compressed_format.reading.arrays import array

        return array(self.checkpoint, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def __repr__(self) -> str:
        how = "not compressed" if self.config is None else self.config.format.value
        return f"CheckpointReader({str(self.path)!r}, {len(self)} tensors in {len(self.files)} files, {how})"

    # See Checkpoint: tensors cannot be compared in one word.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def modules(self) -> frozendict[str, StoredModule]:
        """The modules that the names of tensors speak of, in the order of these.

        Which scheme a module has, its name and the class that this suggests decide
        (:mod:`~compressed_format.config.layers`). Raises as :func:`~compressed_format.config.resolve_targets` does.
        """
        tensors: dict[str, dict[str, TensorSpec]] = {}
        for name in self.checkpoint:
            module, _, suffix = name.rpartition(".")
            tensors.setdefault(module, {})[suffix] = self.checkpoint.spec(name)
        assigned = self.resolution.assignments
        version = None if self.config is None else self.config.version
        return frozendict(
            {
                name: StoredModule(
                    name,
                    frozendict(found),
                    self._classes.get(name),
                    assigned.get(name),
                    version,
                    self.__getitem__,
                    self.checkpoint.__getitem__,
                )
                for name, found in tensors.items()
            }
        )

    @cached_property
    def resolution(self) -> TargetResolution:
        """What the config makes of the modules, by their names."""
        if self.config is None:
            return TargetResolution(frozendict(), frozendict(), ())
        compressed = {name.rpartition(".")[0] for name in self.checkpoint if name.rpartition(".")[2] in OF_COMPRESSED}
        return resolve_targets(self._classes, self.config, quantized=compressed)

    @cached_property
    def _classes(self) -> dict[str, str]:
        return layer_classes({name: self.checkpoint.spec(name).shape for name in self.checkpoint})


def open_checkpoint(
    path: str | os.PathLike[str], *, framework: Framework = "pt", allow_unknown: bool = False
) -> CheckpointReader:
    """Open a checkpoint by its headers and its config; no tensor is read until it is asked for.

    ``path`` is what :func:`~compressed_format.checkpoint.read_checkpoint` takes: a folder, an index, or a file, whose
    config is in ``config.json`` beside it, or in its metadata. With ``framework="np"``, raw tensors are arrays of numpy
    (those of bfloat16 and FP8 need ``ml_dtypes``), and torch is imported only for what ``quantized`` and ``dense`` do.
    ``allow_unknown`` is that of :meth:`QuantizationConfig.from_checkpoint`.

    Raises :class:`CheckpointError` for files that contradict the format, and :class:`ConfigError` for a config that
    means nothing.
    """
    if framework not in get_args(Framework):
        raise CheckpointError(problems=[Problem("framework", f'must be "pt" or "np", not {framework!r}')])
    checkpoint = read_checkpoint(path)
    source = _config_source(checkpoint)
    config, warnings = (
        (None, ()) if source is None else QuantizationConfig.from_checkpoint(source, allow_unknown=allow_unknown)
    )
    return CheckpointReader(checkpoint, config, warnings, framework)


def _config_source(checkpoint: Checkpoint) -> Path | dict[str, Any] | None:
    """Where the config of a checkpoint is, or what it is; None where it has none."""
    written = checkpoint.metadata.get(CONFIG_IN_METADATA)
    if written is not None:
        try:
            found = json.loads(written)
        except (ValueError, RecursionError) as error:
            place = f"{checkpoint.files[0]}: __metadata__.{CONFIG_IN_METADATA}"
            raise ConfigError(problems=[Problem(place, f"is no JSON: {error}")]) from error
        return {"quantization_config": found}
    file = config_file(checkpoint.folder)
    if file is None:
        return None
    content = parse_json(read_bytes(file), str(file))
    compressed = isinstance(content, dict) and any(
        isinstance(place, dict) and place.get(key) is not None
        for place, key in (
            (content, "quantization_config"),
            (content, "compression_config"),
            (content.get("text_config"), "quantization_config"),
        )
    )
    return file if compressed else None


def config_file(folder: Path) -> Path | None:
    """``config.json`` in ``folder``; None where there is none. Raises :class:`CheckpointError` if it is no file."""
    file = folder / "config.json"
    if file.is_file():
        return file
    if os.path.lexists(file):
        raise CheckpointError(problems=[Problem(str(file), "is a folder, a device, a pipe or a dead link, not a file")])
    return None
