"""From checkpoint to checkpoint, and from a checkpoint to a model: time and memory, beside ``cp`` and the peers.

    python benchmarks/checkpoint.py [--layers 22] [--workers 2] [--repeats 1] [--llmcompressor PYTHON] [--folder DIR]

The source is a Llama of random bfloat16 weights in three shards: 1.1 billion of them with 22 layers. It is in the page
cache, as it has just been written. ``--llmcompressor`` names a Python that has llm-compressor, whose
``model_free_ptq`` then does the same jobs with as many workers; ``--folder`` is where gigabytes may be written.

Each job is a process of its own, which does the same with a tiny model first: imports are not measured. Time is that
of the call, the median of ``--repeats``. ``GB/s`` is of
the larger side of the job, the dense one. ``of cp`` is the time over what ``cp -r`` takes for the bytes of the source
plus those of the destination, at the median rate of copies of the dense folder, one after each job; ``synced`` the
same with ``sync`` after ``cp``, since the jobs here end on the disk, too. Memory is RssAnon, its highest value above
that before the call.

Loading: the time to the model, that of its first forward of 16 tokens, and what is resident after that, above what was
before: anonymous, and with the mapped pages of files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.bars import Bar, Cost, Report

# Nothing of third parties is imported here: the peer's Python, which runs this file too, has its own set of them.

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEY_VALUE_HEADS = 2048, 5632, 32000, 32, 4
SHARDS = 3
TOKENS = 16
SAMPLE_SECONDS = 0.002
BARS = {"compress_checkpoint W4A16": 1.5}
"""At most so many times what ``cp`` takes for the bytes of source and destination."""
TINY = 4
"""By how much the sizes of the model are smaller with which each process begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of checkpoint jobs and of loading.")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="a Python that has llm-compressor")
    parser.add_argument("--folder", type=Path, help="where to write")
    options = parser.parse_args()
    report = Report("checkpoint to checkpoint")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        dense = folder / "dense"
        write_model(dense, options.layers)
        write_model(folder / "tiny", 1, TINY)
        run(sys.executable, "compress", folder / "tiny", folder / "tiny W4A16", "W4A16", options.workers)
        size = stored_bytes(dense)
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards, {options.workers} workers, {os.cpu_count()} cores", flush=True)
        jobs = [
            ("compress_checkpoint W4A16", sys.executable, "compress", "W4A16", dense),
            ("compress_checkpoint FP8_DYNAMIC", sys.executable, "compress", "FP8_DYNAMIC", dense),
            ("decompress_checkpoint W4A16", sys.executable, "decompress", "", folder / "compress W4A16"),
        ]
        if options.llmcompressor:
            jobs += [
                (f"model_free_ptq {preset}", options.llmcompressor, "model_free_ptq", preset, dense)
                for preset in ("W4A16", "FP8_DYNAMIC")
            ]
        copies = [copy(dense, folder)]
        done = []
        for title, python, task, preset, source in jobs:
            destination = folder / f"{task} {preset}".strip()
            first = folder / ("tiny W4A16" if task == "decompress" else "tiny")
            runs = []
            for _ in range(options.repeats):
                remove(destination)
                runs.append(run(python, task, source, destination, preset, options.workers, first=first))
                copies.append(copy(dense, folder))
            done.append((title, stored_bytes(source) + stored_bytes(destination), runs))
        report_jobs(size, copies, done, report)
        print(f"\n{'loading W4A16':<34}{'seconds':>9}{'forward':>9}{'MB anon':>9}{'MB all':>9}")
        for title, task in (("load_compressed", "load"), ("transformers, compressed-tensors", "load_peer")):
            packed, tiny = folder / "compress W4A16", folder / "tiny W4A16"
            runs = [run(sys.executable, task, packed, first=tiny) for _ in range(options.repeats)]
            keys = ("seconds", "forward", "after", "resident")
            found = {key: statistics.median(values[key] for values in runs) for key in keys}
            times = f"{found['seconds']:>9.2f}{found['forward']:>9.2f}"
            print(f"{title:<34}{times}{found['after'] / 1e6:>9.0f}{found['resident'] / 1e6:>9.0f}", flush=True)
    report.finish()


def report_jobs(
    size: int, copies: list[tuple[float, float]], done: list[tuple[str, int, list[dict[str, Any]]]], report: Report
) -> None:
    """A line for each job: its title, the bytes of its source and destination, and what was measured each time."""
    copied, synced = (statistics.median(times) for times in zip(*copies, strict=True))
    print(f"cp -r of the dense folder: {copied:.2f} s, {size / copied / 1e9:.2f} GB/s; with sync {synced:.2f} s")
    print(f"(median of {len(copies)}, from {min(copies)[0]:.2f} to {max(copies)[0]:.2f} s)\n")
    print(f"{'':<34}{'seconds':>9}{'GB/s':>8}{'of cp':>8}{'synced':>8}{'MB':>7}")
    for title, nbytes, runs in done:
        seconds = statistics.median(found["seconds"] for found in runs)
        highest = statistics.median(found["highest"] for found in runs) / 1e6
        ratios = "".join(f"{seconds / (nbytes / size * reference):>8.2f}" for reference in (copied, synced))
        print(f"{title:<34}{seconds:>9.2f}{size / seconds / 1e9:>8.2f}{ratios}{highest:>7.0f}", flush=True)
        if title in BARS:
            of_copy = seconds / (nbytes / size * copied)
            what = "of cp of source plus destination"
            report.add(Bar(title, what, of_copy, BARS[title], at_most=True, cost=Cost(seconds, nbytes)))


def copy(source: Path, folder: Path) -> tuple[float, float]:
    """The seconds that ``cp -r`` takes, and with ``sync`` after it."""
    target = folder / "copy"
    subprocess.run(["sync"], check=True)  # what earlier jobs left to be written is not this one's
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", "-f", target], check=True)
    synced = time.perf_counter()
    remove(target)
    return copied - start, synced - start


def remove(path: Path) -> None:
    subprocess.run(["rm", "-rf", path], check=True)


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_model(folder: Path, layers: int, smaller: int = 1) -> None:
    """A Llama's checkpoint, ``smaller`` in each dimension; each weight is a piece of the same random numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    torch.manual_seed(0)
    hidden, intermediate, vocabulary = HIDDEN // smaller, INTERMEDIATE // smaller, VOCABULARY // smaller
    numbers = (torch.randn(2**24) * 0.02).bfloat16()
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "model.norm": (hidden,)}
    cached = hidden // HEADS * KEY_VALUE_HEADS
    for number in range(layers):
        layer = f"model.layers.{number}"
        attention = {"q": (hidden, hidden), "k": (cached, hidden), "v": (cached, hidden), "o": (hidden, hidden)}
        shapes |= {f"{layer}.self_attn.{name}_proj": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj"] = hidden, intermediate
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    names = list(shapes)
    folder.mkdir()
    weight_map = {}
    total = 0
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {}
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            count = torch.Size(shapes[name]).numel()
            first = int(torch.randint(2**23, ()))
            numbers_here = numbers[first:].repeat(-(-count // (2**24 - first)))[:count]
            tensors[f"{name}.weight"] = numbers_here.view(shapes[name]).clone()
            total += tensors[f"{name}.weight"].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def run(python: str, task: str, *arguments: object, first: Path | None = None) -> dict[str, Any]:
    """What a process of its own measures of a task, once it has done the same with the source ``first``."""
    command = [python, __file__, "run", task, str(first or ""), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(task: str, first: str, arguments: list[str]) -> dict[str, float]:
    """In that process: time and memory of the call."""
    warnings.simplefilter("ignore")
    if first:
        with tempfile.TemporaryDirectory(dir=Path(first).parent) as folder:
            result = TASKS[task]([first, f"{folder}/out", *arguments[2:]])()
            if task.startswith("load"):
                forward(result)
            del result
    call = TASKS[task](arguments)
    before = resident()
    highest = [before["RssAnon"]]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            highest.append(max(highest.pop(), resident()["RssAnon"]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    result = call()
    found = {"seconds": time.perf_counter() - start}
    if task.startswith("load"):
        start = time.perf_counter()
        forward(result)
        found["forward"] = time.perf_counter() - start
    stop.set()
    sampler.join()
    after = resident()
    found["highest"] = highest[0] - before["RssAnon"]
    found["after"] = after["RssAnon"] - before["RssAnon"]
    found["resident"] = sum(after.values()) - sum(before.values())
    return found


def forward(model: Any) -> None:
    import torch

    with torch.no_grad():
        model(torch.arange(TOKENS)[None])


def resident() -> dict[str, int]:
    """What is resident of this process, in bytes: memory of its own, and of files that it maps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return {name: int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def compressing(arguments: list[str]) -> Callable[[], Any]:
    from compressed_format import QuantizationConfig, compress_checkpoint

    source, destination, preset, workers = arguments
    config = QuantizationConfig.preset(preset).replace(ignore=("lm_head",))
    return lambda: compress_checkpoint(source, destination, config, workers=int(workers))


def decompressing(arguments: list[str]) -> Callable[[], Any]:
    from compressed_format import decompress_checkpoint

    source, destination, _, workers = arguments
    return lambda: decompress_checkpoint(source, destination, workers=int(workers))


def peer_compressing(arguments: list[str]) -> Callable[[], Any]:
    from llmcompressor import model_free_ptq

    source, destination, preset, workers = arguments
    options = {"scheme": preset, "ignore": ["lm_head", "re:.*embed_tokens$"], "device": "cpu"}
    return lambda: model_free_ptq(source, destination, max_workers=int(workers), **options)


def loading(arguments: list[str]) -> Callable[[], Any]:
    import transformers  # noqa: F401

    from compressed_format import load_compressed

    return lambda: load_compressed(arguments[0])


def peer_loading(arguments: list[str]) -> Callable[[], Any]:
    import compressed_tensors  # noqa: F401
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(arguments[0], dtype="auto")


TASKS: dict[str, Callable[[list[str]], Callable[[], Any]]] = {
    "compress": compressing,
    "decompress": decompressing,
    "model_free_ptq": peer_compressing,
    "load": loading,
    "load_peer": peer_loading,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4:])))
    else:
        main()
