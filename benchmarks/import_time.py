"""What ``import compressed_format`` and the use of each of its public names add to ``import torch``.

Every figure is the median of several fresh interpreters, which run in turn. Bytecode is cached, as it is after an
installation. The garbage collector is told apart: torch leaves its counters where whichever import comes next sets off
a pass over all of torch's objects, and the same pass falls on pydantic, imported alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

RUNS = 9
TARGET_MS = 100

PROGRAM = """
import gc, json, sys, time

collecting = [0.0]
def watch(phase, info):
    collecting[0] += time.perf_counter() * (1 if phase == "stop" else -1)
gc.callbacks.append(watch)

def timed(function):
    collecting[0] = 0.0
    start = time.perf_counter()
    function()
    return [(time.perf_counter() - start) * 1e3, collecting[0] * 1e3]

def torch():
    import torch

def pydantic():
    import pydantic.main, pydantic.types

def statement():
    import compressed_format

def config():
    import compressed_format.config

def everything():
    import compressed_format
    for name in compressed_format.__all__:
        getattr(compressed_format, name)

steps = sys.argv[1].split(",")
print(json.dumps([timed(globals()[step]) for step in steps]))
"""

SEQUENCES = {
    "import compressed_format": "torch,statement",
    "compressed_format, all names": "torch,everything",
    "of which its config alone": "torch,config",
    "of which pydantic alone": "torch,pydantic",
}


def run(steps: str, environment: dict[str, str]) -> list[tuple[float, float]]:
    command = [sys.executable, "-c", PROGRAM, steps]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return [(total, collected) for total, collected in json.loads(output)]


def main() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        environment["PYTHONPYCACHEPREFIX"] = folder
        run("torch,everything", environment)  # fills the caches
        torch_times: list[float] = []
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in SEQUENCES}
        for _ in range(RUNS):
            for label, steps in SEQUENCES.items():
                torch_time, added = run(steps, environment)
                torch_times.append(torch_time[0])
                times[label].append(added)
    torch_median = statistics.median(torch_times)
    print(f"{'':32} {'ms':>8} {'collector':>10} {'without it':>11} {'to torch':>9}")
    print(f"{'torch':32} {torch_median:8.1f}")
    for label, values in times.items():
        total = statistics.median(total for total, _ in values)
        collected = statistics.median(collected for _, collected in values)
        without = statistics.median(total - collected for total, collected in values)
        print(f"{label:32} {total:8.1f} {collected:10.1f} {without:11.1f} {without / torch_median:8.1%}")
    work = statistics.median(total - collected for total, collected in times["compressed_format, all names"])
    verdict = "within" if work <= TARGET_MS else "ABOVE"
    print(f"\n{work:.0f} ms on top of torch: {verdict} the target of {TARGET_MS} ms")


if __name__ == "__main__":
    main()
