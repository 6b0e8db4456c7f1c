"""A process that has imported everything, and opens each hostile checkpoint in a fork of itself that it measures.

Runs as a program: the folder for the good checkpoints as its argument, a request a line on stdin, an answer a line on
stdout. What is measured is what a file costs a program that has imported the package: CPU seconds of all threads, and
resident memory at its peak above what it was before. CPU time and not a clock's, which would measure whatever else the
machine does at that moment.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import compressed_format

if folder := os.environ.get("SANITIZED_LIBRARY"):
    compressed_format.__path__.insert(0, folder)  # where the native library is looked for first

from compressed_format.errors import CompressedFormatError
from compressed_format.ops.extension import native_library
from tests.hostile.entry_points import BASES, Refused, build_bases, run

_ADDRESS_SPACE = 4 << 30
_SECONDS = 30
_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def memory(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measured(entry_point: str, folder: Path, base: str) -> dict[str, Any]:
    """What became of it: the exception's class, whether it is this library's, its words; seconds and bytes."""
    before, start = memory("VmRSS"), time.process_time()
    answer: dict[str, Any] = {"error": None, "typed": True, "message": ""}
    try:
        run(entry_point, folder, base)
    except (CompressedFormatError, Refused) as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        answer |= {"error": type(error).__name__, "message": str(error)[:2000], "typed": False}
    return answer | {"seconds": time.process_time() - start, "bytes": memory("VmHWM") - before}


def forked(request: dict[str, str]) -> dict[str, Any]:
    """:func:`measured` in a child. One that crashes or hangs answers with its signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)  # no answer to whoever asks
            os.dup2(nothing, 1)
            signal.alarm(_SECONDS)
            if not _SANITIZED:  # whose shadow memory is reserved by the terabyte
                resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + _ADDRESS_SPACE,) * 2)
            answer = measured(request["entry_point"], Path(request["folder"]), request["base"])
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    return {"error": f"died, {status=}", "typed": False, "message": "", "seconds": 0.0, "bytes": 0}


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    build_bases(folder)
    for entry_point in ("config", "reader", "open", "fill", "load", "check", "decompress"):
        run(entry_point, folder / "llama", "llama")
    for base in BASES:
        run("check", folder / base, base)
    print(json.dumps(str(native_library())), flush=True)
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
