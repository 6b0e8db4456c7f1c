"""Checkpoints on disk: safetensors files read lazily and published all or nothing.

Nothing here imports torch before a tensor is asked for or written.
"""

from compressed_format.checkpoint.header import TensorSpec
from compressed_format.checkpoint.reader import Checkpoint, read_checkpoint
from compressed_format.checkpoint.writer import write_checkpoint

__all__ = ["Checkpoint", "TensorSpec", "read_checkpoint", "write_checkpoint"]
