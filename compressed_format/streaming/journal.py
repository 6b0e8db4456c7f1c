"""What of a job is done, in a file that survives the process and the power.

Each line is a checksum and a JSON object. The first one holds the job's identity; the others, in the order in which it
happened, the ids of units whose bytes are on the disk (``done``), of units that have to be done again (``redo``), and
the inode of what is about to be published (``publishing``). A line is written by one call and synced, so that only the
last one can be torn; that one is ignored.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compressed_format.checkpoint import syscalls
from compressed_format.checkpoint.disk_errors import blaming, disk_error
from compressed_format.checkpoint.strict_json import parse_object

__all__ = ["Journal"]

_MAX_BYTES = 2**30


class Journal:
    """The journal of one job, open for more to be added.

    ``identity`` is what the first line says, ``done`` the ids of units that need not be done again, and
    ``publishing`` an inode, or ``None`` if the job never got that far.
    """

    def __init__(self, path: Path, descriptor: int, size: int, records: Iterable[Mapping[str, Any]]) -> None:
        self.path = path
        self.identity: Mapping[str, Any] = {}
        self.done: set[str] = set()
        self.publishing: int | None = None
        self._descriptor = descriptor
        self._size = size
        for record in records:
            self._take(record)

    @classmethod
    def create(cls, path: Path, identity: Mapping[str, Any]) -> Journal:
        """The journal of a job that begins; on the disk. Raises :class:`CheckpointError`."""
        with blaming(path, "cannot be made"):
            journal = cls(path, syscalls.create_file(path), 0, [])
        try:
            journal._add({"job": identity})
            with blaming(path.parent, "cannot be synced to the disk"):
                syscalls.sync_folder(path.parent)
        except BaseException:
            journal.close()
            with suppress(OSError):
                path.unlink()  # not worth anything, and so no reason to keep the partial folder
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """The journal of an earlier attempt, or ``None`` for one that never got its first line.

        Raises :class:`CheckpointError` for what is no journal, or is damaged before its last line.
        """
        with blaming(path, "cannot be read"):
            if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
                raise _damaged(path, "is no journal of a job")
            data = path.read_bytes()
        lines = data.split(b"\n")
        parsed = [_parse(line) for line in lines[:-1]]  # what is behind the last line's end was never finished
        while len(parsed) > 1 and parsed[-1] is None:
            parsed.pop()
        if not parsed:
            return None
        records = [record for record in parsed if record is not None]
        if len(records) < len(parsed):
            raise _damaged(path, f"line {parsed.index(None) + 1} is damaged")
        size = sum(len(line) + 1 for line in lines[: len(parsed)])
        if "job" not in records[0]:
            raise _damaged(path, "does not begin with a job's identity")
        with blaming(path, "cannot be written"):
            descriptor = syscalls.open_file(path)
            if size < len(data):
                syscalls.set_size(descriptor, size)
        return cls(path, descriptor, size, records)

    def add_done(self, units: Iterable[str]) -> None:
        """These units' bytes are on the disk."""
        self._add({"done": sorted(units)})

    def add_redo(self, units: Iterable[str]) -> None:
        """These units' bytes are about to be lost."""
        self._add({"redo": sorted(units)})

    def add_publishing(self, inode: int) -> None:
        """All units are done, and what has this inode is about to get the destination's name."""
        self._add({"publishing": inode})

    def close(self) -> None:
        """Nothing more will be added."""
        if self._descriptor >= 0:
            with suppress(OSError):  # each line is on the disk already
                os.close(self._descriptor)
            self._descriptor = -1

    def _add(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        rest = memoryview(line)
        with blaming(self.path, "cannot be written"):
            while rest:
                rest = rest[syscalls.write_at(self._descriptor, rest, self._size + len(line) - len(rest)) :]
            syscalls.sync(self._descriptor)
        self._size += len(line)  # only now: a line that failed is written over by the next one
        self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        self.identity = record.get("job", self.identity)
        self.done.update(record.get("done", ()))
        self.done.difference_update(record.get("redo", ()))
        self.publishing = record.get("publishing", self.publishing)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or ``None`` for one that is torn or garbled."""
    text = line[9:]
    if line[:9] != b"%08x " % zlib.crc32(text):
        return None
    with suppress(ValueError):
        return parse_object(text)
    return None


def _damaged(path: Path, what: str) -> Exception:
    partial = path.with_suffix("")
    return disk_error(path, f"{what}: remove it and {partial.name}, and begin anew")
