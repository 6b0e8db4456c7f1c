"""``diff_checkpoints``: two checkpoints of any size, tensor by tensor or weight by weight."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from frozendict import frozendict
from numpy.typing import NDArray

from compressed_format.checkpoint import Checkpoint, TensorSpec, read_checkpoint
from compressed_format.comparison.configs import config_differences, metadata_differences
from compressed_format.comparison.difference import Difference, StoredAs, TensorDifference, ValueDifference
from compressed_format.comparison.values import byte_difference, bytes_differ, value_difference, word_difference
from compressed_format.reading import StoredModule, open_checkpoint
from compressed_format.threads import on_all_cores

__all__ = ["diff_checkpoints"]

# Integers of these suffixes are packed codes or masks, whose words are no numbers; int8 zero points are some.
_WORDS = frozenset({("weight_packed", "int32"), ("weight_zero_point", "int32"), ("bitmask", "uint8")})
_OF_DTYPE = ("weight_scale", "scale_packed", "compressed", "weight")
# What is decoded at once stays in the cache, and its memory is used again instead of being given back.
_SLAB_VALUES = 1 << 17


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Which tensors, values and keys of the configs of two checkpoints differ, and by how much.

    ``a`` and ``b`` are what :func:`~compressed_format.checkpoint.read_checkpoint` takes. Tensors are compared under
    the names and in the form in which they are stored: of words of packed codes, the number that differ is told. With
    ``dequantize``, it is the weights that are compared: each compressed module's is dequantized, in slabs of rows, and
    stands under the name ``<module>.weight`` beside what the other checkpoint has there, dense or compressed in any
    way; how they are stored, which is ``quantization_config`` and the metadata of headers, is then left out.

    Each core works on a slab of one tensor at a time, so that memory is bounded, whatever the size. A tensor that is
    the same bytes of the same file in both is not read. ``progress`` is called with the bytes of ``a`` that are done
    and their total. Raises :class:`CheckpointError`, :class:`ConfigError` and, while dequantizing,
    :class:`FormatError` and :class:`UnsupportedFormatError`, for what cannot be read.
    """
    if dequantize:
        readers = open_checkpoint(a), open_checkpoint(b)
        first, second = (_Side(reader.checkpoint, reader.modules) for reader in readers)
    else:
        first, second = (_Side(read_checkpoint(path), {}) for path in (a, b))
    config = config_differences(first.checkpoint, second.checkpoint, quantization=not dequantize)
    names = [name for name in first.stored if name in second.stored]
    differing: list[TensorDifference] = []
    shared = {name for name in names if _is_shared(first, second, name)}
    done, total = 0, sum(first.nbytes(name) for name in names)
    if progress is not None:
        progress(done, total)

    def difference(name: str) -> TensorDifference | None:
        return None if name in shared else _tensor_difference(first, second, name)

    for name, found in zip(names, on_all_cores(difference, names), strict=True):
        done += first.nbytes(name)
        if progress is not None:
            progress(done, total)
        if found is not None:
            differing.append(found)
    return Difference(
        first=os.fspath(a),
        second=os.fspath(b),
        dequantized=dequantize,
        only_in_first=frozendict({name: how for name, how in first.stored.items() if name not in second.stored}),
        only_in_second=frozendict({name: how for name, how in second.stored.items() if name not in first.stored}),
        tensors=tuple(differing),
        metadata=() if dequantize else metadata_differences(first.checkpoint, second.checkpoint),
        config=config,
        same_tensors=len(names) - len(differing),
        shared_tensors=len(shared),
    )


class _Side:
    """One of the two checkpoints.

    ``stored`` has every tensor, with the weights of compressed ``modules`` in place of the tensors that hold them.
    The dtype of such a weight is known when it has been dequantized.
    """

    def __init__(self, checkpoint: Checkpoint, modules: Mapping[str, StoredModule]) -> None:
        self.checkpoint = checkpoint
        self.modules = modules
        self._identities: dict[str, tuple[Any, ...]] = {}
        self.weights: dict[str, StoredModule] = {}
        inside: set[str] = set()
        for module in modules.values():
            if module.assignment is not None:
                self.weights[_full(module, "weight")] = module
                inside.update(_full(module, suffix) for suffix in module.layout.suffixes)
        self.stored: dict[str, StoredAs] = {}
        for name in checkpoint:
            spec = checkpoint.spec(name)
            weight = f"{name.rpartition('.')[0]}.weight".removeprefix(".")
            if name not in inside:
                self.stored[name] = StoredAs(spec.dtype, spec.shape)
            elif weight not in self.stored:
                self.stored[weight] = _dequantized_as(self.weights[weight])

    def place(self, name: str) -> tuple[Any, ...]:
        """Which bytes of which file a tensor is."""
        spec = self.checkpoint.spec(name)
        if spec.file not in self._identities:
            try:
                status = (self.checkpoint.folder / spec.file).stat()
                self._identities[spec.file] = status.st_dev, status.st_ino
            except OSError:  # reading it will say what is wrong
                self._identities[spec.file] = (self,)
        return self._identities[spec.file], spec.start, spec.stop, spec.dtype, spec.shape

    def nbytes(self, name: str) -> int:
        """How many bytes a tensor takes, or a weight's tensors together."""
        module = self.weights.get(name)
        if module is None:
            return self.checkpoint.spec(name).nbytes
        return sum(module.tensors[suffix].nbytes for suffix in module.layout.suffixes)

    def slabs(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """The values of a weight, so many ``rows`` at a time, as flat arrays of floats."""
        import torch

        exact = (torch.float16, torch.float32, torch.float64)
        module = self.modules[name.rpartition(".")[0]]
        for start in range(0, self.stored[name].shape[0], rows):
            slab = module.dense(rows=(start, min(start + rows, self.stored[name].shape[0])))
            if slab.dtype not in exact:  # bfloat16 and float8 are no dtypes of numpy's
                slab = slab.to(torch.float32 if slab.itemsize <= 2 else torch.float64)
            yield slab.flatten().numpy()


def _full(module: StoredModule, suffix: str) -> str:
    return f"{module.name}.{suffix}" if module.name else suffix


def _dequantized_as(module: StoredModule) -> StoredAs:
    assert module.assignment is not None
    # A dense weight has the dtype of its scale; of one that is only sparse, the values have it.
    dtypes = {suffix: spec.dtype for suffix, spec in module.tensors.items()}
    dtype = next(dtypes[suffix] for suffix in _OF_DTYPE if suffix in dtypes)
    format = module.assignment.sparsity or module.assignment.format
    return StoredAs(dtype, module.layout.shape, format.value)


def _is_shared(first: _Side, second: _Side, name: str) -> bool:
    """Whether a tensor is the same bytes of one file in both checkpoints."""
    if name in first.weights or name in second.weights:
        return False
    return first.place(name) == second.place(name)


def _tensor_difference(first: _Side, second: _Side, name: str) -> TensorDifference | None:
    if name in first.weights or name in second.weights:
        return _weight_difference(first, second, name)
    specs = first.checkpoint.spec(name), second.checkpoint.spec(name)
    stored = first.stored[name], second.stored[name]
    if specs[0].shape != specs[1].shape:
        return TensorDifference(name, *stored, None)
    data = first.checkpoint.data(name), second.checkpoint.data(name)
    if specs[0].dtype != specs[1].dtype:
        if _are_words(name, *specs):  # words beside numbers
            return TensorDifference(name, *stored, None)
        values = byte_difference(*data, (specs[0].dtype, specs[1].dtype), specs[0].shape)
        return TensorDifference(name, *stored, values or _no_difference(specs[0].shape))
    if not bytes_differ(*data):
        return None
    if _are_words(name, *specs):
        return TensorDifference(name, *stored, word_difference(*data, specs[0].dtype, specs[0].shape))
    return TensorDifference(name, *stored, byte_difference(*data, (specs[0].dtype, specs[1].dtype), specs[0].shape))


def _weight_difference(first: _Side, second: _Side, name: str) -> TensorDifference | None:
    stored = first.stored[name], second.stored[name]
    if stored[0].shape != stored[1].shape:
        return TensorDifference(name, *stored, None)
    if _are_alike(first, second, name):
        return None
    rows, columns = stored[0].shape
    steps = [side.weights[name].layout.row_step for side in (first, second) if name in side.weights]
    # Slabs end where blocks of rows that share a scale do, in both.
    step = math.lcm(*steps)
    slab = max(_SLAB_VALUES // max(columns, 1) // step, 1) * step
    values = value_difference(zip(first.slabs(name, slab), second.slabs(name, slab), strict=True), (rows, columns))
    if values is None and stored[0].dtype == stored[1].dtype:
        return None
    return TensorDifference(name, *stored, values or _no_difference((rows, columns)))


def _are_alike(first: _Side, second: _Side, name: str) -> bool:
    """Whether two compressed weights have the same tensors in the same layout, so that they dequantize alike."""
    if name not in first.weights or name not in second.weights:
        return False
    one, other = first.weights[name], second.weights[name]
    if one.layout != other.layout:
        return False
    for suffix in one.layout.suffixes:
        full = _full(one, suffix)
        specs = first.checkpoint.spec(full), second.checkpoint.spec(full)
        if specs[0].dtype != specs[1].dtype or specs[0].shape != specs[1].shape:
            return False
        if first.place(full) != second.place(full) and bytes_differ(
            first.checkpoint.data(full), second.checkpoint.data(full)
        ):
            return False
    return True


def _are_words(name: str, *specs: TensorSpec) -> bool:
    suffix = name.rpartition(".")[2]
    return any((suffix, spec.dtype) in _WORDS for spec in specs)


def _no_difference(shape: tuple[int, ...]) -> ValueDifference:
    """What is said of tensors that differ in dtype alone."""
    return ValueDifference("value", math.prod(shape), 0, (), 0.0, 0.0, None, 0)
