"""Checkpoints opened for reading: modules and tensors, raw, quantized or dense, whole or in part, read on demand."""

from compressed_format.reading.reader import CheckpointReader, open_checkpoint
from compressed_format.reading.stored_module import StoredModule

__all__ = ["CheckpointReader", "StoredModule", "open_checkpoint"]
