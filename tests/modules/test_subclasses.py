"""Linear and Embedding classes with a forward of their own: they run packed as they did, or are refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressed_format import (
    CompressedEmbedding,
    CompressedLinear,
    QuantizationError,
    compress,
    decompress,
    load_compressed,
    ops,
    save_compressed,
)
from compressed_format.errors import UnsupportedFormatError
from tests.checks import assert_same_bits, assert_same_tensors
from tests.models import seeded, weights

IDS = torch.arange(12).reshape(3, 4)
BOTH = weights(8, "Linear", "Embedding")


class Scaled(nn.Embedding):
    """As Gemma's: a factor that is a buffer, cast to the dtype of the weight."""

    def __init__(self, rows: int, columns: int, scale: float = 3.0) -> None:
        super().__init__(rows, columns, padding_idx=1)
        self.scale_as_float = scale
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Shifted(Scaled):
    """Its super().forward is one of those that compute something themselves; it looks itself up through a method."""

    offset = 2

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.norm = nn.LayerNorm(columns)

    @property
    def shift(self) -> int:
        return self.offset

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(ids.shape[-1], device=self.weight.device).expand(ids.shape)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.weight.size(0) < self.shift or self.training:
            return ids
        return self.norm(super().forward(self.positions(ids) + self.shift))


class Gated(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.register_buffer("gate", torch.linspace(0, 1, rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super(Gated, self).forward(x) * self.gate + self.bias  # noqa: UP008


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(16, 8)
        self.shifted = Shifted(16, 8)
        self.gated = Gated(8, 6)
        self.plain = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.plain(self.gated(self.scaled(ids) + self.shifted(ids)))


def rounded(model: nn.Module) -> nn.Module:
    """The same model with dense weights as they are in ``model``, built by the classes' own constructors."""
    dense = type(model)().eval()
    dense.load_state_dict({**model.state_dict(), **{
        f"{name}.weight": module.dequantized_weight()
        for name, module in model.named_modules() if isinstance(module, (CompressedLinear, CompressedEmbedding))
    }}, strict=False)  # fmt: skip
    return dense


@pytest.fixture
def no_dequantization(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a weight has been dequantized")

    monkeypatch.setattr(ops, "dequantize", fail)


def test_they_compute_what_they_did() -> None:
    model = seeded(Model)
    dense = model(IDS)
    compress(model, BOTH)
    assert isinstance(model.scaled, Scaled)
    assert isinstance(model.scaled, CompressedEmbedding)
    assert isinstance(model.gated, CompressedLinear)
    expected = rounded(model)(IDS)
    assert not torch.equal(expected, dense)
    torch.testing.assert_close(model(IDS), expected)
    torch.testing.assert_close(model(IDS), dense, rtol=0.05, atol=0.05)


def test_from_the_packed_tensors(no_dequantization: None) -> None:
    model = compress(seeded(Model), BOTH)
    model(IDS)
    assert not [name for name in model.state_dict() if name.startswith("gated.weight") and name.endswith("weight")]


def test_attributes_buffers_and_children_are_kept() -> None:
    model = seeded(Model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    buffers, norm, gate = dict(model.named_buffers()), model.shifted.norm, model.gated.gate
    model.scaled.note = "kept"
    compress(model, BOTH)
    assert (model.scaled.note, model.scaled.scale_as_float, model.scaled.padding_idx) == ("kept", 3.0, 1)
    assert model.shifted.norm is norm
    assert model.gated.gate is gate
    assert {name: id(value) for name, value in model.named_buffers()} == {n: id(b) for n, b in buffers.items()}
    assert "scaled.scale" not in model.state_dict()
    assert "gated.gate" in model.state_dict()
    decompress(model)
    assert [type(module) for module in model.children()] == [Scaled, Shifted, Gated, nn.Linear]
    before["scaled"].add("note")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.shifted.norm is norm
    assert_same_tensors(dict(model.named_buffers()), buffers)


def test_decompressed_they_are_what_they_were() -> None:
    model = compress(seeded(Model), BOTH)
    expected, dense = model(IDS), rounded(model)
    assert_same_tensors(decompress(model).state_dict(), dense.state_dict())
    torch.testing.assert_close(model(IDS), expected)


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    model = compress(seeded(Model), BOTH)
    if how in ("deepcopy", "copy"):
        twin = getattr(copy, how)(model.scaled)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model.scaled))
    else:
        file = io.BytesIO()
        torch.save(model.scaled, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(model.scaled)
    assert twin is not model.scaled
    assert_same_tensors(twin.state_dict(), model.scaled.state_dict())
    assert torch.equal(twin(IDS), model.scaled(IDS))


def test_casting_reaches_the_buffers() -> None:
    model = compress(seeded(Model), BOTH).to(torch.bfloat16)
    assert model.scaled.scale.dtype is model.gated.gate.dtype is torch.bfloat16
    assert model.scaled(IDS).dtype is model(IDS).dtype is torch.bfloat16
    assert model.gated.weight_scale.dtype is torch.float32


def test_compiled() -> None:
    torch._dynamo.reset()
    model = compress(seeded(Model), BOTH)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS), model(IDS))


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Also by a target that is the name of such a class."""
    model = compress(seeded(Model), weights(8, "Scaled", "Gated"))
    assert type(model.plain) is nn.Linear
    assert isinstance(model.shifted, CompressedEmbedding)
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=Model().eval())
    assert type(loaded.scaled) is type(model.scaled)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_bits(loaded(IDS), model(IDS))
    save_compressed(loaded, tmp_path / "y")
    assert (tmp_path / "x" / "config.json").read_text() == (tmp_path / "y" / "config.json").read_text()


def test_a_class_that_only_has_a_name_is_given_back() -> None:
    class Named(nn.Linear):
        pass

    model = compress(nn.Sequential(Named(8, 8)), weights(8, "Named"))
    assert type(model[0]).__name__ == "CompressedNamed"
    assert type(decompress(model)[0]) is Named


# What cannot run packed ----------------------------------------------------------------------------------------------


class Functional(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class Inherited(Functional):
    pass


class Slices(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[: ids.shape[1]]


class InAMethod(nn.Linear):
    def normed(self) -> torch.Tensor:
        return self.weight / self.weight.norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (x @ self.normed().T)


class InAProperty(nn.Linear):
    @property
    def dense(self) -> torch.Tensor:
        return self.weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense.T


class OverriddenMethod(Shifted):
    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + int(self.weight.sum())


class Named(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ getattr(self, "weight").T  # noqa: B009


class BaseCalled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, x) + 1


class Stored(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._parameters["weight"])


class Listed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, *self.parameters())


class Replaces(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight = nn.Parameter(self.weight.data)
        return super().forward(x)


class PastItself(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, super().get_parameter("weight"))


def doubled(function: Any) -> Any:
    return lambda self, x: 2 * function(self, x)


class Decorated(nn.Linear):
    @doubled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Lambda(nn.Linear):
    forward = lambda self, x: x @ self.weight.T  # noqa: E731


class OwnWeight(nn.Linear):
    def quantized_weight(self) -> torch.Tensor:
        return self.weight


class WithAParameter(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(1))


class WithAFormat(nn.Linear):
    format = "mine"


class WithADtype(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dtype = "mine"


exec("class Unread(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)\n")

DENSE = "reads the values of its weight in {}, which would be dequantized at every call; list it in ignore"
REFUSED = {
    Functional: f"Functional {DENSE.format('forward')}",
    Inherited: f"Functional {DENSE.format('forward')}",
    Slices: f"Slices {DENSE.format('forward')}",
    InAMethod: f"InAMethod {DENSE.format('normed')}",
    InAProperty: f"InAProperty {DENSE.format('dense')}",
    OverriddenMethod: f"OverriddenMethod {DENSE.format('positions')}",
    Named: "Named passes itself on in forward, to what may read its weight; list it in ignore",
    BaseCalled: "BaseCalled passes itself on in forward, to what may read its weight; list it in ignore",
    Stored: "Stored uses _parameters in forward, which may read its weight; list it in ignore",
    Listed: "Listed uses parameters in forward, which may read its weight; list it in ignore",
    Replaces: "Replaces sets its weight in forward; list it in ignore",
    PastItself: "PastItself reaches past its own class in forward for something else than forward; list it in ignore",
    Decorated: "Decorated computes something of its own in <lambda>, which is no plain method; list it in ignore",
    Lambda: "Lambda computes something of its own in <lambda>, which is no plain method; list it in ignore",
    OwnWeight: "OwnWeight has quantized_weight of its own, which a compressed module needs for itself; "
    "list it in ignore",
    WithAParameter: "it holds parameters besides its weight and bias: gain; list it in ignore",
    WithAFormat: "WithAFormat has format of its own, which a compressed module needs for itself; list it in ignore",
    WithADtype: "it has attributes that a compressed module needs for itself: dtype; list it in ignore",
    locals()["Unread"]: "Unread computes something of its own in forward, whose source cannot be read; "
    "list it in ignore",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_reads_its_weight_is_refused_by_name(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(16, 8))
    target = "Linear" if isinstance(model[0], nn.Linear) else "Embedding"
    with pytest.raises(QuantizationError) as caught:
        compress(model, weights(8, target))
    assert [problem.message for problem in caught.value.problems] == [REFUSED[kind]]
    assert type(model[0]) is kind


@pytest.mark.parametrize("kind", [Functional, Slices, WithAParameter])
def test_a_checkpoint_that_has_it_packed_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    plain = nn.Linear if issubclass(kind, nn.Linear) else nn.Embedding
    target = plain.__name__
    save_compressed(compress(nn.Sequential(plain(16, 8)), weights(8, target)), tmp_path / "x")
    with pytest.raises(UnsupportedFormatError) as caught:
        load_compressed(tmp_path / "x", model=nn.Sequential(kind(16, 8)))
    (problem,) = caught.value.problems
    assert problem.place == "0"
    assert problem.message == REFUSED[kind].removesuffix("; list it in ignore")


def test_a_checkpoint_written_for_the_plain_class_gets_the_forward_of_the_model(tmp_path: Path) -> None:
    model = compress(nn.Sequential(nn.Embedding(16, 8, padding_idx=1)), weights(8, "Embedding"))
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=nn.Sequential(Scaled(16, 8)))
    torch.testing.assert_close(loaded(IDS), 3 * model(IDS))
