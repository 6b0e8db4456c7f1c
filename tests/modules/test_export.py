"""torch.export: programs of compressed modules keep the packed tensors, through a file and for any batch."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from compressed_format import compress
from tests.checks import assert_same_tensors
from tests.integrations.decoders import DECODERS
from tests.models import LLAMA_CONFIGS, Nested, compressed_llama, seeded, token_ids, weights
from tests.modules.test_linear import CASES, COLUMNS, FEW, ROWS, embedding_of, inputs, linear_of

BATCH = Dim("batch", min=1, max=64)


def exported(model: nn.Module, example: torch.Tensor, *, strict: bool = False) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: BATCH},), strict=strict)


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def ops_of(program: ExportedProgram) -> list[str]:
    """The names of this library's ops in a program, in order."""
    targets = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return [name.split(".")[1] for name in targets if name.startswith("compressed_format.")]


@pytest.mark.parametrize("case", CASES)
def test_a_linear(case: str) -> None:
    model = nn.Sequential(nn.LayerNorm(COLUMNS), linear_of(case), nn.GELU()).eval()
    program = exported(model, inputs(3))
    again = through_a_file(program)
    rounds = model[1]._input is not None
    for found in (program, again):
        assert ops_of(found) == (["quantized_linear"] if rounds else ["linear"])
        assert_same_tensors(dict(found.state_dict), model.state_dict())
        for batch in (1, 2, 7):
            assert torch.equal(found.module()(inputs(batch)), model(inputs(batch)))


@pytest.mark.parametrize("case", ["int4 group symmetric", "int8 channel", "fp8 block", "fp8 2:4", "bitmask"])
def test_an_embedding(case: str) -> None:
    table = embedding_of(case)
    again = through_a_file(exported(nn.Sequential(table), torch.arange(4)))
    assert ops_of(again) == ["embedding"]
    assert_same_tensors(dict(again.state_dict), nn.Sequential(table).state_dict())
    ids = torch.arange(ROWS)
    assert torch.equal(again.module()(ids), table(ids))


@pytest.mark.parametrize("strict", [False, True])
def test_modules_in_modules_one_of_which_occurs_twice(strict: bool) -> None:
    model = compress(seeded(Nested), weights(4, strategy="group", group_size=8))
    x = inputs(5)
    again = through_a_file(exported(model, x[:2], strict=strict))
    assert ops_of(again) == ["linear"] * 7
    assert torch.equal(again.module()(x), model(x))
    assert_same_tensors(dict(again.state_dict), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize("case", FEW)
def test_decompositions_leave_the_ops_alone(case: str) -> None:
    model = nn.Sequential(linear_of(case)).eval()
    program = exported(model, inputs(3)).run_decompositions()
    assert ops_of(program) in (["linear"], ["quantized_linear"])
    assert torch.equal(program.module()(inputs(4)), model(inputs(4)))


def test_a_weight_that_is_read_is_dequantized_in_the_program() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear_of("int4 group symmetric")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(self.layer.weight.dtype) @ self.layer.weight.T

    model = Reads()
    again = through_a_file(exported(model, inputs(3)))
    assert "dequantize" in ops_of(again)
    assert torch.equal(again.module()(inputs(5)), model(inputs(5)))


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


LLAMAS: dict[str, Any] = {
    **{name: LLAMA_CONFIGS[name] for name in ("W4A16 group", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK")},
    "everything": weights(8, "Linear", "Embedding"),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_a_language_model(name: str) -> None:
    model = Logits(compressed_llama(LLAMAS[name]))
    again = through_a_file(exported(model, token_ids()))
    op = "quantized_linear" if name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK") else "linear"
    assert ops_of(again).count(op) == (15 if name == "everything" else 14)
    assert ops_of(again).count("embedding") == (1 if name == "everything" else 0)
    assert_same_tensors(dict(again.state_dict), dict(model.state_dict()))
    ids = token_ids().flip(1).repeat(2, 1)[:3]
    with torch.no_grad():
        torch.testing.assert_close(again.module()(ids), model(ids))


@pytest.mark.parametrize("name", ["W4A16 group", "W8A8", "FP8_BLOCK"])
@pytest.mark.parametrize("decoder", ["Mixtral", "Qwen3-MoE"])
def test_a_mixture_of_experts(decoder: str, name: str) -> None:
    model = Logits(compress(DECODERS[decoder](initializer_range=0.1), LLAMA_CONFIGS[name]))
    again = through_a_file(exported(model, token_ids()))
    op = "expert_linear" if name == "W4A16 group" else "expert_quantized_linear"
    assert ops_of(again).count(op) == (6 if decoder == "Mixtral" else 3)
    assert_same_tensors(dict(again.state_dict), dict(model.state_dict()))
    ids = token_ids().flip(1).repeat(2, 1)[:3]
    with torch.no_grad():
        torch.testing.assert_close(again.module()(ids), model(ids))


def test_a_fresh_process_needs_the_ops_and_nothing_else(tmp_path: Path) -> None:
    model = nn.Sequential(linear_of("fp8 block"), nn.ReLU(), nn.Linear(ROWS, 2)).eval()
    torch.export.save(exported(model, inputs(3)), tmp_path / "program.pt2")
    torch.save((inputs(4), model(inputs(4)).detach()), tmp_path / "expected.pt")
    program = """
import sys, torch
import compressed_format.ops
x, expected = torch.load(sys.argv[2])
assert torch.equal(torch.export.load(sys.argv[1]).module()(x), expected)
assert "transformers" not in sys.modules
"""
    files = [str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
