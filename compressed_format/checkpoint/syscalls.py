"""The system calls that writing a checkpoint makes, one function each.

Everything that touches the disk on the way to a published checkpoint goes through this module, so that a test can
record the order of the calls and let each of them fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from frozendict import frozendict

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

__all__ = [
    "close",
    "create_file",
    "exchange",
    "free_bytes",
    "make_folder",
    "open_file",
    "open_lock",
    "open_source",
    "read_at",
    "remove",
    "remove_folder",
    "rename",
    "set_size",
    "sync",
    "sync_folder",
    "try_lock",
    "unlock",
    "write",
    "write_at",
]

# The renames' flags: RENAME_EXCHANGE of <linux/fs.h> and RENAME_SWAP of <sys/stdio.h> happen to be equal.
_EXCHANGE = 2
_AT_FDCWD = -100
_RENAMEAT2: frozendict[str, int] = frozendict(
    {"x86_64": 316, "aarch64": 276, "riscv64": 276, "loongarch64": 276, "ppc64le": 357, "s390x": 347}
)
"""The call's number by machine, for a C library that is older than the call."""


def make_folder(path: Path) -> None:
    """Make one folder, with the permissions that the umask leaves."""
    path.mkdir()


def create_file(path: Path) -> int:
    """A descriptor for writing a file that must not exist yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def write(descriptor: int, data: memoryview) -> int:
    """Write some of ``data``; returns how many bytes."""
    return os.write(descriptor, data)


def open_file(path: Path) -> int:
    """A descriptor for writing into a file that is there already. A link is not followed."""
    flags = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags)


def set_size(descriptor: int, size: int) -> None:
    """Let a file be ``size`` bytes long; what is new reads as zeros and takes no space yet."""
    os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write some of ``data`` at ``offset`` of the file; returns how many bytes."""
    if sys.platform == "win32":  # pragma: no cover
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)
    return os.pwrite(descriptor, data, offset)


def open_source(path: Path) -> int:
    """A descriptor for reading a file, which waits for no one should that be a pipe."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill some of ``buffer`` from ``offset`` of the file; returns how many bytes, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # pragma: no cover
    data = os.read(descriptor, len(buffer))  # pragma: no cover
    buffer[: len(data)] = data  # pragma: no cover
    return len(data)  # pragma: no cover


def free_bytes(folder: Path) -> int:
    """How many bytes this user may still write to the folder's file system."""
    return shutil.disk_usage(folder).free


def sync(descriptor: int) -> None:
    """Return when the file's bytes have reached the disk."""
    if sys.platform == "darwin":  # pragma: no cover
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync alone stops at the drive's cache there
    else:
        os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Close a file that was written."""
    os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return when the names in a folder have reached the disk."""
    if sys.platform == "win32":  # pragma: no cover
        return  # folders cannot be opened there, and their names are journaled
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Move a folder to a name that is free, or that an empty folder has, in one step."""
    if sys.platform == "win32" and target.is_dir():  # pragma: no cover
        target.rmdir()
    source.rename(target)


def exchange(first: Path, second: Path) -> None:
    """Let two names swap what they stand for, in one step; ``OSError`` where that is not possible."""
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    one, other = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        status = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, ctypes.c_uint(_EXCHANGE))
    elif hasattr(library, "renamex_np"):
        status = library.renamex_np(one, other, ctypes.c_uint(_EXCHANGE))
    elif sys.platform == "linux" and platform.machine() in _RENAMEAT2 and hasattr(library, "syscall"):
        number = ctypes.c_long(_RENAMEAT2[platform.machine()])
        here = ctypes.c_long(_AT_FDCWD)
        status = library.syscall(number, here, one, here, other, ctypes.c_long(_EXCHANGE))
    else:
        raise OSError(errno.ENOSYS, "this platform has no call that exchanges two folders", str(first))
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first), None, str(second))


def remove(path: Path) -> None:
    """Remove a folder with all it holds, or whatever else has that name; nothing there is fine, too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()


def open_lock(path: Path) -> int:
    """A descriptor of the lock file, which is made if need be. A link is not followed."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def try_lock(descriptor: int) -> bool:
    """Lock the file for this descriptor alone, without waiting; ``False`` if it is locked already.

    The lock ends with the process, however that ends.
    """
    try:
        if sys.platform == "win32":  # pragma: no cover
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(descriptor: int, path: Path) -> None:
    """Give the lock back and remove its file.

    The name goes first: whoever opened the file before that locks something without a name, and can see so.
    """
    if sys.platform == "win32":  # pragma: no cover
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        os.close(descriptor)
        path.unlink(missing_ok=True)  # fails while anyone else has it open
        return
    try:
        path.unlink(missing_ok=True)
    finally:
        # Not by closing alone: a process forked meanwhile shares the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
