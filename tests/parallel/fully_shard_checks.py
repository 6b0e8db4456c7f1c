"""What both processes of :mod:`test_fully_shard` check: FSDP2 shards packed tensors, and gives them back whole."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, parallel

from compressed_format import CompressedLinear, compress, load_compressed, save_compressed
from compressed_format.errors import (
    CheckpointError,
    CheckpointExistsError,
    CompressedFormatWarning,
    UnsupportedFormatError,
)
from compressed_format.modules.base import compressed_modules
from compressed_format.parallel.gathering import gathered
from compressed_format.parallel.tensor_parallel import parallelize_module
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.decoders import tiny_mixtral
from tests.models import read_config, read_tensors, seeded, weights

WIDTH = 64
_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def _fp8() -> dict[str, Any]:
    config = weights(8, type="float")
    config["config_groups"]["group_0"]["input_activations"] = _TOKEN
    return config


CONFIGS: dict[str, Any] = {
    "int4 groups": weights(4, strategy="group", group_size=32, symmetric=False),
    "int3 tensor": weights(3, strategy="tensor"),
    "int8 block": {**weights(8, strategy="block", block_structure=[16, 16]), "format": "int-quantized"},
    "fp8": _fp8(),
}


class Adapted(nn.Module):
    """A layer, and beside it a trainable product of two matrices."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList([Adapted(nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.norm(x)


def _model(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    group = config["config_groups"]["group_0"]
    # Inputs are rounded for layers only.
    targets = ["re:.*inner$"] if "input_activations" in group else ["re:.*inner$", "Embedding"]
    return compress(seeded(Blocks).to(dtype), {**config, "config_groups": {"group_0": {**group, "targets": targets}}})


def _ids() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 5 % 32


def _sharded(model: nn.Module, **fields: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **fields)
    return fully_shard(model, **fields)


def _held(model: nn.Module) -> int:
    """The bytes of all parameters that this process holds."""
    storages = {}
    for value in model.parameters():
        local = value.to_local() if isinstance(value, DTensor) else value
        storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


@contextmanager
def _views_allowed() -> Iterator[None]:
    """Without torch's warning that an output is a view, as that of a plain Linear is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        yield


def check_forward_and_gradients(folder: Path) -> None:
    for name, config in CONFIGS.items():
        whole = _model(config)
        sharded = _sharded(copy.deepcopy(whole))
        before = _held(sharded)
        assert before < 0.6 * _held(whole), name
        for model in (whole, sharded):
            output = model(_ids())
            output.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(sharded(_ids()), whole(_ids()), rtol=0, atol=0)
        assert _held(sharded) <= _held(whole)
        for module in sharded.blocks:
            module.reshard()
        sharded.reshard()
        assert _held(sharded) == before, name
        trained = 0
        for key, parameter in sharded.named_parameters():
            expected = dict(whole.named_parameters())[key]
            if expected.grad is None:
                assert parameter.grad is None, key
                continue
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)
            trained += 1
        assert trained >= 2 * 3 + 2, name
        for module in compressed_modules(sharded).values():
            codes = module._parameters[module._weight_name]
            assert isinstance(codes, DTensor)
            assert codes.placements == (Shard(0),)
            assert codes.dtype in (torch.int32, torch.int8, torch.float8_e4m3fn)
            assert not codes.requires_grad


def check_state_dicts_are_the_whole_tensors(folder: Path) -> None:
    for name, config in CONFIGS.items():
        whole = _model(config)
        sharded = _sharded(copy.deepcopy(whole))
        sharded(_ids())
        expected = whole.state_dict()
        if name == "fp8":
            # gloo gathers no float8 by itself.
            state = {key: gathered(value) for key, value in sharded.state_dict().items()}
        else:
            state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        assert sorted(state) == sorted(expected)
        for key, value in state.items():
            assert_same_bits(value, expected[key], key)


def check_state_dicts_are_loaded(folder: Path) -> None:
    for name, config in CONFIGS.items():
        source, target = _model(config), _model(config)
        for parameter in target.parameters():
            parameter.data = torch.zeros_like(parameter)
        sharded = _sharded(target)
        if name == "fp8":
            state = {
                key: value if not isinstance(value, DTensor) else part
                for (key, value), part in zip(
                    sharded.state_dict().items(), _sharded(copy.deepcopy(source)).state_dict().values(), strict=True
                )
            }
            sharded.load_state_dict(state)
        else:
            set_model_state_dict(sharded, source.state_dict(), options=StateDictOptions(full_state_dict=True))
        torch.testing.assert_close(sharded(_ids()), source(_ids()), rtol=0, atol=0)


def check_mixed_precision(folder: Path) -> None:
    """Codes are never cast; a cast of scales is an error that names the way out, which works."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for config in CONFIGS.values():
        sharded = _sharded(_model(config), mp_policy=policy)
        with pytest.raises(UnsupportedFormatError, match=r"would be cast from torch\.float.* call fully_shard on each"):
            sharded(_ids())
    # Scales in the dtype of the policy: there is nothing to cast.
    narrow = _model(CONFIGS["int4 groups"], torch.bfloat16)
    torch.testing.assert_close(_sharded(copy.deepcopy(narrow), mp_policy=policy)(_ids()), narrow(_ids()))
    for config in CONFIGS.values():
        whole = _model(config)
        sharded = copy.deepcopy(whole)
        for module in compressed_modules(sharded).values():
            fully_shard(module, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
        sharded = _sharded(sharded, mp_policy=policy)
        with _views_allowed():
            output = sharded(_ids())
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), whole(_ids()), rtol=0.1, atol=0.1)


def check_parts_are_not_read_as_the_whole(folder: Path) -> None:
    sharded = _sharded(_model(CONFIGS["int4 groups"]))
    inner = sharded.blocks[0].inner
    assert isinstance(inner, CompressedLinear)
    assert inner.weight.shape == (WIDTH, WIDTH)
    assert inner.weight.dtype == torch.float32
    with pytest.raises(UnsupportedFormatError, match="is split between processes"):
        inner.weight.sum()


def check_a_single_value_and_a_few_rows(folder: Path) -> None:
    """One scale, two sizes, three rows: less than there are processes, or not as many in each."""
    whole = compress(nn.Sequential(seeded(nn.Linear, 16, 3), seeded(nn.Linear, 3, 1)), weights(8, strategy="tensor"))
    sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.testing.assert_close(sharded(torch.ones(2, 16)), whole(torch.ones(2, 16)), rtol=0, atol=0)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for key, value in whole.state_dict().items():
        assert_same_bits(state[key], value, key)


def check_both_save_the_whole_model_together(folder: Path) -> None:
    for name, config in CONFIGS.items():
        whole = _model(config)
        sharded = _sharded(copy.deepcopy(whole))
        save_compressed(sharded, folder / name)
        assert_same_tensors(read_tensors(folder / name), whole.state_dict())
        # The first process finds what is there, and the other is told of it.
        with pytest.raises(CheckpointError, match="overwrite") as caught:
            save_compressed(sharded, folder / name)
        assert isinstance(caught.value, CheckpointExistsError) == (dist.get_rank() == 0)
        loaded = load_compressed(folder / name, model=seeded(Blocks, seed=1))
        torch.testing.assert_close(loaded(_ids()), whole(_ids()), rtol=0, atol=0)


def check_experts(folder: Path) -> None:
    """Stacked tensors are sharded by experts."""
    whole = compress(tiny_mixtral(), weights(4, ignore=("lm_head",), strategy="group", group_size=32))
    sharded = copy.deepcopy(whole)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    assert _held(sharded) < 0.6 * _held(whole)
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(sharded(ids).logits, whole(ids).logits, rtol=0, atol=0)
    with pytest.warns(CompressedFormatWarning, match="no source folder"):
        save_compressed(sharded, folder / "experts")
    if dist.get_rank() == 0:
        with pytest.warns(CompressedFormatWarning, match="no source folder"):
            save_compressed(whole, folder / "experts-whole")
    dist.barrier()
    assert_same_tensors(read_tensors(folder / "experts"), read_tensors(folder / "experts-whole"))
    written = [read_config(folder / name) for name in ("experts", "experts-whole")]
    assert written[0] == written[1]


def check_beside_tensor_parallelism(folder: Path) -> None:
    """Parts of parts: a mesh for each of the two, one of which is a single process here."""
    plan = {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
    for sizes in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
        for config in (weights(4), _fp8()):
            layers = {"up": nn.Linear(WIDTH, WIDTH), "relu": nn.ReLU(), "down": nn.Linear(WIDTH, WIDTH)}
            whole = compress(nn.Sequential(OrderedDict(layers)), config)
            split = parallelize_module(copy.deepcopy(whole), mesh["tp"], plan)
            split = fully_shard(split, mesh=mesh["dp"])
            reference = parallelize_module(whole, init_device_mesh("cpu", (2,)), plan)
            inputs = [torch.ones(3, WIDTH).cumsum(1).requires_grad_() for _ in range(2)]
            with _views_allowed():
                outputs = [model(input) for model, input in zip((reference, split), inputs, strict=True)]
            torch.testing.assert_close(outputs[1], outputs[0])
            for output in outputs:
                output.sum().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
            split.reshard()
            assert len(split.up.bias.placements) == 2
