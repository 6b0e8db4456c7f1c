"""Every benchmark of this folder, each in a process of its own, and at the end one table of all that was to be reached.

    python benchmarks/run_all.py [--ggml FOLDER] [--folder DIR] [--bars FILE] [NAME ...]

``NAME`` selects files, as in ``cpu_linear``. ``--ggml`` names a build of ggml that is not in ``build/ggml``;
``--folder`` is where gigabytes may be written. ``--bars`` keeps what was measured, and adds to what it holds already:
a run may be made in parts, and ``--bars`` with ``--table`` prints the table of them all.

A missed bar is no error, a benchmark that ends with one is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.bars import COLLECTED, bars_table, read_bars

FOLDER = Path(__file__).parent
WITH_GGML = ("cpu_linear",)
WITH_FOLDER = ("checkpoint",)


def main() -> int:
    parser = argparse.ArgumentParser(description="All benchmarks, and a table of what they were to reach.")
    parser.add_argument("--ggml", type=Path, help="a build of ggml")
    parser.add_argument("--folder", type=Path, help="where to write")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="keep what is measured, after what is in it")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of --bars")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of files, without .py")
    options = parser.parse_args()
    files = [file for file in sorted(FOLDER.glob("*.py")) if file.name != Path(__file__).name]
    unknown = set(options.names) - {file.stem for file in files}
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        bars = options.bars or Path(temporary) / "bars"
        failed = []
        if not options.table:
            for file in files:
                if file.stem in options.names or not options.names:
                    failed += run(file, options.ggml, options.folder, bars)
        if bars.is_file():
            print(f"\n== {bars_table(read_bars(bars.read_text().splitlines()))}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return len(failed) and 1


def run(file: Path, ggml: Path | None, folder: Path | None, bars: Path) -> list[str]:
    """The name of the file, if it fails."""
    arguments: list[str | Path] = []
    if ggml and file.stem in WITH_GGML:
        arguments += ["--ggml", ggml.resolve()]
    if folder and file.stem in WITH_FOLDER:
        arguments += ["--folder", folder.resolve()]
    print(f"\n== {file.name}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, file, *arguments], env=os.environ | {COLLECTED: str(bars.resolve())})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(f"-- {time.perf_counter() - begin:.0f} s, {used.ru_maxrss / 1e6:.1f} GB at most", flush=True)
    return [file.stem] if process.returncode else []


if __name__ == "__main__":
    sys.exit(main())
