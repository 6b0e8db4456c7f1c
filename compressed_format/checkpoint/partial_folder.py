"""The folder of an unfinished save: its files made one after the other, or all at once to be filled later."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from compressed_format.checkpoint import syscalls
from compressed_format.checkpoint.disk_errors import blaming

__all__ = ["JOB_SUFFIX", "LOCK_SUFFIX", "PARTIAL_SUFFIX", "PartialFolder"]

PARTIAL_SUFFIX = ".partial"
JOB_SUFFIX = ".partial.job"
LOCK_SUFFIX = ".partial.lock"

_CHUNK_BYTES = 64 * 1024 * 1024
"""Held at once of a file that is copied."""


class PartialFolder:
    """The folder of an unfinished save, held under its lock.

    ``path`` is where it is, ``job`` where a resumable writer notes what it has done; ``kept`` says that both are from
    an earlier attempt. Files are made by :meth:`create`, :meth:`copy` and :meth:`allocate`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = Path(f"{str(path).removesuffix(PARTIAL_SUFFIX)}{JOB_SUFFIX}")
        self.kept = path.is_dir() and not path.is_symlink() and os.path.lexists(self.job)
        self._folders = [path]

    def clear(self) -> None:
        """Begin anew, with an empty folder and no job."""
        if os.path.lexists(self.job):
            # First, so that what is left should this be interrupted is no job's.
            with blaming(self.job, "is left from an unfinished job and cannot be removed"):
                syscalls.remove(self.job)
        with blaming(self.path, "is left from an unfinished save and cannot be removed"):
            syscalls.remove(self.path)
        with blaming(self.path, "cannot be made"):
            syscalls.make_folder(self.path)
        self._folders = [self.path]
        self.kept = False

    def keep(self, names: Collection[str]) -> None:
        """Remove everything but the files ``names`` and the folders that these are in."""
        files = {self._path_of(name) for name in names}
        folders = {parent for path in files for parent in path.parents}
        with blaming(self.path, "cannot be cleared of what an earlier attempt left"):
            for place, inside, others in os.walk(self.path):
                for name in [*inside, *others]:
                    path = Path(place, name)
                    if path in folders and path.is_dir() and not path.is_symlink():
                        self._folders.append(path)
                    elif path not in files:
                        syscalls.remove(path)
                inside[:] = [name for name in inside if Path(place, name) in self._folders]

    @contextmanager
    def create(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """A new file, as a function that appends to it; on the disk when the context ends.

        ``name`` is relative, with forward slashes, and must have passed
        :func:`~compressed_format.checkpoint.index.file_name_problem`. Raises :class:`CheckpointError`.
        """
        with self._created(name) as (path, descriptor):

            def append(data: bytes | memoryview) -> None:
                rest = memoryview(data)
                with blaming(path, "cannot be written"):
                    while rest:
                        rest = rest[syscalls.write(descriptor, rest) :]

            yield append

    def copy(self, name: str, content: bytes | Path) -> None:
        """A new file with this content, or with that of a file; on the disk when this returns."""
        with self.create(name) as append:
            if not isinstance(content, Path):
                append(content)
                return
            with blaming(content, "cannot be read"):
                source = content.open("rb")
            with source:
                while True:
                    with blaming(content, "cannot be read"):
                        chunk = source.read(_CHUNK_BYTES)
                    if not chunk:
                        break
                    append(chunk)

    def allocate(self, name: str, start: bytes, size: int) -> None:
        """A new file of ``size`` bytes that begins with ``start``; on the disk, as such, when this returns."""
        with self._created(name) as (path, descriptor), blaming(path, "cannot be written"):
            rest = memoryview(start)
            while rest:
                rest = rest[syscalls.write(descriptor, rest) :]
            syscalls.set_size(descriptor, size)

    @contextmanager
    def synced(self, names: Collection[str]) -> Iterator[None]:
        """Files whose bytes are on the disk when the context ends, whoever writes them meanwhile.

        They are open throughout: the system tells each open file of a failed write once, whoever else was told.
        """
        with ExitStack() as opened:
            descriptors: dict[Path, int] = {}
            for path in map(self._path_of, names):
                with blaming(path, "cannot be opened"):
                    descriptors[path] = syscalls.open_file(path)
                opened.callback(os.close, descriptors[path])
            yield
            for path, descriptor in descriptors.items():
                with blaming(path, "cannot be synced to the disk"):
                    syscalls.sync(descriptor)

    def sync_files(self, names: Iterable[str]) -> None:
        """Bring the bytes of files to the disk."""
        for name in names:
            with self.synced([name]):
                pass

    def sync_folders(self) -> None:
        """Bring the names of all files to the disk."""
        for folder in reversed(self._folders):
            with blaming(folder, "cannot be synced to the disk"):
                syscalls.sync_folder(folder)

    def _path_of(self, name: str) -> Path:
        return self.path.joinpath(*name.split("/"))

    @contextmanager
    def _created(self, name: str) -> Iterator[tuple[Path, int]]:
        """A new file in folders that are made as needed; synced and closed at the end."""
        path = self._path_of(name)
        for folder in reversed(path.relative_to(self.path).parents[:-1]):
            if self.path / folder not in self._folders:
                with blaming(self.path / folder, "cannot be made"):
                    syscalls.make_folder(self.path / folder)
                self._folders.append(self.path / folder)
        with blaming(path, "cannot be made"):
            descriptor = syscalls.create_file(path)
        try:
            yield path, descriptor
            with blaming(path, "cannot be synced to the disk"):
                syscalls.sync(descriptor)
        except BaseException:
            with suppress(OSError):
                syscalls.close(descriptor)
            raise
        with blaming(path, "cannot be closed"):
            syscalls.close(descriptor)
