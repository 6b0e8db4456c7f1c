"""The fields of one tensor: what is taken, what is inferred, and that the peer agrees."""

from __future__ import annotations

from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs as PeerArgs
from hypothesis import given
from hypothesis import strategies as st

from compressed_format.config import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_format.errors import ConfigError

STRATEGIES = [strategy.value for strategy in QuantizationStrategy]


def problems(**fields: Any) -> dict[str, str]:
    """Place -> message of everything that is wrong."""
    with pytest.raises(ConfigError) as caught:
        QuantizationArgs(**fields)
    return {problem.place: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("fields", "strategy"),
    [
        ({}, "tensor"),
        ({"group_size": 64}, "group"),
        ({"group_size": -1}, "channel"),
        ({"group_size": None, "strategy": None}, "tensor"),
        ({"strategy": "channel", "group_size": -1}, "channel"),
    ],
)
def test_strategy_is_inferred(fields: dict[str, Any], strategy: str) -> None:
    args = QuantizationArgs(**fields)
    assert args.strategy is QuantizationStrategy(strategy)
    assert args.group_size == (64 if strategy == "group" else None)


def test_defaults_are_the_peers() -> None:
    args = QuantizationArgs()
    assert (args.num_bits, args.type, args.symmetric, args.dynamic) == (8, QuantizationType.INT, True, False)
    assert args.actorder is args.scale_dtype is args.zp_dtype is args.observer is args.block_structure is None
    assert args.observer_kwargs == {}


@pytest.mark.parametrize(
    ("fields", "place", "words"),
    [
        ({"num_bits": 0}, "num_bits", "1 to 8"),
        ({"num_bits": 33}, "num_bits", "1 to 8"),
        ({"num_bits": "4"}, "num_bits", 'must be an integer, not "4"'),
        ({"num_bits": True}, "num_bits", "must be an integer, not true"),
        ({"num_bits": 4.5}, "num_bits", "must be an integer, not 4.5"),
        ({"num_bits": None}, "num_bits", "must be an integer, not null"),
        ({"num_bits": 5, "type": "float"}, "num_bits", "4, 6 or 8"),
        ({"type": "flaot"}, "type", "did you mean float?"),
        ({"type": "INT"}, "type", "did you mean int?"),
        ({"type": 3}, "type", "must be one of int, float, not 3"),
        ({"symmetric": "true"}, "symmetric", "must be true or false"),
        ({"group_size": 0}, "group_size", "must be positive, or -1"),
        ({"group_size": -2}, "group_size", "at least -1"),
        ({"group_size": 12.5}, "group_size", "must be an integer"),
        ({"strategy": "gruop", "group_size": 4}, "strategy", "did you mean group?"),
        ({"strategy": "group"}, "group_size", "positive integer for strategy group"),
        ({"strategy": "tensor_group", "group_size": -1}, "group_size", "not -1"),
        ({"strategy": "channel", "group_size": 8}, "group_size", "goes with strategy group"),
        ({"strategy": "block"}, "block_structure", "[rows, columns]"),
        ({"block_structure": [1, 2]}, "block_structure", "goes with strategy block"),
        ({"strategy": "block", "block_structure": [1, 0]}, "block_structure", "two positive integers"),
        ({"strategy": "block", "block_structure": [1, 2, 3]}, "block_structure", "not [1, 2, 3]"),
        ({"strategy": "block", "block_structure": "1xx"}, "block_structure", "two positive integers"),
        ({"strategy": "block", "block_structure": [True, 2]}, "block_structure", "two positive integers"),
        ({"strategy": "token"}, "dynamic", "must be true for strategy token"),
        ({"strategy": "channel", "dynamic": True}, "dynamic", "not with channel"),
        ({"dynamic": "local"}, "dynamic", "tensor_group, not with tensor"),
        ({"dynamic": "yes"}, "dynamic", 'true, false or "local"'),
        ({"dynamic": 1}, "dynamic", 'true, false or "local"'),
        ({"actorder": "group", "group_size": 8}, "actorder", 'write "static"'),
        ({"actorder": True, "group_size": 8}, "actorder", 'write "static"'),
        ({"actorder": "statik", "group_size": 8}, "actorder", "did you mean static?"),
        ({"actorder": "static", "strategy": "channel"}, "actorder", "goes with strategy group"),
        ({"scale_dtype": "bfloat61"}, "scale_dtype", "did you mean torch.bfloat16?"),
        ({"scale_dtype": "nothing like it"}, "scale_dtype", "the dtypes are"),
        ({"scale_dtype": 7}, "scale_dtype", "must be the name of a torch dtype, not 7"),
        ({"zp_dtype": "torch.int32", "symmetric": False}, "zp_dtype", "are torch.int8"),
        ({"zp_dtype": "torch.int8", "symmetric": False, "type": "float"}, "zp_dtype", "are torch.float8_e4m3fn"),
        ({"observer": 3}, "observer", "must be a string"),
        ({"observer_kwargs": []}, "observer_kwargs", "must be an object"),
        ({"observer_kwargs": {"a": {1: 2}}}, "observer_kwargs.a", "keys of an object are strings"),
        ({"grup_size": 3}, "grup_size", "unknown key, did you mean group_size?"),
        ({"bits": 3}, "bits", "unknown key, did you mean num_bits?"),
        ({"zzz": 3}, "zzz", "the keys are num_bits"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], place: str, words: str) -> None:
    found = problems(**fields)
    assert list(found) == [place]
    assert words in found[place]


def test_everything_is_reported_at_once() -> None:
    found = problems(num_bits=77, type="int", group_size=-9, block_structure=[2, 2], dynamic=True, strategy="channel")
    assert set(found) == {"num_bits", "group_size", "block_structure", "dynamic"}


def test_rules_hold_their_tongue_about_wrong_fields() -> None:
    assert set(problems(strategy="gruop", group_size=8, dynamic=True)) == {"strategy"}
    assert set(problems(group_size="many")) == {"group_size"}
    assert set(problems(type="flaot", num_bits=99, dynamic="no")) == {"type", "dynamic"}


def test_canonical_forms() -> None:
    assert QuantizationArgs(actorder="weight", group_size=4).actorder is ActivationOrdering.STATIC
    assert QuantizationArgs(actorder=False).actorder is None
    assert QuantizationArgs(scale_dtype="uint8").scale_dtype == "torch.uint8"
    assert QuantizationArgs(strategy="block", block_structure="4x8").block_structure == (4, 8)
    assert QuantizationArgs(strategy="block", block_structure=[4.0, 8]).block_structure == (4, 8)
    assert QuantizationArgs(num_bits=4.0).num_bits == 4
    assert QuantizationArgs(zp_dtype="torch.int8", symmetric=False).zp_dtype is None
    assert QuantizationArgs(zp_dtype="torch.int32").zp_dtype is None


def test_frozen_hashable_and_replaceable() -> None:
    args = QuantizationArgs(num_bits=4, group_size=32, observer_kwargs={"a": [1, {"b": None}]})
    assert hash(args) == hash(args.replace())
    assert args.replace(num_bits=3).num_bits == 3
    with pytest.raises(Exception, match="frozen"):
        args.num_bits = 5  # type: ignore[misc]
    with pytest.raises(ConfigError):
        args.replace(num_bits=300)


def test_only_keys_that_every_reader_knows_are_written() -> None:
    plain = QuantizationArgs(num_bits=4, group_size=128).to_dict()
    assert list(plain) == ["num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"]
    more = QuantizationArgs(group_size=8, actorder="weight", observer="mse", observer_kwargs={"a": (1,)}).to_dict()
    assert more["actorder"] == "static"
    assert (more["observer"], more["observer_kwargs"]) == ("mse", {"a": [1]})
    assert QuantizationArgs(strategy="block", block_structure=(2, 4)).to_dict()["block_structure"] == [2, 4]


def _peer(fields: dict[str, Any]) -> PeerArgs | None:
    try:
        return PeerArgs.model_validate(fields)
    except (ValueError, NotImplementedError, TypeError):
        return None


def _ours(fields: dict[str, Any]) -> QuantizationArgs | None:
    try:
        return QuantizationArgs(**fields)
    except ConfigError:
        return None


def _means_nothing(fields: dict[str, Any]) -> bool:
    """What the peer lets through and this library refuses to author."""
    args = _peer(fields)
    assert args is not None
    return (
        (args.type == "int" and not 1 <= args.num_bits <= 8)
        or (args.actorder is not None and args.strategy != "group")
        or args.group_size == 0
    )


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.one_of(st.integers(1, 8), st.integers(-3, 40)),
        "type": st.sampled_from(["int", "float"]),
        "symmetric": st.booleans(),
        "group_size": st.one_of(st.none(), st.sampled_from([-2, -1, 0, 1, 16, 32, 128, 64.0])),
        "strategy": st.one_of(st.none(), st.sampled_from(STRATEGIES)),
        "block_structure": st.one_of(st.none(), st.sampled_from([[128, 128], [1, 2], [0, 1], [3], "2x4"])),
        "dynamic": st.sampled_from([True, False, "local"]),
        "actorder": st.sampled_from([None, "weight", "static", "group", False, True]),
        "scale_dtype": st.sampled_from([None, "torch.uint8", "bfloat16", "nonsense"]),
        "observer": st.sampled_from([None, "minmax"]),
    },
)


@given(FIELDS)
def test_the_peer_takes_the_same(fields: dict[str, Any]) -> None:
    peer, ours = _peer(fields), _ours(fields)
    if peer is None:
        assert ours is None
        return
    if ours is None:
        assert _means_nothing(fields)
        return
    assert not _means_nothing(fields)
    theirs = peer.model_dump(mode="json")
    theirs.pop("zp_dtype", None)
    if theirs["group_size"] == -1:
        theirs["group_size"] = None
    if theirs.get("actorder") == "weight":
        theirs["actorder"] = "static"
    if theirs.get("observer") is None:
        theirs.pop("observer", None)
    assert ours.to_dict() == theirs


@given(FIELDS)
def test_a_checkpoint_may_hold_what_the_peer_takes_and_what_it_took(fields: dict[str, Any]) -> None:
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": fields}}, "format": "int-quantized"}
    try:
        weights = QuantizationConfig.from_checkpoint(config)[0].config_groups["g"].weights
    except ConfigError:
        weights = None
    removed = fields.get("actorder") in (True, "group")
    peer = _peer(fields | {"actorder": None} if removed else fields)
    bits = fields.get("num_bits")
    if weights is None and isinstance(bits, int) and bits < 1:
        return  # the peer takes it, and then divides by it
    assert (weights is None) == (peer is None)
    if weights is not None and removed and weights.strategy is QuantizationStrategy.GROUP:
        assert weights.actorder is ActivationOrdering.GROUP
