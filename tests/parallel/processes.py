"""Two processes on the CPU that run the checks of one module, and tell how each of them went.

``python -m tests.parallel.processes MODULE RESULTS RANK FOLDER`` is one of the two. Starting takes most of the
time, so all checks of a module share one start: each is a function ``check_…(folder)``, which both run, in the order of
the file.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
WORLD = 2
# Before 2.12, fully_shard makes every parameter that it splits a trainable one, which integers cannot be.
INTEGERS_CAN_BE_SHARDED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def checks_of(module: str) -> dict[str, Callable[[Path], None]]:
    """The checks of a module, in the order of its file."""
    content = vars(importlib.import_module(module))
    return {name: function for name, function in content.items() if name.startswith("check_")}


def run_checks(module: str, folder: Path) -> dict[str, str]:
    """What went wrong, by the check of ``module``; checks that a failure has kept from running say so."""
    # The processes are on the CPU, where there are GPUs too.
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": _python_path()}
    environment = os.environ | {**own, "WORLD_SIZE": str(WORLD)}
    results = [folder / f"results-{rank}.json" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", __name__, module, str(results[rank]), str(rank), str(folder)],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    found: dict[str, str] = {}
    for rank, file in enumerate(results):
        told = json.loads(file.read_text()) if file.exists() else {}
        for name in checks_of(module):
            message = told.get(name, f"did not run; the process ended with {outputs[rank]}")
            if message:
                found[name] = f"{found.get(name, '')}process {rank}: {message}\n"
    return found


def _python_path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


def main(module: str, results: str, rank: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=WORLD, timeout=timedelta(seconds=60))
    told: dict[str, str] = {}
    for name, check in checks_of(module).items():
        try:
            check(Path(folder))
            told[name] = ""
        except BaseException:
            # The other process may wait for this one by now, and only learns from its end that it need not.
            told[name] = traceback.format_exc()
            break
    Path(results).write_text(json.dumps(told))
    if all(not message for message in told.values()):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
