"""What the tests of publishing share: small checkpoints, saved in two shards and with further files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressed_format.checkpoint import write_checkpoint

OLD = {"old": torch.arange(5)}
FILES = {"config.json": b"{}", "code/x.py": b"pass"}


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the bytes of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def save(destination: Path, tensors: dict[str, torch.Tensor], **more: Any) -> None:
    write_checkpoint(destination, tensors, files=FILES, max_shard_size=200, **more)


def prepare(target: Path, before: str) -> None:
    """Let the destination hold what ``before`` says."""
    if before == "empty folder":
        target.mkdir()
    elif before == "checkpoint":
        save(target, OLD)
    elif before == "file":
        target.write_bytes(b"old")
