"""``decompress_checkpoint``: from a compressed checkpoint to a dense one, a slab of a weight at a time."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import torch
from frozendict import frozendict

from compressed_format.checkpoint.shards import parse_shard_size
from compressed_format.compression.unserved import unserved
from compressed_format.config.layers import OF_COMPRESSED
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import (
    CheckpointError,
    CompressedFormatWarning,
    FormatError,
    Problem,
    UnsupportedFormatError,
)
from compressed_format.formats.base import StoredTensor
from compressed_format.reading import CheckpointReader, StoredModule, open_checkpoint
from compressed_format.reading.layout import weight_specs
from compressed_format.streaming.engine import run_job
from compressed_format.streaming.job_builder import JobBuilder, Source
from compressed_format.streaming.options import (
    checked_device,
    checked_dtype,
    checked_workers,
    refuse_destination_around,
)
from compressed_format.streaming.outputs import OutputTensor
from compressed_format.streaming.sources import StoredTensorSpan
from compressed_format.streaming.targets import architecture_of
from compressed_format.streaming.units import DecompressRows, Placement, Task, unit_ranges

__all__ = ["decompress_checkpoint"]

_OF_ACTIVATIONS = frozenset(
    {f"{end}_{what}" for end in ("input", "output") for what in ("scale", "zero_point", "global_scale")}
)
_OF_CACHES = frozenset({f"{what}_{kind}" for what in ("k", "v", "q") for kind in ("scale", "zero_point")})


def decompress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    device: torch.device | str | None = None,
    max_shard_size: int | str = "5GB",
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint ``src`` dense again, as ``dst``, whatever its size; no model is built.

    Weights are dequantized bit for bit as compressed-tensors does, and stored as ``dtype``: by default that of most of
    the floats that are not compressed, else that of the scales. Scales of activations and of caches go, and
    ``quantization_config`` with them. All else is as in
    :func:`~compressed_format.streaming.compress_checkpoint`: what is read and written, memory, ``workers`` and
    ``executor``, how it appears and how it goes on after an interruption.

    Raises :class:`UnsupportedFormatError` for what cannot be decoded here, by feature and module, before anything is
    written; :class:`FormatError` for tensors that contradict the config or themselves; :class:`CheckpointError`,
    :class:`ConfigError` for files that cannot be read.
    """
    workers, computing = checked_workers(workers), checked_device(device, here=executor is None)
    wanted = None if dtype is None else checked_dtype(dtype)
    limit = parse_shard_size(max_shard_size)
    source = Source.open(src)
    reader = open_checkpoint(src)
    refuse_destination_around(source.checkpoint, Path(dst))
    if reader.config is None:
        found = next((name for name in reader if name.rpartition(".")[2] in OF_COMPRESSED), None)
        message = "is not compressed: it has no quantization_config"
        if found is not None:
            message = f"holds {found}, and no quantization_config says how it is compressed"
        raise CheckpointError(problems=[Problem(str(src), message)])
    refused = unserved(reader.config)
    if refused:
        raise UnsupportedFormatError("the checkpoint cannot be decompressed here:", refused)
    for problem in (*reader.warnings, *source.left_behind()):
        warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
    modules = _compressed_modules(reader)
    _refuse_experts_kept_stacked(source, modules)
    gone = {
        f"{name}.{suffix}" for name, module in modules.items() for suffix in module.tensors if _goes(module, suffix)
    }
    gone |= {
        f"{name}.{suffix}"
        for name, module in reader.modules.items()
        for suffix in _OF_ACTIVATIONS & module.tensors.keys()
        if module.assignment is not None  # its activations alone are quantized
    }
    caches = [name for name in reader if name.rpartition(".")[2] in _OF_CACHES]
    if caches:
        message = f"{len(caches)} scales of caches ({caches[0]}, …) mean nothing without the config, and are left out"
        warnings.warn(message, CompressedFormatWarning, stacklevel=2)
    left = [name for name in reader if name not in gone and name not in caches]
    dense = wanted or _dtype_name(reader, left, modules)
    builder = JobBuilder(source, Path(dst), limit)
    for name, module in modules.items():
        output = OutputTensor(f"{name}.weight", dense, module.layout.shape)
        builder.add([output], partial(_tasks, source, module, output, computing))
    for name in left:
        builder.copy(name)
    builder.set_config(None)
    job = builder.job({"kind": "decompress", "dtype": dense, "config": reader.config.to_dict()})
    run_job(job, Path(dst), workers=workers, executor=executor, progress=progress, overwrite=overwrite)


def _compressed_modules(reader: CheckpointReader) -> dict[str, StoredModule]:
    """The modules whose weights are compressed, once all of their headers are known to make sense.

    Raises :class:`FormatError` with everything that does not.
    """
    found: dict[str, StoredModule] = {}
    problems: list[Problem] = []
    for name, module in reader.modules.items():
        assignment = module.assignment
        quantized = assignment is not None and assignment.scheme is not None and assignment.scheme.weights is not None
        if quantized or (assignment is not None and assignment.sparsity is not None):
            try:
                problems += _problems(module)
                found[name] = module
            except FormatError as error:
                problems += error.problems
        elif not OF_COMPRESSED.isdisjoint(module.tensors):
            problems.append(Problem(name, f"holds {', '.join(module.tensors)}, and no target of the config reaches it"))
    if problems:
        raise FormatError("the checkpoint contradicts itself:", problems)
    return found


def _refuse_experts_kept_stacked(source: Source, modules: Iterable[str]) -> None:
    """Raise :class:`UnsupportedFormatError` for experts that nobody would find one by one once they are dense."""
    if not any(".experts." in name for name in modules):
        return
    architecture = architecture_of(source)
    if architecture is not None and architecture.stacked_in_files:
        message = (
            "transformers reads the uncompressed experts of this architecture from stacked tensors only, and they "
            "would be written one by one; load_compressed, decompress and save_pretrained stack them"
        )
        raise UnsupportedFormatError(problems=[Problem(architecture.stacked_in_files[0], message)])


def _problems(module: StoredModule) -> list[Problem]:
    layout = module.layout
    problems = []
    for suffix, spec in layout.specs().items():
        stored = module.tensors[suffix]
        problem = spec.problem(torch_dtype(stored.dtype), stored.shape)
        if problem is not None:
            problems.append(Problem(f"{module.name}.{suffix}", problem))
    required = weight_specs(layout.shape, layout.args, layout.format, layout.sparsity)
    problems += [
        Problem(f"{module.name}.{suffix}", "is missing")
        for suffix in required
        if suffix not in module.tensors and suffix != "weight_g_idx"
    ]
    if "weight_zero_point" in module.tensors and "weight_zero_point" not in layout.specs():
        # Some releases wrote zero points for symmetric schemes, too; packed, a zero is not a zero.
        stored_zeros = module.raw()["weight_zero_point"]
        if stored_zeros.dtype != torch.int32 and stored_zeros.to(torch.float32).count_nonzero():
            message = "holds zero points that are not zero, but the scheme is symmetric"
            problems.append(Problem(f"{module.name}.weight_zero_point", message))
    return problems


def _goes(module: StoredModule, suffix: str) -> bool:
    """Whether a tensor means nothing once its module is dense."""
    return suffix in module.layout.suffixes or suffix in _OF_ACTIVATIONS or suffix == "weight_zero_point"


def _dtype_name(reader: CheckpointReader, left: Iterable[str], modules: Mapping[str, StoredModule]) -> str:
    """The dtype of most of the floats that stay as they are; without any, that of the scales, or of what is sparse."""
    counts: Counter[str] = Counter()
    specs = [reader.spec(name) for name in left]
    if not any(_counts(spec) for spec in specs):
        suffixes = ("weight_scale", "scale_packed", "compressed")
        specs = [module.tensors[key] for module in modules.values() for key in suffixes if key in module.tensors]
    for spec in specs:
        if _counts(spec):
            counts[spec.dtype] += math.prod(spec.shape)
    return counts.most_common(1)[0][0] if counts else "float32"


def _counts(spec: StoredTensor) -> bool:
    return DTYPES[spec.dtype].is_float and DTYPES[spec.dtype].bits in (16, 32, 64) and spec.dtype != "complex64"


def _tasks(
    source: Source, module: StoredModule, output: OutputTensor, device: str | None, places: Mapping[str, Placement]
) -> list[Task]:
    layout = module.layout
    spans = frozendict(
        {
            suffix: StoredTensorSpan.of(module.tensors[suffix], source.files[module.tensors[suffix].file])
            for suffix in layout.specs()
        }
    )
    row_bytes = layout.shape[1] * (DTYPES[output.dtype].bits // 8)
    ranges = unit_ranges(layout.shape[0], row_bytes, layout.row_step, device)
    return [DecompressRows(spans, rows, layout, output.dtype, places[output.name], device) for rows in ranges]
