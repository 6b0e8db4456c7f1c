"""Reading a checkpoint: headers first and checked, tensors mapped when they are asked for."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from frozendict import frozendict

from compressed_format.checkpoint.collection import collection_paused
from compressed_format.checkpoint.header import MOST_PROBLEMS, TensorSpec, show_name
from compressed_format.checkpoint.index import INDEX_SUFFIX, MAX_TENSORS, STEMS, index_file, single_file
from compressed_format.checkpoint.publish import PARTIAL_SUFFIX
from compressed_format.checkpoint.shard_file import ShardFile, read_shard_names
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "read_checkpoint"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Checkpoint(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by name, in the order of their files and of the data in these.

    ``path`` is what was asked for, ``folder`` where its files are, ``files`` their names relative to that,
    ``metadata`` what their headers say besides tensors; where two files disagree, the first one's word.

    ``checkpoint[name]`` is a CPU tensor whose memory is the file's own, mapped when first touched. It stays valid as
    long as the tensor lives, whatever becomes of this object or of the file's name. Writing into it changes this
    process's copy, never the file. Only a tensor that does not start at a multiple of its item size, which the
    format allows, is copied. Raises ``KeyError`` for a name that is not there, and :class:`CheckpointError` when
    the file is no longer the one whose header was read.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        tensors: Mapping[str, TensorSpec],
        shards: Mapping[str, ShardFile],
    ) -> None:
        self.path = path
        self.folder = folder
        self.files = tuple(shards)
        self.metadata: Mapping[str, str] = frozendict(ChainMap(*(dict(shard.metadata) for shard in shards.values())))
        self._tensors = frozendict(tensors)
        self._shards = dict(shards)
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """Dtype, shape and place of a tensor, from its header alone. Raises ``KeyError``."""
        return self._tensors[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        dtype_name, shape, file, start, stop = self._tensors[name]
        dtype = torch_dtype(dtype_name)
        if start == stop:
            return torch.empty(shape, dtype=dtype, device="cpu")
        # A storage of its own for each tensor, though the map is shared: whoever looks for tied tensors compares
        # storages, and whoever pickles one writes all of it.
        memory, item = self._map(file), dtype.itemsize
        if start % item != 0:
            copied = torch.frombuffer(memory, dtype=torch.uint8, count=stop - start, offset=start).clone()
            return copied.view(dtype).view(shape)
        data = torch.frombuffer(memory, dtype=dtype, count=(stop - start) // item, offset=start)
        # As view(shape), in a third of the time: what has as many items as before stays where it is.
        return data.resize_(*shape) if shape else data.view(())

    def status(self, file: str) -> os.stat_result:
        """What the file was when its header was read. Raises ``KeyError`` for none of :attr:`files`."""
        return self._shards[file].status

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, mapped; it stays valid as the tensor itself does. Raises as ``[name]`` does."""
        spec = self._tensors[name]
        return memoryview(self._map(spec.file))[spec.start : spec.stop] if spec.nbytes else memoryview(bytearray())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors in {len(self.files)} files)"

    # A mapping is equal to another one when its values are, and tensors cannot say that in one word.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _map(self, file: str) -> mmap.mmap:
        found = self._maps.get(file)
        if found is None:
            with self._lock:
                found = self._maps.get(file)
                if found is None:
                    found = self._maps[file] = self._shards[file].map()
        return found


@collection_paused()
def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint by its headers, without reading any tensor.

    ``path`` is a folder with ``model.safetensors``, else with ``model.safetensors.index.json`` and the shards this
    names, else with either under the name that diffusers gives it, ``diffusion_pytorch_model``, else with exactly one
    other ``.safetensors`` file; or it is one such file or index. Links to files are
    followed. Pickle is never read.

    Raises :class:`CheckpointError`, with everything that is wrong in ``problems``: nothing found, an unfinished save,
    a header or index that contradicts the format or the files, a tensor that is in a shard and not in the index.
    """
    path = Path(path)
    folder, index, files = _locate(path)
    folder = folder.absolute()  # tensors are mapped later, maybe from another working directory
    problems: list[Problem] = []
    weight_map: dict[str, str] = {}
    if index is not None:
        try:
            weight_map = read_shard_names(folder, index)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be read:", error.problems) from error
        files = sorted(set(weight_map.values()))
    shards: dict[str, ShardFile] = {}
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        if len(problems) >= MOST_PROBLEMS:
            break
        try:
            shards[file] = ShardFile.read(folder, file)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        if index is not None and len(problems) + len(tensors) > MAX_TENSORS:
            raise _error(path, f"holds more than {MAX_TENSORS} tensors")
        for name, spec in shards[file].tensors.items():
            if index is None or weight_map.get(name) == file:
                tensors[name] = spec
            elif name in weight_map:
                problems.append(
                    Problem(f"{file}: {show_name(name)}", f"is here, and {index} says {weight_map[name]!r}")
                )
            else:
                problems.append(Problem(f"{file}: {show_name(name)}", f"is here, and not in {index}"))
    for name, file in weight_map.items():
        if file in shards and name not in shards[file].tensors:
            problems.append(Problem(f"{index}: weight_map.{show_name(name)}", f"is not in {file}"))
            if len(problems) >= MOST_PROBLEMS:
                break
    if problems:
        raise CheckpointError(f"{path} cannot be read:", problems[:MOST_PROBLEMS])
    return Checkpoint(path, folder, tensors, shards)


def _locate(path: Path) -> tuple[Path, str | None, list[str]]:
    """Folder, and either the index's name or those of the files in it."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        resolved = Path(os.path.realpath(path))
        for folder in (path, resolved) if is_folder else (path.parent, resolved.parent):
            if folder.name.endswith(PARTIAL_SUFFIX):
                raise _error(folder, "is an unfinished save; save again, and load what that leaves")
        names = sorted(entry.name for entry in path.iterdir()) if is_folder else [path.name]
    except FileNotFoundError as error:
        raise _error(path, "there is no such file or folder (a folder or a .safetensors file is looked for)") from error
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise _error(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not is_folder:
        if path.name.endswith(INDEX_SUFFIX):
            return path.parent, path.name, []
        if path.name.endswith(".safetensors"):
            return path.parent, None, names
        raise _error(path, f"is no .safetensors file{_about_pickles(names)}")
    for stem in STEMS:
        if single_file(stem) in names:
            return path, None, [single_file(stem)]
        if index_file(stem) in names:
            return path, index_file(stem), []
    others = [name for name in names if name.endswith(".safetensors")]
    if len(others) == 1:
        return path, None, others
    looked_for = f"{single_file('model')}, {index_file('model')} and exactly one other .safetensors file"
    if others:
        raise _error(path, f"none of {looked_for} is there, but {', '.join(others)}: name one of them, or add an index")
    raise _error(path, f"none of {looked_for} is there{_about_pickles(names)}")


def _about_pickles(names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not pickles:
        return ""
    return (
        f"; {', '.join(pickles)} may hold a pickle, which is never read, because it can run code: convert it to "
        "safetensors first (safetensors.torch.save_file, or save_pretrained of a recent transformers)"
    )


def _error(path: Path, message: str) -> CheckpointError:
    return CheckpointError(problems=[Problem(str(path), message)])
