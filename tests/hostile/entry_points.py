"""The good checkpoints, and what a program can do with the folder of one."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_format import (
    QuantizationConfig,
    check,
    compress,
    compress_checkpoint,
    decompress_checkpoint,
    load_compressed,
    open_checkpoint,
    save_compressed,
)
from compressed_format.checkpoint import read_checkpoint
from tests.models import tiny_llama, weights

__all__ = ["BASES", "ENTRY_POINTS", "Refused", "build_bases"]

ROWS, COLUMNS = 64, 128
_SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
_GROUPS = {"strategy": "group", "group_size": 32}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
_SPARSE = {"sparsity": "2:4", "targets": ["Linear"]}

LAYERS: dict[str, dict[str, Any]] = {
    "grouped": weights(4, **_GROUPS),
    "asymmetric": weights(4, **_GROUPS, symmetric=False),
    "three bits": weights(3, **_GROUPS),
    "int8": weights(8) | {"format": "int-quantized"},
    "2:4": {"config_groups": {"a": _SPARSE | {"weights": _FP8}}},
    "bitmask": {"config_groups": {}, "sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"]}},
}
"""Configs of one layer each; the Llama beside them is what transformers can build."""
BASES = ("llama", *LAYERS)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(COLUMNS, ROWS, bias=False)


class Refused(Exception):  # noqa: N818  # what check finds is no error of its own
    """A report with errors: for ``check``, which raises nothing, what an exception is elsewhere."""


def build_bases(folder: Path) -> None:
    """Write the checkpoint of every base into a folder of its name."""
    torch.manual_seed(0)
    config = weights(4, **_GROUPS, ignore=("lm_head",))
    save_compressed(compress(tiny_llama(torch.bfloat16, **_SIZES), config), folder / "llama")
    for name, layer_config in LAYERS.items():
        layer = Layer()
        mask = torch.arange(COLUMNS) % 4 < 2
        layer.lin.weight.data *= mask if name in ("2:4", "bitmask") else 1
        save_compressed(compress(layer, QuantizationConfig.from_dict(layer_config)), folder / name)


def _config(folder: Path, _: str) -> None:
    QuantizationConfig.from_checkpoint(folder)


def _authors_config(folder: Path, _: str) -> None:
    QuantizationConfig.from_file(folder / "quantization.json")


def _reader(folder: Path, _: str) -> None:
    checkpoint = read_checkpoint(folder)
    for name in tuple(checkpoint)[:100]:
        checkpoint[name]


def _open(folder: Path, _: str) -> None:
    reader = open_checkpoint(folder)
    for module in tuple(reader.modules.values())[:100]:
        if module.assignment is not None:
            module.quantized()


def _fill(folder: Path, base: str) -> nn.Module:
    with torch.device("meta"):
        model = tiny_llama(torch.bfloat16, **_SIZES) if base == "llama" else Layer()
    for name, buffer in model.named_buffers():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.zeros(buffer.shape))
    return load_compressed(folder, model=model)


def _run(folder: Path, base: str) -> None:
    loaded = _fill(folder, base)
    if isinstance(loaded, Layer):
        loaded.lin(torch.ones(1, COLUMNS))
    else:
        loaded(torch.zeros(1, 4, dtype=torch.int64))


def _load(folder: Path, _: str) -> None:
    load_compressed(folder)


def _check(folder: Path, _: str) -> None:
    report = check(folder)
    if not report.ok:
        raise Refused("\n".join(f"{finding.place}: {finding.message}" for finding in report.errors))


def _decompress(folder: Path, _: str) -> None:
    _fresh(folder, lambda out: decompress_checkpoint(folder, out, workers=1))


def _compress(folder: Path, _: str) -> None:
    _fresh(folder, lambda out: compress_checkpoint(folder, out, "W4A16", workers=1))


def _fresh(folder: Path, job: Callable[[Path], object]) -> None:
    out = folder.with_name(folder.name + ".out")
    try:
        job(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


ENTRY_POINTS: dict[str, Callable[[Path, str], object]] = {
    "config": _config,
    "author": _authors_config,
    "reader": _reader,
    "open": _open,
    "fill": _fill,
    "run": _run,
    "load": _load,
    "check": _check,
    "decompress": _decompress,
    "compress": _compress,
}


def run(entry_point: str, folder: Path, base: str) -> None:
    """Do it, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ENTRY_POINTS[entry_point](folder, base)
