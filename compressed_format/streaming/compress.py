"""``compress_checkpoint``: from a dense checkpoint to a compressed one, a slab of a weight at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path

import torch

from compressed_format.checkpoint.publish import refuse_occupied
from compressed_format.checkpoint.shards import parse_shard_size
from compressed_format.compression.in_place import ConfigLike, read_config
from compressed_format.errors import CompressedFormatWarning
from compressed_format.streaming.compression_plan import with_counts
from compressed_format.streaming.engine import run_job
from compressed_format.streaming.job_builder import JobBuilder, Source
from compressed_format.streaming.options import checked_device, checked_workers, refuse_destination_around
from compressed_format.streaming.servable import refuse_unservable, unservable
from compressed_format.streaming.targets import plan_targets
from compressed_format.streaming.work import results

__all__ = ["compress_checkpoint"]


def compress_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: ConfigLike,
    *,
    workers: int | None = None,
    device: torch.device | str | None = None,
    max_shard_size: int | str = "5GB",
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
    consumers: Iterable[str] | None = None,
) -> None:
    """Compress the checkpoint ``src`` to ``dst``, whatever its size: a few megabytes of it are in memory at a time.

    ``src`` is a folder, an index or a file, as :func:`~compressed_format.checkpoint.read_checkpoint` takes them, and
    ``dst`` a folder or, where its name ends in ``.safetensors``, one file, whose metadata then hold the config.
    ``config`` is all that :func:`~compressed_format.compress` takes. Which tensors are weights of Linear and Embedding
    modules, their names tell, and the architecture in ``config.json`` where transformers knows it; code in the
    checkpoint is never run. Experts stored in 3-D tensors are written one by one. What is not compressed is copied, as
    are the files beside the weights; ``config.json`` gets ``quantization_config``.

    The same source and config give the same bytes, with any number of ``workers`` (threads; default: one for each
    core), on any ``device``, and with any ``executor`` of :mod:`concurrent.futures`, whose workers must see both paths.
    ``progress`` is called with the bytes of the source done so far and in total.

    Whether the result can be served is checked first: a warning names whichever of the known ``consumers`` (``"vllm"``,
    ``"sglang"``, ``"transformers"``, ``"llama.cpp"``) would not load it; of those that are given, it is an error.

    The destination appears complete or not at all. A job that was interrupted or has failed leaves
    ``<dst>.partial`` and ``<dst>.partial.job``, from which the same call goes on; another call is refused.

    Raises before anything is written: :class:`ConfigError`, :class:`TargetError`, :class:`UnsupportedFormatError` and
    :class:`QuantizationError` for what cannot be compressed as asked, :class:`CalibrationError` for static activation
    scales, which need a model that runs; while it works: :class:`CheckpointError` for what the disk refuses, and
    :class:`QuantizationError` for a weight that is not finite.
    """
    workers, computing = checked_workers(workers), checked_device(device, here=executor is None)
    limit = parse_shard_size(max_shard_size)
    source = Source.open(src)
    refuse_destination_around(source.checkpoint, Path(dst))
    plan = plan_targets(source, read_config(config), computing)
    if consumers is not None:
        refuse_unservable(plan.config, plan.layers, consumers)
    unserved = unservable(plan.config, plan.layers) if consumers is None else []
    for problem in (*plan.warnings, *unserved, *source.left_behind()):
        warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
    builder = JobBuilder(source, Path(dst), limit)
    refuse_occupied(dst, overwrite=overwrite, single_file=builder.is_file)  # and not after hours of counting
    for planned in with_counts(plan.weights, lambda counts: results(counts, workers=workers, executor=executor)):
        builder.add(planned.outputs(), planned.tasks)
    for name in source.checkpoint:
        if name not in plan.consumed:
            builder.copy(name)
    builder.set_config(plan.config)
    job = builder.job({"kind": "compress", "config": plan.config.to_dict()})
    run_job(job, Path(dst), workers=workers, executor=executor, progress=progress, overwrite=overwrite)
