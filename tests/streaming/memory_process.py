"""A process that compresses or decompresses one checkpoint, and prints how much memory that took, as JSON.

    python -m tests.streaming.memory_process compress|decompress SOURCE DESTINATION

Memory is what ``/proc/self/status`` says of this process, every few milliseconds; ``anonymous`` and ``mapped`` are the
highest ``RssAnon`` and ``RssFile``, in bytes, above those of the same process before the job: one that has imported
everything and done such a job already, of a tiny checkpoint. ``samples`` says how often was looked.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from compressed_format import CompressedFormatWarning, compress_checkpoint, decompress_checkpoint
from tests.streaming.sparse_sources import write_sparse_checkpoint

WORKERS = 2
SECONDS = 0.002


class Sampler(threading.Thread):
    """Keeps the highest values of this process's memory from ``start`` to ``stop``."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest: dict[str, int] = {}
        self.samples = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SECONDS):
            for name, size in resident().items():
                self.highest[name] = max(self.highest.get(name, 0), size)
            self.samples += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def resident() -> dict[str, int]:
    """What is resident of this process, in bytes: memory of its own, and of files that it maps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return {name: int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def work(task: str, source: Path, destination: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressedFormatWarning)
        if task == "compress":
            compress_checkpoint(source, destination, "W4A16", workers=WORKERS)
        else:
            decompress_checkpoint(source, destination, workers=WORKERS)


def main(task: str, source: Path, destination: Path) -> None:
    with tempfile.TemporaryDirectory(dir=destination.parent) as tiny:
        write_sparse_checkpoint(Path(tiny) / "dense", 0)
        work("compress", Path(tiny) / "dense", Path(tiny) / "compressed")
        work("decompress", Path(tiny) / "compressed", Path(tiny) / "again")
    idle = resident()
    sampler = Sampler()
    sampler.start()
    work(task, source, destination)
    sampler.stop()
    above = {name: size - idle[name] for name, size in sampler.highest.items()}
    print(json.dumps({"anonymous": above["RssAnon"], "mapped": above["RssFile"], "samples": sampler.samples}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
