"""Which module gets which scheme: the peer's precedence, and what is said about it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig as PeerConfig
from compressed_tensors.quantization import apply_quantization_config
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressed_format.config import (
    Assignment,
    CompressionFormat,
    QuantizationConfig,
    TargetResolution,
    expand_ignore,
    resolve_targets,
)
from compressed_format.errors import TargetError

INT4 = {"num_bits": 4, "group_size": 32}
INT8 = {"num_bits": 8, "strategy": "channel"}
LAYER = [
    *(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
]


class MyLinear(nn.Linear):
    pass


class Model:
    """Anything with ``named_modules``."""

    def __init__(self, **modules: Any) -> None:
        self.modules = {name.replace("__", "."): module for name, module in modules.items()}

    def named_modules(self) -> Any:
        return list(self.modules.items())


def config(ignore: Any = (), **groups: Any) -> QuantizationConfig:
    return QuantizationConfig.from_dict({"config_groups": groups, "ignore": list(ignore)})


def group(*targets: str, **fields: Any) -> dict[str, Any]:
    return {"targets": list(targets), "weights": INT4} | fields


def groups_of(resolution: TargetResolution) -> dict[str, str | None]:
    return {name: assignment.group for name, assignment in resolution.assignments.items()}


def said(resolution: TargetResolution) -> list[str]:
    return [str(problem) for problem in resolution.warnings]


def test_names_beat_patterns_beat_classes() -> None:
    resolution = resolve_targets(
        LAYER,
        config(
            classes=group("Linear"),
            patterns=group("re:.*mlp.*", weights=INT8),
            names=group(LAYER[-1], weights=INT8 | {"num_bits": 6}),
        ),
    )
    assert groups_of(resolution) == dict.fromkeys(LAYER[:4], "classes") | dict.fromkeys(LAYER[4:6], "patterns") | {
        LAYER[6]: "names"
    }
    assert resolution.assignments[LAYER[6]] == Assignment(
        group="names",
        scheme=config(x=group(LAYER[-1], weights=INT8 | {"num_bits": 6})).config_groups["x"],
        target=LAYER[6],
        reason=f'its name is "{LAYER[6]}", a target of names',
        format=CompressionFormat.PACK_QUANTIZED,
        sparsity=None,
    )
    assert resolution.assignments[LAYER[4]].reason == 'its name matches "re:.*mlp.*", a target of patterns'
    assert resolution.assignments[LAYER[0]].reason == 'its class is "Linear", a target of classes'
    assert resolution == resolve_targets(iter(LAYER), config(**_schemes(resolution)))
    assert hash(resolution) == hash(resolution)


def _schemes(resolution: TargetResolution) -> dict[str, Any]:
    found = {}
    for assignment in resolution.assignments.values():
        assert assignment.scheme is not None
        found[assignment.group] = assignment.scheme.to_dict()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("turned", [False, True])
def test_patterns_win_in_string_order(turned: bool) -> None:
    groups = {"a": group("re:.*z?down_proj"), "b": group("re:.*down_proj", weights=INT8)}
    turned_groups = dict(reversed(groups.items())) if turned else groups
    resolution = resolve_targets(["m.down_proj"], config(**turned_groups))
    assert groups_of(resolution) == {"m.down_proj": "b"}
    disagreement = (
        'm.down_proj: gets b by "re:.*down_proj", and in vLLM, where the first target that matches wins, '
        'a by "re:.*z?down_proj"'
    )
    assert said(resolution) == ([] if turned else [disagreement])


def test_classes_win_in_string_order_and_vllm_looks_for_parts() -> None:
    names = {"a": ("MyLinear", "Linear"), "b": "Linear", "c": ["Embedding"]}
    resolution = resolve_targets(names, config(x=group("MyLinear", "Embedding"), y=group("Linear", weights=INT8)))
    assert groups_of(resolution) == {"a": "y", "b": "y", "c": "x"}
    assert [problem.place for problem in resolution.warnings] == ["a"]
    alike = config(x=group("re:.*z?down_proj"), y=group("re:.*down_proj"))
    assert said(resolve_targets(["m.down_proj"], alike)) == []


def test_the_later_group_wins_a_shared_target() -> None:
    resolution = resolve_targets(["x.y"], config(a=group("Linear"), b=group("Linear", weights=INT8)))
    assert groups_of(resolution) == {"x.y": "b"}


def test_ignore_always_wins() -> None:
    resolution = resolve_targets(
        dict.fromkeys(LAYER, "Linear") | {"lm_head": "Linear", "emb": "Embedding"},
        config(["lm_head", "re:.*self_attn", "Embedding", LAYER[6]], a=group("Linear", "Embedding", LAYER[6])),
    )
    assert list(resolution.assignments) == LAYER[4:6]
    assert resolution.ignored == {
        **dict.fromkeys(LAYER[:4], "re:.*self_attn"),
        LAYER[6]: LAYER[6],
        "lm_head": "lm_head",
        "emb": "Embedding",
    }
    assert [problem.place for problem in resolution.warnings] == ["emb"]
    assert "ignored by its class" in resolution.warnings[0].message


def test_what_matches_nothing_is_said() -> None:
    resolution = resolve_targets(
        {**dict.fromkeys(LAYER, "Linear"), "emb": "Embedding"},
        config(
            ["lm_head", "re:.*vision.*", "model.layers.0.self_attn.q_prj", "re:.*q_proj"],
            a=group("Linear", "q_proj", "Liner", "re:.*nothing", "re:.*k_proj", "model.layers.0", "re:.*q_pr.*"),
        ),
    )
    assert sorted(text for text in said(resolution) if "fuse" not in text) == [
        'config_groups.a.targets: "Liner" matches no module; did you mean "Linear"?',
        'config_groups.a.targets: "model.layers.0" matches no module',
        'config_groups.a.targets: "q_proj" matches no module; did you mean "re:.*q_proj$"?',
        'config_groups.a.targets: "re:.*nothing" matches no module',
        'ignore: "lm_head" matches no module',
        'ignore: "model.layers.0.self_attn.q_prj" matches no module; did you mean "model.layers.0.self_attn.q_proj"?',
        'ignore: "re:.*vision.*" matches no module',
    ]


def test_fused_siblings_that_differ() -> None:
    names = [name.replace(".0.", f".{layer}.") for layer in range(3) for name in LAYER]
    resolution = resolve_targets(
        names, config(["re:.*v_proj"], a=group("Linear"), b=group("re:.*up_proj", weights=INT8))
    )
    advice = "servers fuse these modules and need them compressed alike (the same in 2 more)"
    assert said(resolution) == [
        f"model.layers.0.self_attn: q_proj gets a, k_proj gets a, v_proj is ignored; {advice}",
        f"model.layers.0.mlp: gate_proj gets a, up_proj gets b; {advice}",
    ]
    untargeted = resolve_targets(LAYER, config(a=group("re:.*gate_proj")))
    assert "gate_proj gets a, up_proj matches no target" in said(untargeted)[0]
    assert said(resolve_targets(LAYER, config(a=group("re:.*gate_proj"), b=group("Linear")))) == []


def test_sparsity_stands_beside_the_scheme() -> None:
    both = QuantizationConfig.from_dict(
        {
            "config_groups": {
                "a": group("re:.*mlp.*", sparsity="2:4"),
                "b": group(LAYER[6], weights=INT8),
                "c": {"targets": ["re:.*o_proj"], "sparsity": "2:4"},
            },
            "ignore": [LAYER[5]],
        }
    )
    for read in (both, QuantizationConfig.from_checkpoint(both.to_dict())[0]):
        found = resolve_targets(LAYER, read).assignments
        sparse = {name for name, assignment in found.items() if assignment.sparsity is not None}
        assert sparse == {LAYER[3], LAYER[4]}
        assert found[LAYER[4]].sparsity is CompressionFormat.SPARSE_24_BITMASK
        assert found[LAYER[4]].format is CompressionFormat.PACK_QUANTIZED
        assert found[LAYER[3]].format is CompressionFormat.DENSE
        assert found[LAYER[4]].reason.endswith(
            'a target of a, and its name matches "re:.*mlp.*", a target of sparsity_config'
        )


def test_models_that_are_only_sparse() -> None:
    only = {"format": "sparse-bitmask", "targets": ["Linear", "Conv"], "ignore": ["head"]}
    config, _ = QuantizationConfig.from_checkpoint({"quant_method": "compressed-tensors", "sparsity_config": only})
    resolution = resolve_targets({"a": "Linear", "head": "Linear", "b": "Embedding"}, config)
    assert resolution.assignments == {
        "a": Assignment(
            group=None,
            scheme=None,
            target="Linear",
            reason='its class is "Linear", a target of sparsity_config',
            format=CompressionFormat.DENSE,
            sparsity=CompressionFormat.SPARSE_BITMASK,
        )
    }
    assert said(resolution) == ['sparsity_config.targets: "Conv" matches no module']
    assert expand_ignore({"a": "Linear"}, resolution) == ("a",)


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))


class LlamaAttention(nn.Module):
    pass


def _model() -> Model:
    return Model(
        mlp=nn.Sequential(),
        mlp__act=nn.SiLU(),
        mlp__norm=nn.LayerNorm(3),
        mlp__fc=nn.Linear(2, 2),
        mlp__c_fc=Conv1D(),
        mlp__c_proj=Conv1D(),
        mlp__experts=Experts(),
        attn=LlamaAttention(),
        lazy=nn.LazyLinear(3),
        mlp__lazy=nn.LazyConv2d(3, 3),
    )


def test_patterns_may_match_what_has_no_weight() -> None:
    resolution = resolve_targets(_model(), config(["re:.*c_.*"], a=group("re:mlp.*")))
    assert groups_of(resolution) == {"mlp.fc": "a"}
    assert said(resolution) == ["mlp.experts: holds gate_up_proj itself, not in Linear modules; they stay as they are"]


def test_targets_that_cannot_be_compressed_are_listed() -> None:
    with pytest.raises(TargetError) as caught:
        resolve_targets(_model(), config(a=group("re:mlp.*", "LayerNorm", "attn")))
    places = [problem.place for problem in caught.value.problems]
    assert places == ["mlp.c_fc", "mlp.c_proj", "attn"]
    assert "stores its weight transposed and cannot be compressed" in caught.value.problems[0].message
    assert "is neither Linear nor Embedding" in caught.value.problems[2].message
    with pytest.raises(TargetError):
        resolve_targets(_model(), config(a=group("LayerNorm")))
    with pytest.raises(TargetError):
        resolve_targets({"a": "Conv2d"}, config(a=group("Conv2d")))
    assert resolve_targets({"a": "Conv2d"}, config(a=group("re:a"))).assignments == {}


def test_attention_groups_are_kept_and_not_run() -> None:
    attention = {"targets": ["LlamaAttention"], "input_activations": {"type": "float"}}
    resolution = resolve_targets(_model(), config(a=attention, b={"targets": ["Conv1D", "Linear"]}))
    assert groups_of(resolution) == {"mlp.fc": "b", "lazy": "b"}
    assert resolution.assignments["mlp.fc"].format is CompressionFormat.DENSE
    assert said(resolution) == [
        "attn: is a LlamaAttention, whose quantized activations (a) are kept in the config and not run"
    ]


def test_a_model_may_be_one_module() -> None:
    assert groups_of(resolve_targets(nn.Linear(2, 2), config(a=group("Linear")))) == {"": "a"}
    with pytest.raises(TargetError, match="names this Conv1D"):
        resolve_targets(Conv1D(), config(a=group("Conv1D")))


@pytest.mark.parametrize("wrong", ["model.x", 3, None])
def test_what_is_no_model(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected a model"):
        resolve_targets(wrong, config(a=group("Linear")))


def test_modules_of_the_peer_are_no_targets() -> None:
    from compressed_tensors.transform.factory.hadamard import HadamardTransform

    inner = HadamardTransform.__new__(HadamardTransform)
    nn.Module.__init__(inner)
    inner.weight = nn.Parameter(torch.zeros(2, 2))
    assert groups_of(resolve_targets(Model(x=inner, y=nn.Linear(2, 2)), config(a=group("re:.*")))) == {"y": "a"}


def test_linear_base_counts_as_linear() -> None:
    names = {"a": ("RowParallelLinear", "LinearBase"), "b": "LinearBase"}
    assert groups_of(resolve_targets(names, config(a=group("Linear")))) == {"a": "a", "b": "a"}


def test_invalid_patterns_of_a_checkpoint_match_nothing() -> None:
    raw = {"config_groups": {"a": group("Linear", "re:(")}, "ignore": ["re:*"]}
    read, _ = QuantizationConfig.from_checkpoint(raw)
    resolution = resolve_targets(["x"], read)
    assert groups_of(resolution) == {"x": "a"}
    assert said(resolution) == ['config_groups.a.targets: "re:(" matches no module', 'ignore: "re:*" matches no module']


def test_ignore_is_expanded() -> None:
    names = {
        "emb": "Embedding",
        "pos": ("PositionEmbedding", "Embedding"),
        "fc": ("MyLinear", "Linear"),
        "skip": ("MyLinear", "Linear"),
        "plain": "Linear",
        "router": "TopKRouter",
        "gate": "MoEGate",
        "gated": "GatedMLP",
        "gating": "Gating",
        "expert": "GateExpertMLP",
        "norm": "LayerNorm",
        "nothing": (),
    }
    resolution = resolve_targets(names, config(["skip"], a=group("MyLinear")))
    assert expand_ignore(names, resolution) == ("skip", "plain", "router", "gate", "gating")
    with_embedding = resolve_targets(names, config(a=group("pos", "fc")))
    assert expand_ignore(names, with_embedding) == ("skip", "plain", "router", "gate", "gating")
    resolution = resolve_targets({**names, "tok": "Embedding"}, config(a=group("tok")))
    assert expand_ignore({**names, "tok": "Embedding"}, resolution)[0] == "emb"


LEAVES = ["q_proj", "down_proj", "up", "fc1", "a", "0"]
NAMES = st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3).map(".".join)
TARGETS = st.one_of(
    NAMES,
    st.sampled_from(["Linear", "MyLinear", "Embedding", "Module", "nothing"]),
    st.sampled_from(["re:.*", "re:", "re:a", "re:.*proj$", "re:.*(down|up).*", "re:q", r"re:.*\.0", "re:(a)\\.\\1"]),
)


@given(st.data())
def test_precedence_is_the_peers(data: st.DataObject) -> None:
    modules = data.draw(
        st.dictionaries(NAMES, st.sampled_from([nn.Linear(1, 1), MyLinear(1, 1), nn.Embedding(1, 1)]), max_size=6)
    )
    raw = {
        f"g{bits}": {"targets": targets, "weights": {"num_bits": bits}}
        for bits, targets in enumerate(data.draw(st.lists(st.lists(TARGETS, min_size=1, max_size=3), max_size=4)), 1)
    }
    ignore = data.draw(st.lists(TARGETS, max_size=2))
    ours = resolve_targets(Model(**modules), config(ignore, **raw))
    winners = {target: name for name, scheme in raw.items() for target in scheme["targets"]}
    for name, module in modules.items():
        matched = match_targets(name, module, winners)
        assert (name in ours.ignored) == is_match(name, module, ignore)
        if not matched or name in ours.ignored:
            assert name not in ours.assignments
        else:
            assert ours.assignments[name].target == matched[0]
            assert ours.assignments[name].group == winners[matched[0]]
    unmatched = {re.search('"(.*?)" matches no', text)[1] for text in said(ours) if "matches no module" in text}  # type: ignore[index]
    for target in {*winners, *ignore}:
        hit = any(is_match(name, module, target) for name, module in modules.items())
        assert hit == (target.replace("\\", "\\\\") not in unmatched)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 32)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(32, 32), "mlp": nn.Sequential(MyLinear(32, 32), nn.SiLU())})
            for _ in range(3)
        )
        self.lm_head = nn.Linear(32, 4)


def test_a_whole_model_as_the_peer_sees_it() -> None:
    raw = {
        "config_groups": {
            "a": group("re:.*q_proj"),
            "b": group("layers.1.q_proj", "Embedding", weights=INT8),
            "c": group("MyLinear", weights=INT8 | {"num_bits": 5}),
        },
        "ignore": ["lm_head", "re:layers.2.*"],
    }
    ours = QuantizationConfig.from_dict(raw)
    model = Tiny()
    apply_quantization_config(model, PeerConfig.model_validate(ours.to_dict()), show_progress=False)
    theirs = {
        name: module.quantization_scheme.weights.num_bits
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    found = resolve_targets(Tiny(), ours).assignments
    assert {
        name: scheme.weights.num_bits for name, a in found.items() if (scheme := a.scheme) and scheme.weights
    } == theirs
    assert len(theirs) == 5


class Counted(str):
    """A name that counts how often it is compared or hashed."""

    __slots__ = ()
    work = 0

    def __hash__(self) -> int:
        Counted.work += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Counted.work += 1
        return super().__eq__(other)


def test_work_grows_with_modules_plus_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressed_format.config.patterns import PatternTable

    calls = 0
    run = PatternTable._run

    def count(self: PatternTable, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(self, *args)

    monkeypatch.setattr(PatternTable, "_run", count)
    rng = random.Random(0)
    names = [f"model.layers.{index}.proj" for index in range(1000)]
    ignore = [*rng.sample(names, 300), *(f"re:.*nothing{index}" for index in range(50))]
    many = config(ignore, a=group("Linear", *(f"re:.*{index}.proj" for index in range(5))))
    Counted.work = 0
    resolve_targets([Counted(name) for name in names], many)
    assert calls <= 4 * len(names)
    assert Counted.work <= 60 * len(names)
