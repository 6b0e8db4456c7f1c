"""The weight of a compressed module: what costs nothing, what makes it dense, and that it cannot be written to."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from compressed_format import CompressedEmbedding, CompressedLinear, compress, decompress
from compressed_format.errors import UnsupportedFormatError
from compressed_format.modules.lazy_weight import LazyWeight
from tests.checks import assert_same_bits
from tests.models import recorded_warnings, seeded, weights

ROWS, COLUMNS = 6, 32
INT4 = weights(4, strategy="group", group_size=16)
WORDS = weights(4, "Embedding", strategy="group", group_size=16)


def compressed_linear(config: Any = INT4, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    return compress(nn.Sequential(seeded(nn.Linear, COLUMNS, ROWS, dtype=dtype)), config)[0]


# What costs nothing --------------------------------------------------------------------------------------------------


FREE: dict[str, Callable[[torch.Tensor], Any]] = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "device.type": lambda w: w.device.type,
    "shape": lambda w: w.shape,
    "size": lambda w: w.size(),
    "size(0)": lambda w: w.size(0),
    "dim": lambda w: (w.dim(), w.ndim, w.ndimension()),
    "numel": lambda w: (w.numel(), w.nelement(), torch.numel(w)),
    "len": len,
    "is_cuda": lambda w: (w.is_cuda, w.is_cpu, w.is_meta, w.get_device()),
    "is_floating_point": lambda w: (w.is_floating_point(), torch.is_floating_point(w), w.is_complex()),
    "bytes": lambda w: (w.element_size(), w.itemsize, w.nbytes),
    "strides": lambda w: (w.stride(), w.storage_offset(), w.is_contiguous(), w.layout),
    "type": lambda w: w.type(),
    "gradients": lambda w: (w.requires_grad, w.is_leaf, w.grad, w.grad_fn),
    "isinstance": lambda w: (isinstance(w, torch.Tensor), torch.is_tensor(w), isinstance(w, nn.Parameter)),
    "data": lambda w: w.data.dtype,
    "detach": lambda w: w.detach().shape,
    "hash": lambda w: isinstance(hash(w), int),
    "new_zeros": lambda w: w.new_zeros(2, 3).tolist(),
    "new_ones": lambda w: w.new_ones(1, dtype=torch.int32),
    "requires_grad_(False)": lambda w: (w.requires_grad_(False).shape, w.requires_grad_(requires_grad=False).dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("question", FREE)
def test_what_needs_no_value_costs_nothing(question: str, dtype: torch.dtype, dequantized: list[torch.Size]) -> None:
    module = compressed_linear(dtype=dtype)
    dense = module.dequantized_weight()
    dequantized.clear()
    assert FREE[question](module.weight) == FREE[question](dense)
    assert dequantized == []


def test_on_the_meta_device(dequantized: list[torch.Size]) -> None:
    weight = compressed_linear().to("meta", torch.bfloat16).weight
    assert (weight.is_meta, weight.device.type, weight.dtype) == (True, "meta", torch.bfloat16)
    assert weight.shape == (ROWS, COLUMNS)
    assert dequantized == []
    assert weight.float().is_meta
    assert weight.float().dtype is torch.float32


def test_on_a_device_that_is_not_there() -> None:
    """What it is, it knows without any memory."""

    def never() -> torch.Tensor:
        raise AssertionError

    weight = LazyWeight(never, (3, 4), torch.bfloat16, torch.device("cuda:1"))
    assert (weight.is_cuda, weight.is_cpu, weight.get_device(), weight.device.index) == (True, False, 1, 1)
    assert weight.detach().data.device == torch.device("cuda:1")


def test_embeddings_and_sparse_weights(dequantized: list[torch.Size]) -> None:
    sparse = {"config_groups": {"g": {"targets": ["Linear"], "weights": None, "sparsity": "2:4"}}}
    table = compress(nn.Sequential(seeded(nn.Embedding, ROWS, COLUMNS)), WORDS)[0]
    assert isinstance(table, CompressedEmbedding)
    for module in (table, compressed_linear(sparse), compressed_linear(weights(8))):
        assert (module.weight.shape, module.weight.dtype) == ((ROWS, COLUMNS), torch.float32)
    assert dequantized == []


def test_casting_the_module_leaves_a_weight_that_was_asked_for_as_it_was() -> None:
    module = compressed_linear()
    before, dense = module.weight, module.dequantized_weight()
    module.bfloat16()
    assert before.dtype is torch.float32
    assert_same_bits(before.clone(), dense)
    assert_same_bits(module.weight.clone(), dense.bfloat16())


# What makes it dense -------------------------------------------------------------------------------------------------


def saved(weight: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    return torch.load(file)["weight"]


X = torch.linspace(-1, 1, 3 * COLUMNS).reshape(3, COLUMNS)
DENSE: dict[str, Callable[[torch.Tensor], Any]] = {
    "float": lambda w: w.float(),
    "double": lambda w: w.double(),
    "to": lambda w: w.to("cpu", torch.float16),
    "matmul": lambda w: w @ X.T,
    "from the right": lambda w: X @ w.T,
    "linear": lambda w: functional.linear(X, w),
    "embedding": lambda w: functional.embedding(torch.tensor([3, 0]), w),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "asarray": lambda w: torch.from_numpy(np.asarray(w)),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "item": lambda w: torch.tensor(w.sum().item()),
    "index": lambda w: w[0],
    "slice": lambda w: w[1:3, ::2],
    "iterate": lambda w: torch.stack(list(w)),
    "cpu": lambda w: w.cpu(),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "data": lambda w: w.data.clone(),
    "detach": lambda w: w.detach().abs(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": saved,
    "dlpack": torch.from_dlpack,
    "compare": lambda w: w == w.clone(),
    "twice": lambda w: torch.cat([w, w]),
    "add": lambda w: 1 + w,
    "norm": torch.linalg.vector_norm,
    "in place of another": lambda w: torch.zeros(ROWS, COLUMNS).add_(w),
    "copied into another": lambda w: torch.zeros(ROWS, COLUMNS).copy_(w),
    "assigned to a part": lambda w: assigned(torch.zeros(ROWS + 1, COLUMNS), w),
}  # fmt: skip


def assigned(into: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    into[1:] = weight
    return into


@pytest.mark.parametrize("use", DENSE)
def test_values_are_those_of_the_dense_weight(use: str, dequantized: list[torch.Size]) -> None:
    module = compressed_linear()
    dense = module.dequantized_weight()
    dequantized.clear()
    found = DENSE[use](module.weight)
    assert dequantized[0] == (ROWS, COLUMNS)
    assert type(found) is torch.Tensor
    assert_same_bits(found, DENSE[use](dense))


def test_one_call_dequantizes_it_once(dequantized: list[torch.Size]) -> None:
    weight = compressed_linear().weight
    assert torch.equal(weight, weight)
    torch.stack([weight, weight, weight])
    assert len(dequantized) == 2


def test_it_prints_its_values() -> None:
    module = compressed_linear()
    dense = module.dequantized_weight()
    assert repr(module.weight) == str(module.weight) == repr(dense)
    assert f"{module.weight[0, 0]:.3f}" == f"{dense[0, 0]:.3f}"


def test_from_c_plus_plus_it_is_dense_too(dequantized: list[torch.Size]) -> None:
    """Where ``__torch_function__`` is off, as within the functions of another subclass."""
    module = compressed_linear()
    dense = module.dequantized_weight()
    dequantized.clear()
    with torch._C.DisableTorchFunctionSubclass():
        assert isinstance(module.weight.detach(), LazyWeight)
        assert dequantized == []
        assert_same_bits(functional.linear(X, module.weight), functional.linear(X, dense))
        assert_same_bits(torch.cat([module.weight, dense]), torch.cat([dense, dense]))
        for write in (
            lambda: module.weight.zero_(),
            lambda: torch.add(dense, dense, out=module.weight),
            lambda: torch._foreach_add_([dense, module.weight], 1.0),
        ):
            with pytest.raises(UnsupportedFormatError, match="cannot be written to"):
                write()


def test_gradients_pass_through_it() -> None:
    module = compressed_linear()
    x, plain = X.clone().requires_grad_(), X.clone().requires_grad_()
    functional.linear(x, module.weight).square().sum().backward()
    functional.linear(plain, module.dequantized_weight()).square().sum().backward()
    assert_same_bits(x.grad, plain.grad)


def test_under_modes_of_torch() -> None:
    module = compressed_linear()
    dense = module.dequantized_weight()
    with torch.inference_mode():
        assert torch.equal(module.weight.clone(), dense)
        assert torch.equal(module.weight, dense)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(functional.linear(X, module.weight), functional.linear(X, dense))
    rows = torch.func.vmap(lambda x: module.weight @ x)(X)
    torch.testing.assert_close(rows, X @ dense.T)
    traced = torch.jit.trace(lambda x: x @ module.weight.T, X)
    torch.testing.assert_close(traced(X), X @ dense.T)


def test_decompress_makes_plain_parameters() -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Embedding(ROWS, COLUMNS))
    decompress(compress(model, weights(8, "Linear", "Embedding")))
    assert [type(module.weight.data) for module in model] == [torch.Tensor, torch.Tensor]
    assert all(type(tensor) is nn.Parameter for tensor in model.parameters())


# Writing -------------------------------------------------------------------------------------------------------------


def iadd(weight: torch.Tensor) -> None:
    weight += 1


def item(weight: torch.Tensor) -> None:
    weight[0, 1] = 2.0


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(ROWS, COLUMNS)),
    "+=": iadd,
    "item": item,
    "data.zero_": lambda w: w.data.zero_(),
    "data item": lambda w: item(w.data),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "data =": lambda w: setattr(w, "data", torch.zeros(ROWS, COLUMNS)),
    "grad =": lambda w: setattr(w, "grad", torch.zeros(ROWS, COLUMNS)),
    "out": lambda w: torch.add(torch.zeros(ROWS, COLUMNS), 1, out=w),
    "out of several": lambda w: torch.max(torch.zeros(ROWS, COLUMNS), 0, out=(w, torch.zeros(1).long())),
    "foreach": lambda w: torch._foreach_add_([torch.zeros(2), w], 1.0),
    "inplace": lambda w: functional.relu(w, inplace=True),
    "init.normal_": nn.init.normal_,
    "init.zeros_": nn.init.zeros_,
    "init.xavier_uniform_": nn.init.xavier_uniform_,
    "init.trunc_normal_": nn.init.trunc_normal_,
    "init.orthogonal_": nn.init.orthogonal_,
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(2)),
    "share_memory_": lambda w: w.share_memory_(),
    "clamp_": lambda w: w.clamp_(0, 1),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused_and_not_lost(write: str) -> None:
    module = compressed_linear()
    before = module.dequantized_weight()
    with pytest.raises(UnsupportedFormatError, match=r"packed tensors, which would not follow; .* or decompress\(\)"):
        WRITES[write](module.weight)
    assert_same_bits(module.dequantized_weight(), before)


@pytest.mark.parametrize(
    "name", ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift"]
)
def test_operators_that_write_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedFormatError, match="cannot be written to"):
        getattr(operator, name)(compressed_linear().weight, 2)


def test_operators_that_write_to_another_are_not() -> None:
    module = compressed_linear()
    sum_of_both = torch.ones(ROWS, COLUMNS)
    sum_of_both += module.weight
    assert_same_bits(sum_of_both, 1 + module.dequantized_weight())


def test_it_can_be_neither_trained_nor_a_parameter() -> None:
    weight = compressed_linear().weight
    for train in (lambda: weight.requires_grad_(), lambda: setattr(weight, "requires_grad", True)):
        with pytest.raises(UnsupportedFormatError, match="cannot be trained"):
            train()
    with pytest.raises(UnsupportedFormatError, match="cannot be trained"):
        nn.Parameter(weight)
    with pytest.raises(UnsupportedFormatError, match="cannot be made a parameter"):
        nn.Parameter(weight, requires_grad=False)
    weight.requires_grad, weight.grad = False, None  # as it is
    assert nn.Parameter(weight.clone()).requires_grad


def test_its_address_is_refused() -> None:
    """It would be that of memory which is gone by the time it is read."""
    with pytest.raises(UnsupportedFormatError, match="cannot be read by its address"):
        compressed_linear().weight.data_ptr()
    with pytest.raises(UnsupportedFormatError, match="cannot be read by its address"):
        safetensors.torch.save({"weight": compressed_linear().weight})
    assert safetensors.torch.save({"weight": compressed_linear().weight.clone()})


# Compiled ------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Model code that reads what a weight is, and what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = compressed_linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight
        if x.shape[-1] != self.layer.weight.shape[1] or weight.device != x.device:
            return x
        return self.layer(x.to(self.layer.weight.dtype)) + functional.linear(x, weight)


def test_inside_the_compiler() -> None:
    torch._dynamo.reset()
    model = Reader()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), model(X))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    model = Reader()
    with recorded_warnings():
        program = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(program.module()(X), model(X))
