"""ModuleTable says what torch says of a model's modules and tensors, and replaces in every place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressed_format.modules.module_table import ModuleTable


class Shared(nn.Module):
    """A layer under two names with children of its own, a tied weight, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.again = self.first
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.first[0].weight
        self.register_buffer("stored", torch.zeros(1))
        self.register_buffer("computed", torch.zeros(1), persistent=False)
        self.register_parameter("absent", None)


class Renaming(nn.Linear):
    """A layer that has other names in a state dict."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}kernel"] = self.weight


def with_hook() -> nn.Module:
    model = Shared()
    model.first.register_state_dict_post_hook(lambda module, state, prefix, _: state.__delitem__(f"{prefix}0.bias"))
    return model


@pytest.mark.parametrize("make", [Shared, with_hook, lambda: nn.Sequential(Renaming(2, 2)), lambda: nn.Linear(2, 2)])
def test_it_lists_what_torch_lists(make: Any) -> None:
    model = make()
    table = ModuleTable(model)
    assert list(table.named_modules()) == list(model.named_modules())
    expected = model.state_dict(keep_vars=True)
    state = table.state()
    assert list(state) == list(expected)
    assert all(state[name] is value for name, value in expected.items())
    buffers = dict(model.named_buffers())
    assert {name: id(value) for name, value in table.named_buffers()} == {name: id(v) for name, v in buffers.items()}


def test_a_module_is_replaced_under_all_its_names() -> None:
    model = Shared()
    table = ModuleTable(model)
    assert table.names("first") == ["first", "again"]
    assert not table.is_first_name("again")
    successor = nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    table.replace("first", successor)
    assert model.first is model.again is successor
    assert table["again.1"] is table["first.1"] is successor[1]
    inner = nn.Linear(4, 4)
    table.replace("head", inner)
    assert model.head is inner
    with pytest.raises(KeyError):
        table.replace("again", inner)
