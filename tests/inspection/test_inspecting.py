"""What ``inspect_checkpoint`` says of checkpoints that were written for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressed_format import compress, inspect_checkpoint, save_compressed
from compressed_format.checkpoint import Checkpoint
from compressed_format.config import CompressionFormat
from compressed_format.errors import CheckpointError, CompressedFormatWarning
from compressed_format.inspection import reference_error
from compressed_format.inspection.inspection import Inspection, decibels
from compressed_format.inspection.kernels import OPS_WITH_KERNELS, REFERENCE, KernelProblem, kernel_for
from compressed_format.ops import backend_info
from compressed_format.reading import StoredModule, open_checkpoint

MIXED = {
    "config_groups": {
        "up": {"targets": [r"re:.*up"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": False}},
        "down": {
            "targets": [r"re:.*down"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        },
        "also up": {"targets": ["extra"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": False}},
        "table": {"targets": ["Embedding"], "weights": {"num_bits": 8, "group_size": 32}},
    },
    "ignore": ["head"],
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(32, 64)
        self.down = torch.nn.Linear(64, 32, bias=False)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(48, 32)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.norm = torch.nn.LayerNorm(32)
        self.extra = torch.nn.Linear(32, 8)
        self.head = torch.nn.Linear(32, 48)


def saved(folder: Path, config: Any, model: torch.nn.Module | None = None) -> tuple[Path, Path]:
    """A model compressed by ``config``, and the same one dense."""
    torch.manual_seed(0)
    model = model or Net()
    dense, packed = folder / "dense", folder / "packed"
    dense.mkdir()
    save_file(model.state_dict(), dense / "model.safetensors")
    save_compressed(compress(model, config), packed)
    return packed, dense


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved(tmp_path_factory.mktemp("mixed"), MIXED)


def test_modules_are_grouped_by_what_their_scheme_says(mixed: tuple[Path, Path]) -> None:
    found = inspect_checkpoint(mixed[0])
    schemes = {scheme.title: scheme for scheme in found.schemes}
    assert list(schemes) == [
        "int8 channel symmetric, input int8 token dynamic",
        "int4 group 32 asymmetric",
        "int8 group 32 symmetric",
    ]  # the most bytes first
    four = schemes["int4 group 32 asymmetric"]
    assert four.groups == ("also up", "up")
    assert (four.bits, four.type, four.strategy, four.group_size, four.symmetric) == (4, "int", "group", 32, False)
    assert (four.format, four.activations, four.sparsity, four.modules) == ("pack-quantized", None, None, 3)
    # Two of 64 x 32 and one of 8 x 32: 4 words and a float32 scale a row, a zero point of 4 bits, and two int64.
    rows = 64 + 64 + 8
    assert four.nbytes == rows * (4 * 4 + 4) + rows * 4 // 8 + 3 * 16
    assert four.parameters == rows * 32
    assert four.dense_nbytes == rows * 32 * 4
    assert four.bits_per_weight == pytest.approx(8 * four.nbytes / (rows * 32))
    assert schemes["int8 channel symmetric, input int8 token dynamic"].activations == "input int8 token dynamic"
    assert [kernel.op for kernel in schemes["int8 group 32 symmetric"].kernels] == ["embedding"]


def test_every_byte_of_the_file_is_counted_once(mixed: tuple[Path, Path]) -> None:
    found = inspect_checkpoint(mixed[0])
    tensors = load_file(mixed[0] / "model.safetensors")
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.compressed_nbytes == sum(module.nbytes for module in found.modules)
    original = load_file(mixed[1] / "model.safetensors")
    assert found.dense_nbytes == sum(tensor.nbytes for tensor in original.values())
    assert found.parameters == sum(tensor.numel() for tensor in original.values())
    assert {tensor.name for tensor in found.tensors} == {
        *("head.weight", "head.bias", "norm.weight", "norm.bias", "extra.bias", "layers.0.up.bias", "layers.1.up.bias")
    }
    assert (found.dtype, found.dtype_source) == ("float32", "the tensors that are not compressed")
    largest = found.largest(2)
    assert [module.nbytes for module in largest] == sorted((m.nbytes for m in found.modules), reverse=True)[:2]


def test_headers_are_all_that_is_read(mixed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    really = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: (read.append(name), really(self, name))[1])
    inspect_checkpoint(mixed[0])
    assert {name.rpartition(".")[2] for name in read} == {"weight_shape"}


def test_the_dtype_of_the_config_decides_what_dense_means(tmp_path: Path) -> None:
    packed, _ = saved(tmp_path, MIXED)
    file = packed / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    found = inspect_checkpoint(packed)
    assert (found.dtype, found.dtype_source) == ("bfloat16", "config.json")
    assert all(scheme.dense_nbytes == 2 * scheme.parameters for scheme in found.schemes)


def test_a_dense_checkpoint_has_no_schemes(mixed: tuple[Path, Path]) -> None:
    found = inspect_checkpoint(mixed[1])
    assert (found.schemes, found.modules) == ((), ())
    assert found.nbytes == found.dense_nbytes
    assert math.isnan(found.bits_per_weight)
    assert found.to_dict()["bits_per_weight"] is None


# errors --------------------------------------------------------------------------------------------------------------


WEIGHTS: list[dict[str, Any]] = [
    {"num_bits": 4, "group_size": 32, "symmetric": False},
    {"num_bits": 3, "strategy": "channel"},
    {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    {"num_bits": 8, "strategy": "tensor"},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: f"{weights['num_bits']} bits")
@pytest.mark.parametrize("slab", [1, 700, 2**20])
def test_errors_are_those_of_the_whole_weight(
    tmp_path: Path, weights: dict[str, Any], slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    linear = torch.nn.Sequential(torch.nn.Linear(64, 41, bias=False))
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}
    packed, dense = saved(tmp_path, config, linear)
    monkeypatch.setattr(reference_error, "SLAB_VALUES", slab)
    rows: list[int] = []
    really = StoredModule.dense

    def recorded(self: StoredModule, **more: Any) -> torch.Tensor:
        part = really(self, **more)
        rows.append(part.shape[0])
        return part

    monkeypatch.setattr(StoredModule, "dense", recorded)
    (module,) = inspect_checkpoint(packed, reference=dense).modules
    step = open_checkpoint(packed).modules["0"].layout.row_step
    assert max(rows) <= max(slab // 64, step)  # no more in memory than a slab, or what cannot be cut
    assert sum(rows) == 2 * 41  # each row of both once

    monkeypatch.undo()
    original = open_checkpoint(dense)["0.weight"].double()
    difference = open_checkpoint(packed).modules["0"].dense().double() - original
    signals, noises = (original**2).sum(1), (difference**2).sum(1)
    assert module.error is not None
    assert module.error.signal == pytest.approx(signals.sum().item(), rel=1e-12)
    assert module.error.noise == pytest.approx(noises.sum().item(), rel=1e-12)
    assert module.error.max_abs_error == difference.abs().max().item()
    assert module.error.worst_row == int((signals / noises).argmin())
    assert module.error.worst_row_snr == pytest.approx(10 * math.log10((signals / noises).min().item()))
    assert module.error.snr == pytest.approx(10 * math.log10(signals.sum().item() / noises.sum().item()))


def with_reference(packed: Path, dense: Path, change: Any) -> Inspection:
    """An inspection against the dense model after a change to its tensors."""
    tensors = load_file(dense / "model.safetensors")
    changed = change(tensors) or tensors
    folder = dense.parent / "changed"
    folder.mkdir()
    save_file(changed, folder / "model.safetensors")
    return inspect_checkpoint(packed, reference=folder)


def test_values_that_are_not_finite_are_told_and_not_averaged(tmp_path: Path) -> None:
    packed, dense = saved(tmp_path, MIXED)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.up.weight"][5, 7] = math.nan
        tensors["layers.1.up.weight"][9, 1] = math.inf

    found = {module.name: module.error for module in with_reference(packed, dense, change).modules}
    for name, row in (("layers.0.up", 5), ("layers.1.up", 9)):
        error = found[name]
        assert error is not None
        assert math.isnan(error.snr)
        assert (error.worst_row, math.isnan(error.worst_row_snr)) == (row, True)
        assert error.to_dict()["snr_db"] is None
        assert not error.to_dict()["exact"]


def test_what_is_equal_is_exact_and_what_came_from_nothing_is_worst(tmp_path: Path) -> None:
    packed, dense = saved(tmp_path, MIXED)
    stored = open_checkpoint(packed).modules

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.up.weight"] = stored["layers.0.up"].dense().contiguous()
        tensors["layers.1.up.weight"][4] = 0

    inspection = with_reference(packed, dense, change)
    found = {module.name: module.error for module in inspection.modules}
    exact, from_nothing = found["layers.0.up"], found["layers.1.up"]
    assert exact is not None
    assert from_nothing is not None
    assert (exact.snr, exact.worst_row_snr, exact.max_abs_error) == (math.inf, math.inf, 0)
    assert exact.to_dict()["exact"]
    assert (from_nothing.worst_row, from_nothing.worst_row_snr) == (4, -math.inf)
    assert math.isfinite(from_nothing.snr)
    json.dumps(inspection.to_dict(), allow_nan=False)


def test_what_has_no_equal_in_the_reference_is_listed(tmp_path: Path) -> None:
    packed, dense = saved(tmp_path, MIXED)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.up.weight"], tensors["layers.0.up.bias"]
        tensors["layers.1.up.weight"] = tensors["layers.1.up.weight"].T.contiguous()
        tensors["extra.weight"] = tensors["extra.weight"].to(torch.int8)

    found = with_reference(packed, dense, change)
    assert {problem.place: problem.message for problem in found.unmatched} == {
        "layers.0.up": "is not in the reference",
        "layers.1.up": "has shape [32, 64] in the reference, and [64, 32] here",
        "extra": "has a weight of int8 in the reference",
    }
    assert {module.name for module in found.modules if module.error is None} == {"layers.0.up", "layers.1.up", "extra"}
    assert found.error is not None


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path, mixed: tuple[Path, Path]) -> None:
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: has an equal of none of the 6 .*this model"):
        inspect_checkpoint(mixed[0], reference=tmp_path / "other.safetensors")


def test_the_errors_of_all_modules_are_pooled(mixed: tuple[Path, Path]) -> None:
    steps: list[tuple[int, int]] = []
    found = inspect_checkpoint(mixed[0], reference=mixed[1], progress=lambda done, total: steps.append((done, total)))
    errors = [module.error for module in found.modules if module.error is not None]
    assert len(errors) == len(found.modules) == len(steps)
    assert steps[-1] == (found.compressed_parameters, found.compressed_parameters)
    assert found.error is not None
    assert found.error.snr == decibels(sum(e.signal for e in errors), sum(e.noise for e in errors))
    assert found.error.worst_row_snr == min(e.worst_row_snr for e in errors)
    assert found.worst(1)[0].error == min(errors, key=lambda error: error.snr)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [module["error"]["snr_db"] for module in data["modules"]] == [error.snr for error in errors]


def test_sparse_weights_have_a_scheme_too(tmp_path: Path) -> None:
    config = {
        "config_groups": {
            "g": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "sparsity": "2:4",
            }
        }
    }
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16, bias=False))
    with torch.no_grad():
        model[0].weight[:, 0::4] = model[0].weight[:, 1::4] = 0
    with pytest.warns(CompressedFormatWarning, match="this checkpoint is sparse"):
        packed, dense = saved(tmp_path, config, model)
    found = inspect_checkpoint(packed, reference=dense)
    (scheme,) = found.schemes
    assert scheme.sparsity == "sparse-24-bitmask"
    assert scheme.title.endswith(", sparse-24-bitmask")
    assert scheme.bits_per_weight < 8
    assert found.error is not None
    assert found.error.snr > 25


# kernels -------------------------------------------------------------------------------------------------------------


PROBLEM = KernelProblem("linear", None, CompressionFormat.DENSE, None)


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        ({"path": "/x.so", "reason": None}, "this release has no native kernel for it"),
        ({"path": None, "reason": "not built"}, "the native library is not in use: not built"),
    ],
)
def test_no_kernel_is_claimed_that_does_not_exist(library: dict[str, str | None], reason: str) -> None:
    backend = {"libraries": {"cpu": library}, "kernels": {"pack_codes": ["cpu: int8 codes of 4 bits"]}}
    kernel = kernel_for(PROBLEM, backend)
    assert (kernel.op, kernel.device, kernel.name, kernel.reason) == ("linear", "cpu", REFERENCE, reason)
    assert "no native library for cuda" in kernel_for(PROBLEM, backend, device="cuda").reason


def test_a_kernel_that_exists_goes_by_its_instructions() -> None:
    backend = {
        "libraries": {"cpu": {"path": "/x.so", "reason": None}},
        "kernels": {"embedding": ["cpu: some codes"]},
        "cpu": {"instructions": "avx2"},
    }
    kernel = kernel_for(replace(PROBLEM, op="embedding"), backend)
    assert (kernel.name, kernel.reason) == ("avx2", "cpu: some codes")
    sparse = replace(PROBLEM, op="embedding", sparsity=CompressionFormat.SPARSE_BITMASK)
    assert kernel_for(sparse, backend).name == REFERENCE


def test_the_kernels_of_every_op_are_known() -> None:
    """Fails when an op that runs modules gets its first native kernel, which ``kernel_for`` must then know."""
    running = {"linear", "quantized_linear", "embedding", "expert_linear", "expert_quantized_linear"}
    assert backend_info()["kernels"].keys() & running <= OPS_WITH_KERNELS
