"""Packed tensors split between processes: tensor parallelism for any model, and what saves a split model whole."""

from __future__ import annotations

from compressed_format.parallel.tensor_parallel import ColwiseParallel, RowwiseParallel, parallelize_module

__all__ = ["ColwiseParallel", "RowwiseParallel", "parallelize_module"]
