"""Checkpoints compressed and decompressed as they stream from disk to disk: any size, any interruption, same bytes."""

from compressed_format.streaming.compress import compress_checkpoint
from compressed_format.streaming.decompress import decompress_checkpoint

__all__ = ["compress_checkpoint", "decompress_checkpoint"]
