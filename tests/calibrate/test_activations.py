"""The pass of calibration data through a model: what it finds, what it leaves behind, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from compressed_format.calibrate import calibrate_activations, needs_calibration
from compressed_format.config import QuantizationArgs, QuantizationScheme
from compressed_format.errors import CalibrationError

STATIC = QuantizationArgs(num_bits=8, strategy="tensor")
ASYMMETRIC = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=False)
DYNAMIC = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)


def scheme(input: QuantizationArgs | None = None, output: QuantizationArgs | None = None) -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=8, strategy="channel")
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=input, output_activations=output)


class Model(nn.Module):
    """Two linear layers that multiply by 2 and 4, one that nothing reaches, and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unreached = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.first.weight.copy_(2 * torch.eye(4))
            self.second.weight.copy_(4 * torch.eye(4))

    def forward(self, input: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
        return self.second(input=self.dropout(self.first(input + offset)))


@pytest.fixture
def model() -> Model:
    return Model()


def calibrate(model: Model, calibration: Any, **schemes: QuantizationScheme) -> dict[str, dict[str, torch.Tensor]]:
    modules = {name: (model.get_submodule(name), found) for name, found in schemes.items()}
    return calibrate_activations(model, modules, calibration)


def test_only_static_activations_need_calibration() -> None:
    assert not needs_calibration(scheme())
    assert not needs_calibration(scheme(DYNAMIC, DYNAMIC))
    assert needs_calibration(scheme(STATIC))
    assert needs_calibration(scheme(DYNAMIC, STATIC))


def test_inputs_and_outputs_have_scales(model: Model) -> None:
    data = [torch.tensor([[1.0, -127.5, 0.0, 3.0]]), torch.tensor([[255.0, 0.0, 0.0, 0.0]])]
    scales = calibrate(model, data, first=scheme(STATIC, STATIC), second=scheme(STATIC, ASYMMETRIC))
    found = {name: {key: value.tolist() for key, value in values.items()} for name, values in scales.items()}
    assert found == {
        "first": {"input_scale": [2.0], "output_scale": [4.0]},
        # Outputs from -1020 to 2040 in 255 steps of 12: zero is step 85.
        "second": {"input_scale": [4.0], "output_scale": [12.0], "output_zero_point": [-128 + 85]},
    }


def test_dynamic_ends_have_none(model: Model) -> None:
    scales = calibrate(model, [torch.ones(1, 4)], first=scheme(DYNAMIC, STATIC), second=scheme(DYNAMIC))
    assert list(scales) == ["first"]
    assert list(scales["first"]) == ["output_scale"]


def test_static_groups(model: Model) -> None:
    groups = QuantizationArgs(num_bits=8, strategy="group", group_size=2, symmetric=False)
    data = [torch.tensor([[[-55.0, 200.0, 0.0, 25.5], [0.0, 1.0, 51.0, 0.0]]])]
    scales = calibrate(model, data, first=scheme(groups))
    torch.testing.assert_close(scales["first"]["input_scale"], torch.tensor([1.0, 0.2]))
    assert scales["first"]["input_zero_point"].tolist() == [-73, -128]


@pytest.mark.parametrize(
    "batch",
    [
        torch.full((1, 4), 127.5),
        (torch.full((1, 4), 127.5),),
        [torch.full((1, 4), 127.5)],
        {"input": torch.full((1, 4), 127.5)},
        {"input": torch.full((1, 4), 100.0), "offset": 27.5},
        (torch.full((1, 4), 100.0), 27.5),
    ],
)
def test_ways_of_calling_the_model(model: Model, batch: Any) -> None:
    assert calibrate(model, [batch], first=scheme(STATIC))["first"]["input_scale"].tolist() == [1.0]


def test_the_model_is_calibrated_in_evaluation_mode_without_gradients(model: Model) -> None:
    """Dropout would double half of the values."""
    seen = []
    model.second.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    scales = calibrate(model.train(), [torch.full((1, 4), 127.5)], second=scheme(None, STATIC))
    assert scales["second"]["output_scale"].tolist() == [8.0]
    assert seen == [False]


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_modules_are_left_as_they_were(model: Model, mode: str, fails: bool) -> None:
    model.train(mode != "eval")
    if mode == "mixed":
        model.dropout.eval()
    before = {name: module.training for name, module in model.named_modules()}

    def data() -> Iterator[torch.Tensor]:
        yield torch.ones(1, 4)
        if fails:
            raise RuntimeError("out of data")

    if fails:
        with pytest.raises(RuntimeError, match="out of data"):
            calibrate(model, data(), first=scheme(STATIC))
    else:
        calibrate(model, data(), first=scheme(STATIC))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_taken_back_if_a_later_observer_is_unknown(model: Model) -> None:
    unknown = QuantizationArgs(num_bits=8, strategy="tensor", observer="histogram")
    with pytest.raises(CalibrationError, match=r"^second: the observer 'histogram' is not known"):
        calibrate(model, [torch.ones(1, 4)], first=scheme(STATIC), second=scheme(unknown))
    assert not any(module._forward_hooks for module in model.modules())


def test_every_module_without_scales_is_listed_once(model: Model) -> None:
    data = [torch.ones(1, 4), torch.full((1, 4), torch.nan), torch.full((1, 4), torch.nan)]
    schemes = {"first": scheme(STATIC, STATIC), "unreached": scheme(STATIC)}
    with pytest.raises(CalibrationError, match=r"^static activation scales could not be found:") as caught:
        calibrate(model, data, **schemes)
    assert [(problem.place, problem.message) for problem in caught.value.problems] == [
        ("first input", "the calibration data leads to NaN or infinity"),
        ("first output", "the calibration data leads to NaN or infinity"),
        ("unreached input", "no calibration input reached it"),
    ]


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data(model: Model, data: Any) -> None:
    with pytest.raises(CalibrationError, match="calibration yielded no input"):
        calibrate(model, data, first=scheme(STATIC))


def test_a_group_size_that_does_not_divide(model: Model) -> None:
    groups = QuantizationArgs(num_bits=8, strategy="group", group_size=3)
    with pytest.raises(
        CalibrationError, match=r"first input: its group_size 3 does not divide the 4 values of a token"
    ):
        calibrate(model, [torch.ones(3, 4)], first=scheme(groups))
