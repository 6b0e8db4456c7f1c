"""What each consumer minds: the matrix of schemes and consumers, and each rule at its boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from frozendict import frozendict

from compressed_format import QuantizationConfig
from compressed_format.checking import CODES, CONSUMERS, LayerShape, consumer_findings
from compressed_format.config import PRESETS

NAMES = tuple(CONSUMERS)

DENSE: Mapping[str, LayerShape] = frozendict(
    {
        **{
            f"model.layers.0.{name}": LayerShape(shape)
            for name, shape in (
                ("self_attn.q_proj", (4096, 4096)),
                ("self_attn.k_proj", (1024, 4096)),
                ("self_attn.v_proj", (1024, 4096)),
                ("self_attn.o_proj", (4096, 4096)),
                ("mlp.gate_proj", (8192, 4096)),
                ("mlp.up_proj", (8192, 4096)),
                ("mlp.down_proj", (4096, 8192)),
            )
        },
        "model.embed_tokens": LayerShape((32000, 4096), ("Embedding",)),
        "lm_head": LayerShape((32000, 4096)),
    }
)
EXPERTS: Mapping[str, LayerShape] = frozendict(
    {
        **{name: layer for name, layer in DENSE.items() if ".mlp." not in name},
        **{
            f"model.layers.0.mlp.experts.{expert}.{name}": LayerShape(shape)
            for expert in range(2)
            for name, shape in (("gate_proj", (2048, 4096)), ("up_proj", (2048, 4096)), ("down_proj", (4096, 2048)))
        },
        "model.layers.0.mlp.gate": LayerShape((8, 4096)),
    }
)


def config(**group: Any) -> QuantizationConfig:
    ignore = group.pop("ignore", ["lm_head", "re:.*mlp.gate$"])
    fields = {name: group.pop(name) for name in ("transform_config", "kv_cache_scheme") if name in group}
    groups = {"g": {"targets": ["Linear"], **group}}
    return QuantizationConfig.from_dict({"config_groups": groups, "ignore": ignore, **fields})


def errors(
    config: QuantizationConfig, consumer: str, layers: Mapping[str, LayerShape] = DENSE, **more: Any
) -> list[str]:
    """The codes of the errors of one consumer, which all belong to it."""
    return codes(config, consumer, layers, "error", **more)


def codes(
    config: QuantizationConfig, consumer: str, layers: Mapping[str, LayerShape], severity: str, **more: Any
) -> list[str]:
    found = consumer_findings(config, layers, [consumer], **more)
    title = {CODES[finding.code].consumer for finding in found}
    assert len(title) <= 1
    assert all(finding.message.startswith(f"{name}: ") for finding in found for name in title)
    return [finding.code for finding in found if finding.severity == severity]


# Errors by preset for vLLM, SGLang, transformers and llama.cpp: ordinary layers, and experts.
LOADS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = frozendict(
    {
        "W4A16": (("", "", "", ""), ("", "", "", "")),
        "W8A16": (("", "", "", ""), ("", "", "", "")),
        "W2A16": (("", "CF504", "", ""), ("", "CF504", "", "")),
        "W3A16": (("", "CF504", "", "CF703"), ("", "CF504", "", "CF703")),
        "W4A16_ASYM": (("", "", "CF601", ""), ("", "", "CF601", "")),
        "W8A8": (("", "", "", ""), ("", "CF505", "CF604", "")),
        "W4A8": (("", "CF504", "", ""), ("", "CF504", "", "")),
        "W4AFP8": (("", "CF504", "", ""), ("", "CF504", "", "")),
        "W4A4": (("CF403", "CF504", "", ""), ("CF403", "CF504", "", "")),
        "FP8": (("", "", "", "CF702"), ("", "", "", "CF702")),
        "FP8_DYNAMIC": (("", "", "", ""), ("", "", "", "")),
        "FP8_BLOCK": (("", "", "", ""), ("", "", "CF604", "")),
        "NVFP4": (("", "", "", ""), ("", "", "CF604", "")),
        "MXFP4": (("", "CF504", "", "CF704"), ("", "CF504", "", "CF704")),
        "MXFP6A16": (("CF403", "CF504", "", "CF704"), ("CF403", "CF504", "", "CF704")),
        "MXFP8": (("", "CF504", "", "CF704"), ("", "CF504", "CF604", "CF704")),
    }
)


@pytest.mark.parametrize("preset", LOADS)
@pytest.mark.parametrize("experts", [False, True])
def test_where_presets_load(preset: str, experts: bool) -> None:
    """Attention is ordinary where experts are: what ordinary layers mind stays."""
    plain = QuantizationConfig(
        config_groups={"g": PRESETS[preset]}, ignore=("lm_head", "re:.*mlp.gate$", "model.embed_tokens")
    )
    found = [set(errors(plain, name, EXPERTS if experts else DENSE)) for name in NAMES]
    assert found == [{code} - {""} for code in LOADS[preset][experts]]


INT4 = frozendict({"num_bits": 4, "group_size": 128})
BYTES = frozendict({"strategy": "channel"})
FLOAT8 = frozendict({"type": "float", "strategy": "channel"})
TOKEN = frozendict({"strategy": "token", "dynamic": True})
FLOAT8_TOKEN = frozendict({**TOKEN, "type": "float"})
BLOCK = frozendict({"type": "float", "strategy": "block", "block_structure": [128, 128]})


@pytest.mark.parametrize(
    ("consumer", "code", "group"),
    [
        ("vllm", "CF403", {"weights": {"num_bits": 4, "strategy": "tensor"}}),
        ("vllm", "CF403", {"weights": {"num_bits": 1, "group_size": 128}}),
        ("vllm", "CF403", {"weights": {**INT4, "num_bits": 5, "symmetric": False}}),
        ("vllm", "CF403", {"weights": {**INT4, "group_size": 64}, "input_activations": FLOAT8_TOKEN}),
        ("vllm", "CF403", {"weights": {**INT4}, "input_activations": TOKEN, "format": "int-quantized"}),
        ("vllm", "CF403", {"weights": {**BYTES, "symmetric": False}, "input_activations": TOKEN}),
        ("vllm", "CF403", {"weights": {"group_size": 128}, "input_activations": TOKEN}),
        ("vllm", "CF403", {"weights": {**FLOAT8, "symmetric": False}, "input_activations": FLOAT8_TOKEN}),
        ("vllm", "CF403", {"weights": {"type": "float", "group_size": 128}, "input_activations": FLOAT8_TOKEN}),
        ("vllm", "CF403", {"weights": BLOCK, "input_activations": FLOAT8_TOKEN}),
        ("vllm", "CF403", {"weights": FLOAT8, "input_activations": {"type": "float", "symmetric": False}}),
        ("vllm", "CF404", {"weights": BYTES, "format": "int-quantized"}),
        ("vllm", "CF404", {"weights": BYTES, "format": "naive-quantized"}),
        ("vllm", "CF410", {"targets": ["Linear", "Embedding"], "weights": {**INT4, "symmetric": False}}),
        ("vllm", "CF411", {"weights": INT4, "kv_cache_scheme": {"num_bits": 8}}),
        ("sglang", "CF504", {"weights": {"num_bits": 4, "group_size": 16}}),
        ("sglang", "CF504", {"weights": BYTES, "format": "int-quantized"}),
        ("sglang", "CF512", {"targets": ["Linear", "Embedding"], "weights": INT4}),
        ("sglang", "CF503", {"weights": INT4, "ignore": []}),
        ("sglang", "CF502", {"weights": INT4, "targets": ["re:.*_proj$"], "ignore": ["re:.*o_proj", "x"],
                             "layers": {"model.extra": LayerShape((64, 64))}}),
        ("transformers", "CF603", {"targets": ["Linear", "Embedding"], "weights": INT4}),
        ("llama.cpp", "CF702", {"weights": {"num_bits": 4, "strategy": "channel"}}),
        ("llama.cpp", "CF703", {"weights": {"num_bits": 1, "group_size": 128}}),
        ("llama.cpp", "CF704", {"weights": INT4, "input_activations": TOKEN, "format": "int-quantized"}),
    ],
)  # fmt: skip
def test_what_does_not_load(consumer: str, code: str, group: dict[str, Any]) -> None:
    layers = {**DENSE, **group.pop("layers", {})}
    assert set(errors(config(**group), consumer, layers)) == {code}


@pytest.mark.parametrize(("consumer", "code"), list(zip(NAMES, ["CF401", "CF501", "CF606", "CF704"], strict=True)))
def test_sparse_checkpoints(consumer: str, code: str) -> None:
    sparse = config(weights=FLOAT8, input_activations=FLOAT8_TOKEN, sparsity="2:4")
    assert errors(sparse, consumer) == [code]


@pytest.mark.parametrize(
    ("location", "expected"),
    [("weight_input", [[], [], [], []]), ("input", [[], ["CF509"], ["CF607"], ["CF707"]]),
     ("k_cache", [["CF412"], ["CF509"], ["CF607"], ["CF707"]])],
)  # fmt: skip
def test_rotations(location: str, expected: list[list[str]]) -> None:
    transform = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}
    rotated = config(weights=INT4, transform_config={"config_groups": {"R": transform}})
    assert [errors(rotated, name) for name in NAMES] == expected
    assert ("CF413" in codes(rotated, "vllm", DENSE, "warning")) == (location == "input")


def test_activation_order() -> None:
    weights = {**INT4, "strategy": "group", "actorder": "group"}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    ordered, _ = QuantizationConfig.from_checkpoint({"config_groups": groups, "ignore": ["lm_head"]})
    assert [errors(ordered, name) for name in NAMES] == [["CF402"], [], ["CF602"], ["CF705"]]


@pytest.mark.parametrize(
    ("group", "shape", "expected"),
    [
        ({"weights": INT4}, (128, 8192), []),
        ({"weights": INT4}, (128, 8192 + 64), ["CF406"]),
        ({"weights": INT4, "input_activations": FLOAT8_TOKEN}, (128, 1024), []),
        ({"weights": INT4, "input_activations": FLOAT8_TOKEN}, (64, 1024), ["CF406"]),
        ({"weights": BLOCK}, (192, 1024), ["CF406"]),
        ({"weights": BLOCK}, (256, 1000), []),
    ],
)
def test_sizes_for_vllm(group: dict[str, Any], shape: tuple[int, int], expected: list[str]) -> None:
    layers = {f"model.layers.0.mlp.{name}": LayerShape(shape) for name in ("gate_proj", "up_proj")}
    assert errors(config(**group), "vllm", layers) == expected


def test_the_last_of_fused_layers_may_end_within_a_block() -> None:
    layers = {"a.gate_proj": LayerShape((256, 128)), "a.up_proj": LayerShape((192, 128))}
    assert errors(config(weights=BLOCK), "vllm", layers) == []


@pytest.mark.parametrize(("columns", "gpus"), [(128 * 3, 2), (128 * 6, 4), (128 * 12, 8), (128 * 8, None)])
def test_splitting_over_gpus(columns: int, gpus: int | None) -> None:
    layers = {"a.down_proj": LayerShape((128, columns)), "a.up_proj": LayerShape((128, 128 * 3))}
    found = consumer_findings(config(weights=INT4), layers, ["vllm"])
    assert [(finding.code, finding.place) for finding in found] == ([] if gpus is None else [("CF407", "a.down_proj")])
    assert gpus is None or f"over {gpus} GPUs" in found[0].message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("down_proj", (100, 128 * 6), "768 columns over 4 GPUs cut a block of 128"),
        ("down_proj", (100, 128 * 8), None),
        ("gate_proj", (128 * 3, 100), "384 rows over 2 GPUs cut a block of 128"),
        ("gate_proj", (128 * 8, 100), None),
        ("k_proj", (128, 100), None),  # heads that are too few for all GPUs are on several of them
    ],
)
def test_splitting_blocks_over_gpus(name: str, shape: tuple[int, int], expected: str | None) -> None:
    found = consumer_findings(config(weights=BLOCK), {f"a.{name}": LayerShape(shape)}, ["vllm"])
    assert [(finding.code, expected is not None and expected in finding.message) for finding in found] == (
        [] if expected is None else [("CF407", True)]
    )


def test_kernels_for_vllm() -> None:
    for weights, expected in (
        ({**INT4, "num_bits": 3}, ["CF405"]),
        ({**INT4, "group_size": 256}, ["CF405"]),
        (INT4, []),
    ):
        assert codes(config(weights=weights), "vllm", {"a.up_proj": LayerShape((256, 256))}, "warning") == expected


def two_groups(first: dict[str, Any], second: dict[str, Any]) -> QuantizationConfig:
    return QuantizationConfig.from_dict({"config_groups": {"a": first, "b": second}, "ignore": ["lm_head"]})


def test_fused_layers_that_differ() -> None:
    mixed = two_groups(
        {"targets": ["re:.*q_proj$"], "weights": FLOAT8, "input_activations": FLOAT8_TOKEN},
        {"targets": ["Linear"], "weights": INT4},
    )
    assert errors(mixed, "vllm") == ["CF408"]
    assert errors(mixed, "sglang") == ["CF507"]
    assert errors(mixed, "transformers") == []
    assert codes(mixed, "transformers", DENSE, "warning") == ["CF608"]
    assert errors(mixed, "llama.cpp") == ["CF701"]
    ignored = config(weights=INT4, ignore=["lm_head", "model.layers.0.mlp.gate_proj"])
    assert errors(ignored, "vllm") == ["CF408"]


def test_targets_that_vllm_reads_otherwise() -> None:
    """It takes the first that matches, others the smallest pattern."""
    mixed = two_groups({"targets": ["re:model.*"], "weights": {**INT4, "group_size": 64}},
                       {"targets": ["re:.*_proj$"], "weights": INT4})  # fmt: skip
    assert errors(mixed, "vllm") == ["CF409"]
    by_class = config(weights=INT4, ignore=["lm_head", "SpecialLinear"])
    special = {"model.extra": LayerShape((128, 128), ("SpecialLinear", "Linear"))}
    assert errors(by_class, "vllm", {**DENSE, **special}) == ["CF409"]
    assert errors(by_class, "transformers", {**DENSE, **special}) == []


def test_experts_that_differ() -> None:
    name = "model.layers.0.mlp.experts.1.down_proj"
    assert errors(config(weights=INT4, ignore=["lm_head", "re:.*mlp.gate$", name]), "vllm", EXPERTS) == ["CF415"]
    assert errors(config(weights=INT4), "vllm", EXPERTS) == []


@pytest.mark.parametrize(
    ("consumer", "group", "expected"),
    [
        ("vllm", {"weights": {"strategy": "tensor"}, "input_activations": TOKEN}, ["CF416"]),
        ("vllm", {"weights": FLOAT8}, ["CF416"]),
        ("sglang", {"weights": FLOAT8}, ["CF505"]),
        ("transformers", {"weights": FLOAT8}, []),
    ],
)
def test_schemes_of_experts(consumer: str, group: dict[str, Any], expected: list[str]) -> None:
    assert errors(config(**group), consumer, EXPERTS) == expected
    assert errors(config(**group), consumer, DENSE) == []


def test_experts_by_other_names() -> None:
    layers = {f"model.layers.0.experts.0.{name}": LayerShape((128, 128)) for name in ("w1", "w2", "w3")}
    named = config(weights=INT4, targets=["re:.*experts.*w[123]$"])
    assert errors(named, "sglang", layers) == ["CF508"] * 3
    for target in ("Linear", "re:.*experts.*"):
        assert errors(config(weights=INT4, targets=[target]), "sglang", layers) == []


def test_what_only_tensors_tell() -> None:
    packed = {"model.layers.0.mlp.experts.gate_up_proj_packed": (8, 64, 16), "a.k_proj.output_scale": (1,)}
    cached = config(weights=INT4, kv_cache_scheme={"type": "float", "strategy": "tensor"})
    assert errors(cached, "vllm", tensors=packed) == ["CF414", "CF417"]
    assert errors(cached, "sglang", tensors=packed) == ["CF511"]
    odd = config(weights={**INT4, "num_bits": 3})
    assert errors(odd, "vllm", word_aligned=["a"]) == ["CF419"]
    assert errors(odd, "transformers", word_aligned=["a"]) == ["CF609"]


def test_warnings() -> None:
    cached = config(weights=INT4, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "attn_head"})
    assert codes(cached, "sglang", DENSE, "warning") == ["CF510"]
    assert codes(cached, "llama.cpp", DENSE, "warning") == ["CF706"]
    attention = two_groups(
        {"targets": ["LlamaAttention"], "input_activations": FLOAT8_TOKEN}, {"targets": ["Linear"], "weights": INT4}
    )
    assert "CF418" in codes(attention, "vllm", DENSE, "warning")
    experts = config(weights=FLOAT8, input_activations=FLOAT8_TOKEN)
    assert codes(experts, "transformers", EXPERTS, "warning") == ["CF605"]
    by_token = config(weights=INT4, input_activations=FLOAT8_TOKEN, targets=["re:.*experts.*"])
    assert "CF513" in codes(by_token, "sglang", EXPERTS, "warning")


def test_nothing_is_said_of_nobody() -> None:
    assert consumer_findings(config(weights={"num_bits": 1}), DENSE, []) == []


def test_targets_that_cannot_be_matched() -> None:
    found = consumer_findings(config(weights=INT4, targets=["x.y"]), {"x.y": LayerShape((2, 2), ("Conv1D",))}, ["vllm"])
    assert [finding.code for finding in found] == ["CF111"]
