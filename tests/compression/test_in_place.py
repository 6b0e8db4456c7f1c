"""``compress`` and ``decompress``: what they replace, what they leave, and what they refuse beforehand."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as PeerConfig
from compressed_tensors.quantization import apply_quantization_config
from torch import nn
from torch.nn.utils import parametrizations, prune

from compressed_format import (
    CompressedEmbedding,
    CompressedLinear,
    QuantizationConfig,
    compress,
    decompress,
)
from compressed_format.compression.attached_config import config_of
from compressed_format.config import PRESETS, CompressionFormat, QuantizationArgs
from compressed_format.errors import (
    CalibrationError,
    CompressedFormatError,
    CompressedFormatWarning,
    ConfigError,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
)
from compressed_format.modules.base import compressed_modules
from compressed_format.quantization import dequantize, quantize
from tests.checks import FLOATS, assert_same_bits, assert_same_tensors
from tests.models import Nested, Words, recorded_warnings, seeded, weights
from tests.modules.test_linear import CASES, COLUMNS, FEW, ROWS, dense_weight, linear_of
from tests.modules.test_linear import config_of as config_of_case

INT8 = {"num_bits": 8, "strategy": "channel"}
STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


def config(*targets: str, **group: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": list(targets or ["Linear"]), "weights": INT8, **group}}}


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linears of the given widths, one after another."""
    torch.manual_seed(0)
    widths = widths or (8, 12, 8)
    return nn.Sequential(*[nn.Linear(columns, rows, bias=bias) for columns, rows in pairwise(widths)])


class Watched:
    """What must not change when a call fails: objects, tensors, modes and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
        self.modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        self.parameters = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
        self.hooks = [len(module._forward_hooks) for module in model.modules()]

    def assert_untouched(self) -> None:
        after = Watched(self.model)
        assert after.modules == self.modules
        assert after.parameters == self.parameters
        assert after.hooks == self.hooks
        assert_same_tensors(after.state, self.state)
        assert config_of(self.model) is None


def refused(model: nn.Module, *arguments: Any, **options: Any) -> CompressedFormatError:
    """The error of a ``compress`` that fails and leaves the model as it was."""
    watched = Watched(model)
    with pytest.raises(CompressedFormatError) as caught:
        compress(model, *arguments, **options)
    watched.assert_untouched()
    return caught.value


# Configs -------------------------------------------------------------------------------------------------------------


def test_config_as_object_mapping_path_and_preset(tmp_path: Path) -> None:
    content = config()
    file = tmp_path / "w8a16.json"
    file.write_text(json.dumps(content))
    expected = QuantizationConfig.from_dict(content)
    for given in (expected, content, file, str(file)):
        model = mlp()
        assert compress(model, given) is model
        assert config_of(model) == expected
        assert all(isinstance(module, CompressedLinear) for module in model)
    for name in ("W4A16", "w4a16", "W4a16"):
        model = compress(mlp(128, 128), name)
        assert model[0].scheme.weights == PRESETS["W4A16"].weights
        assert model[0].format is CompressionFormat.PACK_QUANTIZED


def test_a_file_without_suffix_may_be_named_like_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe").write_text(json.dumps(config()))
    assert isinstance(compress(mlp(), "recipe")[0], CompressedLinear)
    # A preset's name is a preset, whatever lies in the folder.
    Path("W8A8").write_text("no config")
    assert compress(mlp(), "W8A8")[0].scheme.input_activations is not None


@pytest.mark.parametrize(
    "given", [None, 4, 1.5, b"W4A16", ["W4A16"], object(), PRESETS["W4A16"]], ids=lambda given: type(given).__name__
)
def test_what_is_no_config(given: Any) -> None:
    error = refused(mlp(), given)
    assert type(error) is ConfigError
    assert "a config is a QuantizationConfig, a mapping, a path or a preset's name, not " in str(error)


@pytest.mark.parametrize("given", ["", ".", "/", "missing.json", "a\0.json", "x" * 5000, "x" * 5000 + ".json", "a\0"])
def test_paths_that_lead_nowhere(given: str) -> None:
    refused(mlp(), given)


def test_a_misspelt_preset_names_the_nearest() -> None:
    error = refused(mlp(), "W4A61")
    assert type(error) is ConfigError
    assert 'not "W4A61"; did you mean W4A16?' in str(error)


def test_mistakes_in_a_config_are_found_before_the_model_is_looked_at() -> None:
    error = refused(mlp(), config(weights={**INT8, "num_bit": 8}))
    assert type(error) is ConfigError
    assert "config_groups.group_0.weights.num_bit: unknown key, did you mean num_bits?" in str(error)


# What is refused, before the first module is touched -----------------------------------------------------------------


def test_one_error_counts_layers_and_names_fitting_group_sizes() -> None:
    model = nn.Sequential(*[nn.Linear(576, 4) for _ in range(5)], nn.Linear(128, 4), nn.Linear(60, 4))
    error = refused(model, "W4A16")
    assert type(error) is QuantizationError
    assert str(error) == (
        "6 of 7 targeted modules cannot be compressed:\n"
        "  5 modules (0, …): group_size 128 does not divide its 576 input features; group sizes that fit: "
        '96, 64, 48, 32, 16, 8; or use strategy "channel", or list the module in ignore\n'
        "  6: group_size 128 does not divide its 60 input features; no usual group size fits; "
        'or use strategy "channel", or list the module in ignore'
    )


def test_all_reasons_stand_in_one_error() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * input @ self.weight.T

    model = nn.Sequential(
        nn.Linear(16, 16),
        nn.Linear(12, 16),
        Doubled(16, 16),
        nn.Linear(16, 16, device="meta"),
        nn.Linear(16, 16),
        nn.Linear(16, 16).to(torch.float8_e4m3fn),
        nn.Linear(16, 16),
    )
    with torch.no_grad():
        model[4].weight[3, 5] = float("nan")
        model[6].weight[0, 15] = -float("inf")
    error = refused(model, weights(4, strategy="group", group_size=8))
    assert type(error) is QuantizationError
    assert {problem.place: problem.message.partition(";")[0] for problem in error.problems} == {
        "1": "group_size 8 does not divide its 12 input features",
        "2": "Doubled reads the values of its weight in forward, which would be dequantized at every call",
        "3": "its weight is on the meta device or uninitialized and holds no data",
        "4": "its weight holds nan at index [3, 5]",
        "5": "its weight has dtype torch.float8_e4m3fn, expected a float of 16 bits or more",
        "6": "its weight holds -inf at index [0, 15]",
    }
    assert error.message == "6 of 7 targeted modules cannot be compressed:"


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", ["int4 group symmetric", "fp8 2:4", "dense 2:4", "bitmask"])
def test_values_that_are_not_finite(case: str, value: float, dtype: torch.dtype) -> None:
    model = mlp(16, 16, 16).to(dtype)
    with torch.no_grad():
        model[1].weight[7, 3] = value
    error = refused(model, config_of_case(case))
    assert type(error) is QuantizationError
    assert f"1: its weight holds {value} at index [7, 3]" in str(error)


def test_a_range_that_the_dtype_cannot_hold() -> None:
    model = mlp(4, 4, 4).half()
    with torch.no_grad():
        model[1].weight[2] = torch.tensor([60000.0, -60000.0, 0.0, 1.0])
    error = refused(model, config(weights={**INT8, "symmetric": False}))
    assert "1: its weight spans -60000 to 60000, a range that torch.float16 cannot hold" in str(error)
    compress(model, config())  # symmetric codes need half of it


@pytest.mark.parametrize("preset", ["NVFP4", "NVFP4A16", "MXFP4", "MXFP8", "MXFP6A16", "nvfp4"])
def test_presets_that_cannot_be_compressed_yet(preset: str) -> None:
    error = refused(mlp(128, 128, 128), preset)
    assert type(error) is UnsupportedFormatError
    assert "2 of 2 targeted modules cannot be compressed:\n  2 modules (0, …): the format" in str(error)
    assert "cannot be read or written yet" in str(error)


def test_formats_that_are_only_read() -> None:
    content = {**config(weights={"num_bits": 4, "strategy": "channel"}), "format": "marlin-24"}
    written, _ = QuantizationConfig.from_checkpoint({**content, "quant_method": "compressed-tensors"})
    error = refused(mlp(), written)
    assert type(error) is UnsupportedFormatError
    assert "2 modules (0, …): marlin-24 is read, not written" in str(error)


def test_weights_without_data() -> None:
    error = refused(mlp().to("meta"), config())
    assert "2 modules (0, …): its weight is on the meta device or uninitialized and holds no data" in str(error)
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(QuantizationError, match="0: its weight is on the meta device or uninitialized"):
        compress(lazy, config())
    assert isinstance(lazy[0], nn.LazyLinear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_weights_of_no_size(shape: tuple[int, int]) -> None:
    assert "is empty; list it in ignore" in str(refused(mlp(*shape), config()))


def test_a_compressed_model() -> None:
    model = compress(mlp(), config("0"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(QuantizationError, match=r"holds compressed modules already; decompress\(\) it first"):
        compress(model, config())
    assert_same_tensors(model.state_dict(), before)
    assert isinstance(model[0], CompressedLinear)
    assert type(model[1]) is nn.Linear


def test_the_model_itself() -> None:
    layer = nn.Linear(8, 8)
    assert "(the model): cannot be replaced in place, for it is the model itself" in str(refused(layer, config()))
    module = linear_of("int8 channel")
    with pytest.raises(TargetError, match="put it into an nn"):
        decompress(module)
    with pytest.raises(QuantizationError, match="already"):
        compress(module, config())


def test_modules_whose_forward_or_weight_is_their_own() -> None:
    wrapped = nn.Linear(8, 8)
    wrapped.forward = lambda input: input
    assert "its forward has been replaced on the object itself" in str(refused(nn.Sequential(wrapped), config()))
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    assert "its weight is no parameter, but computed" in str(refused(normed, config()))
    pruned = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    assert "its weight is no parameter, but computed" in str(refused(pruned, config()))
    prune.remove(pruned[0], "weight")
    assert isinstance(compress(pruned, config())[0], CompressedLinear)


def test_subclasses_that_only_add_a_name_are_compressed() -> None:
    class Named(nn.Linear):
        pass

    assert isinstance(compress(nn.Sequential(Named(8, 8)), config())[0], CompressedLinear)
    assert isinstance(compress(nn.Sequential(Named(8, 8)), config("Named"))[0], CompressedLinear)


def test_a_class_called_linear_that_is_none() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    error = refused(nn.Sequential(nn.Linear(4, 4), Linear()), config())
    assert "1: Linear is neither torch's Linear nor its Embedding; list it in ignore" in str(error)


def test_embeddings_that_cannot_be_compressed() -> None:
    rewritten = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0))
    assert "0: an Embedding with max_norm rewrites its weight" in str(refused(rewritten, config("Embedding")))
    dynamic = config("Embedding", input_activations={**STATIC, "strategy": "token", "dynamic": True})
    assert "0: an Embedding has indices for inputs" in str(refused(nn.Sequential(nn.Embedding(8, 4)), dynamic))


def test_transposed_layers_of_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(4, 4), nn.Linear(4, 4), conv1d(4, 4))
    error = refused(model, config("Conv1D"))
    assert type(error) is TargetError
    assert [problem.place for problem in error.problems] == ["0", "2"]
    assert "stores its weight transposed and cannot be compressed" in str(error)


def test_schemes_that_no_weight_can_take() -> None:
    unknown = refused(mlp(), config(weights={**INT8, "observer": "median"}))
    assert "2 modules (0, …): the observer 'median' is not known for weights; there are " in str(unknown)
    options = refused(mlp(), config(weights={**INT8, "observer": "mse", "observer_kwargs": {"patience": 5}}))
    assert "patience" in str(options)


def test_a_scheme_is_tried_where_a_module_fits_it() -> None:
    """A group size larger than any layer is a message, not an allocation."""
    error = refused(mlp(), config(weights={"num_bits": 4, "strategy": "group", "group_size": 2**40}))
    assert f"group_size {2**40} does not divide its 8 input features" in str(error)


def test_activation_groups_that_do_not_divide() -> None:
    error = refused(nn.Sequential(nn.Linear(576, 4)), "FP8_BLOCK")
    assert "0: group_size 128 of its input_activations does not divide its 576 input features" in str(error)
    outputs = {"num_bits": 8, "strategy": "group", "group_size": 8, "dynamic": True}
    error = refused(mlp(8, 8, 12), config(output_activations=outputs))
    assert "1: group_size 8 of its output_activations does not divide its 12 output features" in str(error)
    assert "0" not in {problem.place for problem in error.problems}


@pytest.mark.parametrize(
    ("group", "columns", "message"),
    [
        ({"weights": None, "sparsity": "2:4"}, 6, "2:4 sparsity needs a multiple of 4 input features, found 6"),
        ({"weights": {"num_bits": 4, "strategy": "channel"}, "sparsity": "2:4"}, 8, "which pack-quantized has none of"),
        (
            {"weights": {**INT8, "symmetric": False}, "format": "int-quantized", "sparsity": "2:4"},
            8,
            "leaves out values of zero, which asymmetric codes do not keep; use symmetric weights",
        ),
    ],
)
def test_weights_that_cannot_be_sparse(group: dict[str, Any], columns: int, message: str) -> None:
    assert message in str(refused(mlp(columns, 8), config(**group)))


# What is replaced ----------------------------------------------------------------------------------------------------


def test_targets_are_replaced_and_everything_else_stays() -> None:
    model = seeded(Nested)
    head, norm, shift = model.head, model.norm, model.blocks[0].shift
    bias = model.blocks[0].up.bias
    weight = model.blocks[0].up.weight.detach().clone()
    compress(model, weights(8, ignore=("head",)))
    assert model.head is head
    assert model.norm is norm
    assert model.blocks[0].shift is shift
    assert list(compressed_modules(model)) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    up = model.blocks[0].up
    assert up.bias is bias
    assert up.bias.requires_grad
    assert model.blocks[0].down.bias is None
    args = QuantizationArgs(num_bits=8, strategy="channel")
    assert_same_bits(up.weight, dequantize(quantize(weight, args), args))


def test_frozen_biases_stay_frozen() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    compress(model, config())
    assert not model[0].bias.requires_grad
    assert model[1].bias.requires_grad


@pytest.mark.parametrize("dtype", FLOATS)
def test_modules_keep_their_dtype(dtype: torch.dtype) -> None:
    model = compress(mlp().to(dtype), config())
    assert model[0].dtype == model[0].weight.dtype == model[0].bias.dtype == dtype
    assert model(torch.ones(1, 8, dtype=dtype)).dtype == dtype


def test_modes_are_kept() -> None:
    model = mlp().train()
    model[1].eval()
    compress(model, config())
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    decompress(model)
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_hooks_stay_and_their_handles_work() -> None:
    model, seen = mlp(), []
    handles = [
        model[0].register_forward_hook(lambda module, inputs, output: seen.append(("after", module))),
        model[0].register_forward_pre_hook(
            lambda module, inputs, options: seen.append(("before", module)), with_kwargs=True
        ),
        model[0].register_full_backward_hook(lambda module, *gradients: seen.append(("backward", module))),
    ]
    x = torch.ones(2, 8, requires_grad=True)
    for change in (lambda: compress(model, config()), lambda: decompress(model)):
        change()
        seen.clear()
        model(x).sum().backward()
        assert [what for what, _ in seen] == ["before", "after", "backward"]
        assert all(module is model[0] for _, module in seen)
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_shared_modules_stay_shared() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "list": nn.ModuleList([layer, nn.Linear(8, 8)]), "b": layer})
    steps: list[tuple[int, int]] = []
    compress(model, config(), progress=lambda done, total: steps.append((done, total)))
    assert isinstance(model["a"], CompressedLinear)
    assert model["a"] is model["b"] is model["list"][0]
    assert model["a"] is not model["list"][1]
    assert steps == [(1, 2), (2, 2)]
    decompress(model)
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"] is model["list"][0]


def test_progress_counts_modules_that_are_done() -> None:
    model = mlp(8, 8, 8, 8)
    seen: list[tuple[int, int, int]] = []
    compress(
        model,
        config(),
        progress=lambda done, total: seen.append((done, total, len(compressed_modules(model)))),
    )
    assert seen == [(1, 3, 1), (2, 3, 2), (3, 3, 3)]


def test_each_dense_weight_goes_as_soon_as_it_is_replaced() -> None:
    """Memory stays within the dense model and one layer."""
    model = mlp(8, 8, 8, 8, 8)
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    gc.collect()
    gc.disable()
    try:
        compress(
            model,
            config(input_activations=STATIC),
            calibration=[torch.ones(1, 8)],
            progress=lambda done, total: alive.append(sum(weight() is not None for weight in dense)),
        )
    finally:
        gc.enable()
    assert alive == [3, 2, 1, 0]


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    model = mlp()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    decompress(compress(model, config()))
    assert torch.equal(torch.rand(3), expected)


def test_a_config_that_reaches_nothing_is_an_error() -> None:
    model = mlp()
    with pytest.raises(TargetError) as caught:
        compress(model, config("Lineal"))
    assert str(caught.value.problems[0]) == (
        'config_groups.group_0.targets: "Lineal" matches no module; did you mean "Linear"?'
    )
    assert type(model[0]) is nn.Linear


def test_a_target_that_reaches_nothing_is_said() -> None:
    with recorded_warnings() as texts:
        compress(mlp(), config("Linear", "Lineal"))
    assert texts == ['config_groups.group_0.targets: "Lineal" matches no module; did you mean "Linear"?']


def test_a_kv_cache_scheme_is_passed_on_and_said() -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    model = mlp()
    with pytest.warns(CompressedFormatWarning, match="kv_cache_scheme: passed on .* runtimes will use a scale of 1"):
        compress(model, {**config(), "kv_cache_scheme": scheme})
    kept = config_of(model)
    assert kept is not None
    assert kept.kv_cache_scheme is not None


def test_warnings_point_at_the_caller() -> None:
    with pytest.warns(CompressedFormatWarning) as caught:
        compress(mlp(), config("Linear", "Lineal"))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_of_four_prunes_by_magnitude(dtype: torch.dtype) -> None:
    model = mlp(COLUMNS, ROWS).to(dtype)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-1.0, 3.0, 0.5, -2.0])
        weight[1, 4:8] = torch.tensor([2.0, -2.0, 2.0, 1.0])  # of equals, the left ones are kept
        model[0].weight.copy_(weight)
    compress(model, config(weights=None, sparsity="2:4"))
    module = model[0]
    assert (module.format, module.sparsity) == (CompressionFormat.DENSE, CompressionFormat.SPARSE_24_BITMASK)
    pruned = module.weight
    assert pruned[0, :4].tolist() == [0.0, 3.0, 0.0, -2.0]
    assert pruned[1, 4:8].tolist() == [2.0, -2.0, 0.0, 0.0]
    quads, kept = weight.unflatten(-1, (-1, 4)), pruned.unflatten(-1, (-1, 4))
    assert ((kept != 0).sum(dim=-1) == 2).all()
    for quad, left in zip(quads.flatten(0, 1).tolist(), kept.flatten(0, 1).tolist(), strict=True):
        assert sorted(map(abs, quad))[2:] == sorted(abs(value) for value in left if value)
    assert set(module.state_dict()) == {"shape", "compressed", "bitmask", "bias"}


def test_sparsity_comes_before_quantizing() -> None:
    module = linear_of("fp8 2:4")
    assert ((module.weight.unflatten(-1, (-1, 4)) != 0).sum(dim=-1) <= 2).all()
    assert module.state_dict()["compressed"].dtype == torch.float8_e4m3fn
    assert torch.equal(module.weight != 0, (module.weight != 0) & (dense_weight() != 0))


def test_mixed_groups() -> None:
    groups = {
        "attention": {"targets": ["0"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
        "mlp": {"targets": ["re:[12]"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 4}},
    }
    model = compress(mlp(8, 8, 8, 8, 8), {"config_groups": groups, "ignore": ["3"]})
    formats = [getattr(module, "format", None) for module in model]
    packed = CompressionFormat.PACK_QUANTIZED
    assert formats == [CompressionFormat.NAIVE_QUANTIZED, packed, packed, None]


# Ties ----------------------------------------------------------------------------------------------------------------


def weight_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if name.startswith("weight")}


def test_ties_stay_where_both_get_the_same_scheme() -> None:
    model = seeded(Words, bias=True)
    ids = torch.arange(24).reshape(2, 12)
    compress(model, weights(8, "Linear", "Embedding"))
    assert isinstance(model.embed, CompressedEmbedding)
    assert isinstance(model.head, CompressedLinear)
    assert weight_tensors(model.embed).keys() == weight_tensors(model.head).keys()
    for name, value in weight_tensors(model.embed).items():
        assert weight_tensors(model.head)[name] is value
    assert model.head.bias is not None
    assert_same_bits(model.embed.weight, model.head.weight)
    expected = model(ids)
    decompress(model)
    assert model.embed.weight is model.head.weight
    torch.testing.assert_close(model(ids), expected)


def test_ties_stay_across_groups_that_treat_the_weight_alike() -> None:
    activations = {"num_bits": 8, "strategy": "token", "dynamic": True}
    groups = {
        "tables": {"targets": ["Embedding"], "weights": INT8, "format": "int-quantized"},
        "layers": {"targets": ["Linear"], "weights": INT8, "input_activations": activations},
    }
    model = compress(seeded(Words), {"config_groups": groups})
    assert model.head.scheme.input_activations is not None
    assert model.embed.scheme.input_activations is None
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]


def test_tied_layers_have_activation_scales_of_their_own() -> None:
    model = mlp(8, 8, 8, bias=False)
    model[1].weight = model[0].weight
    x = torch.linspace(-1, 1, 8).reshape(1, 8) * 10
    compress(model, config(input_activations=STATIC), calibration=[x])
    assert model[0]._parameters["weight"] is model[1]._parameters["weight"]
    assert model[0].input_scale is not model[1].input_scale
    assert not torch.equal(model[0].input_scale, model[1].input_scale)


def test_broken_ties_are_said() -> None:
    model = seeded(Words)
    model.config = SimpleNamespace(tie_word_embeddings=True)
    before = model.embed.weight
    with recorded_warnings() as texts:
        compress(model, weights(8))
    (text,) = texts
    assert text.startswith("embed, head share one weight, of which head is compressed on its own")
    assert model.embed.weight is before
    assert model.config.tie_word_embeddings is False


def test_ties_with_other_schemes_are_broken_and_said() -> None:
    groups = {
        "tables": {"targets": ["Embedding"], "weights": {"num_bits": 4, "strategy": "channel"}},
        "layers": {"targets": ["Linear"], "weights": INT8},
    }
    model = seeded(Words)
    with pytest.warns(CompressedFormatWarning, match="one weight, of which embed, head is compressed"):
        compress(model, {"config_groups": groups})
    assert not {id(p) for p in model.embed.parameters()} & {id(p) for p in model.head.parameters()}


def test_ties_with_a_parameter_of_another_name_are_said() -> None:
    model = mlp()
    model.register_parameter("kernel", model[0].weight)
    with pytest.warns(CompressedFormatWarning, match="kernel, 0 share one weight, of which 0 is compressed"):
        compress(model, config())


def test_ties_that_stay_do_not_touch_the_model_config() -> None:
    model = seeded(Words)
    model.config = SimpleNamespace(tie_word_embeddings=True)
    compress(model, weights(8, "Linear", "Embedding"))
    assert model.config.tie_word_embeddings is True


# Calibration ---------------------------------------------------------------------------------------------------------


BATCHES = [torch.tensor([[-1.0, 2.0, 0.5, 0.0]]), torch.tensor([[3.0, -5.0, 1.0, 0.25], [0.0, 1.0, -2.0, 4.0]])]


def calibrated(observer: str | None = None, *, calibration: Any = None, **fields: Any) -> CompressedLinear:
    args = {**STATIC, **fields} if observer is None else {**STATIC, "observer": observer, **fields}
    model = mlp(4, 8)
    compress(model, config(input_activations=args), calibration=BATCHES if calibration is None else calibration)
    assert isinstance(model[0], CompressedLinear)
    return model[0]


@pytest.mark.parametrize("observer", [None, "minmax", "static_minmax"])
def test_minmax_by_hand(observer: str | None) -> None:
    module = calibrated(observer)
    # The largest magnitude is 5, and symmetric int8 codes span 255 steps around zero.
    assert_same_bits(module.input_scale.data, torch.tensor([5.0]) / 127.5)
    assert not hasattr(module, "input_zero_point")
    assert not module.input_scale.requires_grad


def test_asymmetric_minmax_by_hand() -> None:
    module = calibrated(symmetric=False)
    # -5 to 4 in 255 steps; zero is the code -128 + 5 / (9 / 255) = 13.67, rounded.
    assert_same_bits(module.input_scale.data, torch.tensor([9.0]) / 255)
    assert module.input_zero_point.tolist() == [14]
    assert module.input_zero_point.dtype == torch.int8


def test_float8_minmax_by_hand() -> None:
    assert_same_bits(calibrated(type="float").input_scale.data, torch.tensor([5.0]) / 448)


def test_groups_by_hand() -> None:
    module = calibrated(strategy="group", group_size=2)
    assert_same_bits(module.input_scale.data, torch.tensor([5.0, 4.0]) / 127.5)


def test_moving_average_by_hand() -> None:
    module = calibrated("moving_average_minmax", observer_kwargs={"momentum": 0.25}, symmetric=False)
    # The first batch spans -1 to 2, the second -5 to 4: a quarter of the way is -2 to 2.5.
    assert_same_bits(module.input_scale.data, torch.tensor([4.5]) / 255)
    # -128 + 2 / (4.5 / 255) = -14.67
    assert module.input_zero_point.tolist() == [-15]
    default = calibrated("moving_average_minmax")
    assert_same_bits(default.input_scale.data, (torch.tensor([2.0]) + 0.01 * (4.0 - 2.0)) / 127.5)


def test_least_error_by_hand() -> None:
    # 2 bits of range [-1.5, 1.5] hold -1, 0 and 1 times a scale of 1.5 / 1.5 = 1: nothing is lost in the range of 1.2,
    # which is 0.8 of the extremes, but for the extreme itself; with it 0.8 rounds to 0.8 instead of 1.
    values = torch.tensor([[0.8] * 30 + [-0.8] * 30 + [1.5, 0.0]])
    model = mlp(62, 4)
    args = {"num_bits": 2, "strategy": "tensor", "observer": "mse", "observer_kwargs": {"maxshrink": 0.5, "grid": 10}}
    compress(model, config(input_activations=args), calibration=[values])
    extreme = calibrated_scale(values, "minmax")
    shrunk = float(model[0].input_scale)
    assert shrunk < extreme

    def error(scale: float) -> float:
        codes = (values / scale).clamp(-2, 1).round()
        return float(((codes * scale - values).abs() ** 2.4).sum())

    candidates = [extreme * (1 - 0.5 * step / 10) for step in range(11)]
    assert shrunk == pytest.approx(min(candidates, key=error))


def calibrated_scale(values: torch.Tensor, observer: str) -> float:
    model = mlp(values.shape[-1], 4)
    args = {"num_bits": 2, "strategy": "tensor", "observer": observer}
    compress(model, config(input_activations=args), calibration=[values])
    return float(model[0].input_scale)


def test_outputs_are_calibrated() -> None:
    model = mlp(4, 8, bias=False)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[2] = torch.tensor([1.0, 0.0, 0.0, 2.0])
    compress(model, config(output_activations=STATIC), calibration=BATCHES)
    # The largest output is 0 + 2 * 4.
    assert_same_bits(model[0].output_scale.data, torch.tensor([8.0]) / 127.5)


def test_layers_see_what_flows_through_the_dense_model() -> None:
    model = mlp(4, 8, 4)
    hidden = model[0](torch.cat(BATCHES)).abs().max().detach()
    compress(model, config(input_activations=STATIC), calibration=BATCHES)
    assert_same_bits(model[1].input_scale.data, hidden.reshape(1) / 127.5)


class Keywords(nn.Module):
    """Takes what it is called with by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        return self.layer(input=self.dropout(x) * scale + shift)


@pytest.mark.parametrize(
    ("batch", "largest"),
    [
        (BATCHES[0], 2.0),
        ((BATCHES[0],), 2.0),
        ([BATCHES[0], 2.0], 4.0),
        ({"x": BATCHES[0]}, 2.0),
        ({"x": BATCHES[0], "shift": 1.0}, 3.0),
    ],
)
def test_calibration_inputs(batch: Any, largest: float) -> None:
    model = Keywords().train()
    model.layer.eval()
    compress(model, config(input_activations=STATIC), calibration=iter([batch]))
    # Dropout was off, or values would have been doubled or dropped.
    assert_same_bits(model.layer.input_scale.data, torch.tensor([largest]) / 127.5)
    assert [model.training, model.dropout.training, model.layer.training] == [True, True, False]
    assert not model.layer._forward_hooks


def test_calibration_records_no_gradients() -> None:
    model, modes = mlp(4, 8), []

    def batches() -> Iterator[torch.Tensor]:
        for batch in BATCHES:
            modes.append((model.training, torch.is_grad_enabled()))
            yield batch

    model.register_forward_hook(lambda module, inputs, output: modes.append((module.training, output.requires_grad)))
    compress(model, config(input_activations=STATIC), calibration=batches())
    assert [training for training, _ in modes] == [False] * 4
    assert [grad for _, grad in modes] == [False] * 4
    assert torch.is_grad_enabled()


def test_static_scales_need_calibration() -> None:
    error = refused(mlp(), "FP8")
    assert type(error) is CalibrationError
    assert str(error) == (
        "2 modules (0, …) have static activation scales, which need data: pass calibration=, an iterable of model "
        "inputs, or make the activations dynamic"
    )
    assert str(refused(mlp(8, 8), "FP8")).startswith("0 has static activation scales, which need data")


def test_dynamic_scales_need_none() -> None:
    def never() -> Iterator[torch.Tensor]:
        raise AssertionError("nothing needs calibration")
        yield

    assert isinstance(compress(mlp(), "FP8_DYNAMIC", calibration=never())[0], CompressedLinear)


def test_calibration_that_yields_nothing() -> None:
    assert "calibration yielded no input" in str(refused(mlp(), "FP8", calibration=[]))


def test_calibration_that_leads_to_nan() -> None:
    error = refused(mlp(), "FP8", calibration=[torch.full((1, 8), float("inf"))])
    assert type(error) is CalibrationError
    assert "0 input: the calibration data leads to NaN or infinity" in str(error)


def test_modules_that_no_input_reaches() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    error = refused(model, "FP8", calibration=BATCHES)
    assert "idle input: no calibration input reached it" in str(error)
    assert "used" not in str(error)


def test_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    model = mlp().train()
    watched = Watched(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compress(model, "FP8", calibration=[torch.zeros(1, 3)])
    watched.assert_untouched()


def test_an_observer_that_there_is_not() -> None:
    error = refused(mlp(), config(input_activations={**STATIC, "observer": "median"}), calibration=[torch.zeros(1, 8)])
    assert type(error) is CalibrationError
    assert "0: the observer 'median' is not known" in str(error)


# decompress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [*FEW, "int5 tensor asymmetric", "int1 group symmetric", "int8 tensor asymmetric"])
def test_decompressing_gives_plain_linears(case: str, dtype: torch.dtype) -> None:
    module = linear_of(case, dtype=dtype)
    weight, bias = module.weight, module.bias
    model = nn.Sequential(module)
    assert decompress(model) is model
    assert type(model[0]) is nn.Linear
    assert_same_bits(model[0].weight.data, weight)
    assert model[0].bias is bias
    assert model[0].weight.requires_grad
    assert (model[0].in_features, model[0].out_features) == (COLUMNS, ROWS)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    x = torch.ones(2, COLUMNS, dtype=dtype)
    assert torch.equal(model(x), nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("case", [case for case in CASES if "g_idx" not in case])
def test_decompressing_embeddings(case: str) -> None:
    table = nn.Embedding(ROWS, COLUMNS, padding_idx=2)
    model = compress(nn.Sequential(table), config_of_case(case, "Embedding"))
    weight = model[0].weight
    decompress(model)
    assert type(model[0]) is nn.Embedding
    assert_same_bits(model[0].weight.data, weight)
    assert model[0].padding_idx == 2


def test_decompressing_forgets_the_config_and_can_be_done_again() -> None:
    model = compress(mlp(), config())
    decompress(model)
    assert config_of(model) is None
    before = Watched(model)
    assert decompress(model) is model
    before.assert_untouched()
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decompress(compress(model, config()))
    # Each row's largest magnitude is a code of its own, or clipped to the next: twice changes little, and no shapes.
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=0, atol=0.02)


def test_a_decompressed_model_trains() -> None:
    model = decompress(compress(mlp(), config()))
    model(torch.ones(1, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_decompressed_model_serves_the_peer() -> None:
    model = decompress(compress(mlp(), config()))
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    expected = model(x)
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    apply_quantization_config(model, PeerConfig(config_groups={"group_0": scheme}, quantization_status="initialized"))
    assert model[0].quantization_scheme.weights.num_bits == 8
    assert model[0].weight_scale.shape == (12, 1)
    assert model(x).shape == expected.shape


def test_a_decompressed_transformers_model_forgets_that_it_was_quantized() -> None:
    removed = []

    class Quantizer:
        def remove_quantization_config(self, model: nn.Module) -> None:
            removed.append(model)

    model = compress(mlp(), config())
    model.hf_quantizer = Quantizer()
    assert decompress(model) is model
    assert removed == [model]


def test_casting_before_decompressing_decides_the_dtype() -> None:
    model = compress(mlp(), config())
    expected = model[0].weight.to(torch.bfloat16)
    decompress(model.to(torch.bfloat16))
    assert_same_bits(model[0].weight.data, expected)


@pytest.mark.parametrize("case", [case for case in CASES if "g_idx" not in case])
def test_a_default_device_changes_nothing(case: str) -> None:
    """Every tensor is made where the weight is, not where a program makes its own."""
    compressed, model = linear_of(case), nn.Sequential(nn.Linear(COLUMNS, ROWS))
    model[0].weight, model[0].bias = nn.Parameter(dense_weight()), compressed.bias
    with torch.device("meta"):
        compress(model, config_of_case(case))
        model(torch.ones(2, COLUMNS, device="cpu"))
    assert_same_tensors(model[0].state_dict(), compressed.state_dict())
