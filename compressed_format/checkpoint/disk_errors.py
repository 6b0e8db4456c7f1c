"""What the disk refuses, as errors that name the file and the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressed_format.errors import CheckpointError, Problem

__all__ = ["blaming", "disk_error"]


@contextmanager
def blaming(path: Path, what: str) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`CheckpointError` that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, f"{what}: {error.strerror or error}") from error


def disk_error(path: Path, message: str) -> CheckpointError:
    """An error about one file or folder."""
    return CheckpointError(problems=[Problem(str(path), message)])
