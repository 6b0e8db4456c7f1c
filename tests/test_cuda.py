"""On a GPU everything gives the same bits as on the CPU; no kernels there yet, so the references run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compressed_format import QuantizationConfig, compress, load_compressed, save_compressed
from compressed_format.formats import format_named
from compressed_format.quantization import dequantize, quantize

pytestmark = pytest.mark.cuda

PRESETS = ["W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W5A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_tensors_are_those_of_the_cpu(preset: str, dtype: torch.dtype) -> None:
    (scheme,) = QuantizationConfig.preset(preset).config_groups.values()
    weight = (torch.randn(384, 512, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    entry, args = format_named(scheme.format), scheme.weights
    on_cpu = entry.encode(quantize(weight, args), args)
    on_gpu = entry.encode(quantize(weight.cuda(), args), args)
    assert on_gpu.keys() == on_cpu.keys()
    for suffix, tensor in on_cpu.items():
        assert on_gpu[suffix].is_cuda
        assert torch.equal(on_gpu[suffix].cpu().view(torch.uint8), tensor.view(torch.uint8)), suffix
    assert torch.equal(dequantize(entry.decode(on_gpu, args), args).cpu(), dequantize(entry.decode(on_cpu, args), args))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_loads_onto_the_gpu_and_runs(preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = compress(nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128)), preset)
    save_compressed(model, tmp_path / "model")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128))
    loaded = load_compressed(tmp_path / "model", model=skeleton, device="cuda")
    inputs = torch.randn(8, 512)
    # TF32 is off by default; what differs is the order of the sums.
    torch.testing.assert_close(loaded(inputs.cuda()).cpu(), model(inputs), rtol=1e-4, atol=1e-4)
    assert all(parameter.is_cuda for parameter in loaded.parameters())


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC"])
def test_a_forward_pass_copies_nothing_from_the_host(preset: str) -> None:
    """It could not be captured into a CUDA graph otherwise."""
    model = compress(nn.Sequential(nn.Linear(512, 256, device="cuda")), preset)
    inputs = torch.randn(8, 512, device="cuda")
    with torch.no_grad():
        expected = model(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(inputs)
        graph.replay()
    assert torch.equal(output, expected)


def test_sparse_tensors_are_where_the_weight_is() -> None:
    group = {"targets": ["Linear"], "sparsity": "2:4"}
    model = compress(nn.Sequential(nn.Linear(64, 32, device="cuda")), {"config_groups": {"group_0": group}})
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert model(torch.ones(2, 64, device="cuda")).is_cuda
