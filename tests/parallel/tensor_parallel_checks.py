"""What both processes of :mod:`test_tensor_parallel` check: split modules do what whole ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, parallel

from compressed_format import compress, decompress
from compressed_format.errors import UnsupportedFormatError
from compressed_format.formats import prune_2_of_4
from compressed_format.parallel.gathering import gathered
from compressed_format.parallel.split_weight import shard_module
from compressed_format.parallel.tensor_parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from tests.checks import assert_same_bits, use_exact_products
from tests.models import seeded, weights

WIDTH = 64

_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
_TOKEN_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True, "symmetric": False}
_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
_GROUPS = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16, "dynamic": True}


def _config(bits: int = 8, input: Any = None, output: Any = None, sparsity: Any = None, **fields: Any) -> Any:
    config = weights(bits, "Linear", **fields)
    group = config["config_groups"]["group_0"]
    if input is not None:
        group["input_activations"] = input
    if output is not None:
        group["output_activations"] = output
    if sparsity is not None:
        group["sparsity"] = sparsity
    return config


_GROUP = {"strategy": "group", "group_size": 16}
_BLOCK = {"strategy": "block", "block_structure": [16, 16]}
CONFIGS: dict[str, Any] = {
    **{f"int{bits} groups": _config(bits, **{**_GROUP, "group_size": 32}) for bits in range(1, 9)},
    **{f"int{bits} groups asymmetric": _config(bits, symmetric=False, **_GROUP) for bits in (1, 2, 4, 8)},
    "int4 channel": _config(4),
    "int4 channel asymmetric": _config(4, symmetric=False),
    "int4 tensor": _config(4, strategy="tensor"),
    "int4 tensor asymmetric": _config(4, strategy="tensor", symmetric=False),
    "int8 by token": _config(8, _TOKEN),
    "int8 by tensor, asymmetric": _config(8, _TENSOR),
    "int8 static": _config(8, _STATIC),
    "int8 by groups": _config(8, _GROUPS),
    "int8 in and out": _config(8, _TOKEN, _TOKEN),
    "int8 block": _config(8, _TOKEN, **_BLOCK),
    "int8 asymmetric": _config(8, _TOKEN, symmetric=False),
    "fp8 by token": _config(8, _TOKEN_FP8, type="float"),
    "fp8 tensor": _config(8, _TOKEN_FP8, type="float", strategy="tensor"),
    "fp8 block": _config(8, _TOKEN_FP8, type="float", **_BLOCK),
    "2:4 fp8": _config(8, _TOKEN_FP8, type="float", sparsity="2:4"),
}


class Pair(nn.Module):
    """Two layers as tensor parallelism splits them: outputs of the first, inputs of the second."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def _pair(config: Any, *, bias: bool = True) -> nn.Module:
    model = seeded(Pair, bias=bias)
    if "sparsity" in config["config_groups"]["group_0"]:
        for layer in (model.up, model.down):
            layer.weight.data = prune_2_of_4(layer.weight.data)
    return compress(model, config, calibration=[_input()])


def _input() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, WIDTH, generator=generator)


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def _bytes(module: nn.Module) -> int:
    storages = {
        (value.to_local() if isinstance(value, DTensor) else value).untyped_storage()._cdata: value
        for value in module.parameters()
    }
    return sum(
        (value.to_local() if isinstance(value, DTensor) else value).untyped_storage().nbytes()
        for value in storages.values()
    )


PLAN = {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}


def check_every_format_computes_what_the_whole_does(folder: Path) -> None:
    for name, config in CONFIGS.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            if {"input_activations", "output_activations"} & config["config_groups"]["group_0"].keys():
                use_exact_products(monkeypatch)
            _compare_split_with_whole(name, config)


def _compare_split_with_whole(name: str, config: Any) -> None:
    mesh = _mesh()
    whole = _pair(config)
    split = parallelize_module(copy.deepcopy(whole), mesh, PLAN)
    inputs = [_input().requires_grad_() for _ in range(2)]
    outputs = [model(input) for model, input in zip((whole, split), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], msg=lambda text: f"{name}: {text}")
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, msg=lambda text: f"{name}: {text}")
    for layer in ("up", "down"):
        gradient = split.get_submodule(layer).bias.grad.full_tensor()
        torch.testing.assert_close(gradient, whole.get_submodule(layer).bias.grad)
    with torch.no_grad():
        torch.testing.assert_close(split(_input()), whole(_input()))


def check_tensors_are_parts_of_the_whole_ones(folder: Path) -> None:
    for config in CONFIGS.values():
        whole = _pair(config, bias=False)
        split = parallelize_module(copy.deepcopy(whole), _mesh(), PLAN)
        for name, part in split.state_dict().items():
            assert_same_bits(gathered(part), whole.state_dict()[name], name)
        codes = split.up._parameters[split.up._weight_name]
        assert codes.placements == (Shard(0),)
        assert codes.to_local().shape[0] == WIDTH
        # A half of everything, but for what is one for all.
        assert _bytes(split) < 0.6 * _bytes(whole)


def check_dynamic_scales_are_those_of_whole_tokens(folder: Path) -> None:
    """One column much larger than the others, in the part of the second process."""
    one_group = {**_GROUPS, "group_size": WIDTH}
    for arguments in (_TOKEN, _TENSOR, _TOKEN_FP8, one_group):
        config = _config(8, arguments, type=arguments["type"])
        whole = compress(nn.Sequential(seeded(nn.Linear, WIDTH, WIDTH, bias=False)), config)
        split = parallelize_module(copy.deepcopy(whole), _mesh(), {"0": parallel.RowwiseParallel()})
        input = _input()
        input[..., -1] *= 100
        columns = input.chunk(2, dim=-1)[dist.get_rank()]
        torch.testing.assert_close(split(columns), whole(input))
        if arguments is not one_group:
            alone = whole[0]._quantize_input(input.chunk(2, dim=-1)[0])
            assert not torch.equal(alone, whole[0]._quantize_input(input).chunk(2, dim=-1)[0])


def check_reordered_columns_are_served(folder: Path) -> None:
    in_order = compress(nn.Sequential(seeded(nn.Linear, WIDTH, WIDTH)), _config(4, symmetric=False, **_GROUP))
    whole = copy.deepcopy(in_order)
    groups = torch.arange(WIDTH, dtype=torch.int32) * 5 % 4
    whole[0]._parameters["weight_g_idx"] = nn.Parameter(groups, requires_grad=False)
    assert not torch.allclose(whole(_input()), in_order(_input()))
    for style in (
        parallel.ColwiseParallel(output_layouts=Replicate()),
        parallel.RowwiseParallel(input_layouts=Replicate()),
    ):
        split = parallelize_module(copy.deepcopy(whole), _mesh(), {"0": style})
        torch.testing.assert_close(split(_input()), whole(_input()))


def check_layouts_of_inputs_and_outputs(folder: Path) -> None:
    whole = _pair(CONFIGS["int4 channel"])
    sequence = {
        "up": parallel.ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": parallel.RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    split = parallelize_module(copy.deepcopy(whole), _mesh(), sequence)
    tokens = torch.cat([_input(), _input()], dim=1)
    output = split(tokens.chunk(2, dim=1)[dist.get_rank()])
    assert output.placements == (Shard(1),)
    torch.testing.assert_close(output.full_tensor(), whole(tokens))
    without_bias = _pair(CONFIGS["int4 channel"], bias=False)
    split = parallelize_module(copy.deepcopy(without_bias), _mesh(), sequence)
    output = split(tokens.chunk(2, dim=1)[dist.get_rank()])
    torch.testing.assert_close(output.full_tensor(), without_bias(tokens))


def check_styles_of_this_library_with_the_function_of_torch(folder: Path) -> None:
    whole = nn.ModuleDict({"packed": _pair(CONFIGS["int4 channel"]), "dense": seeded(Pair)})
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    split = parallel.parallelize_module(copy.deepcopy(whole), _mesh(), plan)
    for name, model in whole.items():
        torch.testing.assert_close(split[name](_input()), model(_input()))
    assert isinstance(split["packed"].up._parameters["weight_packed"], DTensor)


def check_styles_of_torch_refuse_packed_modules(folder: Path) -> None:
    for name in ("int4 channel", "int8 by token"):
        for layer, style in PLAN.items():
            model = _pair(CONFIGS[name])
            before = {key: value.clone() for key, value in model.state_dict().items()}
            with pytest.raises(UnsupportedFormatError, match=r"compressed_format\.parallel\.parallelize_module"):
                parallel.parallelize_module(model, _mesh(), {layer: style})
            for key, value in model.state_dict().items():
                assert_same_bits(value, before[key])


def check_embeddings(folder: Path) -> None:
    ids = torch.tensor([[0, 5, 23], [12, 11, 23]])
    for fields in (
        {"strategy": "channel"},
        {"strategy": "group", "group_size": 16, "symmetric": False},
        {"type": "float"},
    ):
        bits = 8 if "type" in fields else 4
        whole = compress(nn.Sequential(seeded(nn.Embedding, 48, 32)), weights(bits, "Embedding", **fields))
        for style in (
            parallel.RowwiseParallel(input_layouts=Replicate()),
            parallel.ColwiseParallel(output_layouts=Replicate()),
        ):
            split = parallelize_module(copy.deepcopy(whole), _mesh(), {"0": style})
            assert torch.equal(split(ids), whole(ids))
            for unknown in (torch.tensor([48]), torch.tensor([-1])):
                for model in (whole, split):
                    with pytest.raises(IndexError):
                        model(unknown)
            assert _bytes(split) < 0.7 * _bytes(whole)


def check_a_split_that_cuts_is_refused_before_anything_is_split(folder: Path) -> None:
    model = nn.ModuleDict({"fits": seeded(nn.Linear, 64, 64), "cut": seeded(nn.Linear, 48, 20)})
    compress(model, _config(4, symmetric=False, **_GROUP))
    plan = {"fits": parallel.ColwiseParallel(), "cut": parallel.RowwiseParallel()}
    with pytest.raises(UnsupportedFormatError) as caught:
        parallelize_module(model, _mesh(), plan)
    assert "cut: 48 columns cannot be split over 2 processes" in str(caught.value)
    assert "parallel sizes that work: 3" in str(caught.value)
    assert not any(isinstance(value, DTensor) for value in model.parameters())
    with pytest.raises(UnsupportedFormatError, match=r"cut: 20 rows .* inside a word of weight_zero_point"):
        parallelize_module(model, _mesh(), {"cut": parallel.ColwiseParallel()})
    with pytest.raises(UnsupportedFormatError, match="fits: is compressed, and cannot be split by SequenceParallel"):
        parallelize_module(model, _mesh(), {"fits": parallel.SequenceParallel()})


def check_parts_are_not_read_as_the_whole(folder: Path) -> None:
    model = parallelize_module(_pair(CONFIGS["fp8 by token"]), _mesh(), PLAN)
    assert model.up.weight.shape == (2 * WIDTH, WIDTH)
    assert model.up.weight.dtype == torch.float32
    for read in (
        lambda: model.up.weight + 0,
        model.up.quantized_weight,
        model.up.dequantized_weight,
        lambda: decompress(model),
        lambda: shard_module(model.up, _mesh(), 0),
    ):
        with pytest.raises(UnsupportedFormatError, match="split"):
            read()


def check_values_are_those_of_the_first_process(folder: Path) -> None:
    models = [
        compress(nn.Sequential(seeded(nn.Linear, WIDTH, WIDTH, seed=seed)), CONFIGS["fp8 by token"]) for seed in (0, 1)
    ]
    plan = {"0": parallel.ColwiseParallel(output_layouts=Replicate())}
    own = models[dist.get_rank()]
    split = parallelize_module(copy.deepcopy(own), _mesh(), plan)
    torch.testing.assert_close(split(_input()), models[0](_input()))
    assert not torch.allclose(models[0](_input()), models[1](_input()))
    each = parallelize_module(copy.deepcopy(own), _mesh(), plan, src_data_rank=None)
    halves = [model(_input()).chunk(2, dim=-1)[half] for half, model in enumerate(models)]
    torch.testing.assert_close(each(_input()), torch.cat(halves, dim=-1))


def check_uneven_parts_and_autocast(folder: Path) -> None:
    whole = compress(nn.Sequential(seeded(nn.Linear, WIDTH, 7)), CONFIGS["int8 by token"])
    plan = {"0": parallel.ColwiseParallel(output_layouts=Replicate())}
    split = parallelize_module(copy.deepcopy(whole), _mesh(), plan)
    torch.testing.assert_close(split(_input()), whole(_input()))
    with torch.autocast("cpu", torch.bfloat16):
        assert split(_input()).dtype == torch.bfloat16


def check_one_graph(folder: Path) -> None:
    for name in ("int4 groups asymmetric", "int8 by token"):
        whole = _pair(CONFIGS[name])
        split = parallelize_module(copy.deepcopy(whole), _mesh(), PLAN)
        compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(_input()), whole(_input()))


def check_each_process_finds_what_is_wrong_with_its_part(folder: Path) -> None:
    def problems(layer: Any, version: str | None = None) -> list[str]:
        return [str(problem) for problem in layer._sharding.problems(layer, version, "here")]

    for config in CONFIGS.values():
        split = parallelize_module(_pair(config), _mesh(), PLAN)
        assert problems(split.up, "0.20.0") == problems(split.down, "0.20.0") == []
    sparse = parallelize_module(_pair(CONFIGS["2:4 fp8"]), _mesh(), PLAN)
    for layer in (sparse.up, sparse.down):
        layer._parameters["bitmask"].to_local()[0, 0] = 0b0111_0001
        rank = dist.get_rank()
        expected = f"here.bitmask: does not have two bits for row 0, columns 0 to 3 (in the part of process {rank})"
        assert problems(layer) == [expected]
    reordered = _pair(CONFIGS["int4 groups"])
    groups = torch.full((2 * WIDTH,), -1, dtype=torch.int32)
    reordered.down._parameters["weight_g_idx"] = nn.Parameter(groups, requires_grad=False)
    parallelize_module(reordered, _mesh(), PLAN)
    assert "here.weight_g_idx: was never set" in problems(reordered.down)[0]
    reordered.down._parameters["weight_g_idx"].to_local()[:] = 9
    assert "names groups 9 to 9" in problems(reordered.down)[0]
