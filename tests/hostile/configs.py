"""Configs that lie, hang, or cost too much."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import CONFIG, Case

__all__ = ["CONFIG_CASES"]

HANGS = r"re:((\w|\.|[a-z])*)*proj(?!$)"
LOADERS = ("load", "fill", "check", "decompress")


def text(made: str | bytes | Callable[[], str]) -> Callable[[Path], None]:
    """``config.json`` is this text."""

    def spoil(folder: Path) -> None:
        found = made() if callable(made) else made
        (folder / "config.json").write_bytes(
            found if isinstance(found, bytes) else found.encode("utf-8", "surrogatepass")
        )

    return spoil


def changed(**keys: Any) -> Callable[[Path], None]:
    """Keys of ``quantization_config``; a callable makes the value when it is needed."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= {key: value() if callable(value) else value for key, value in keys.items()}
        path.write_text(json.dumps(config))

    return spoil


def whole(**keys: Any) -> Callable[[Path], None]:
    """Keys of ``config.json`` itself."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps(config | {key: value() if callable(value) else value for key, value in keys.items()})
        )

    return spoil


def args(**fields: Any) -> Callable[[Path], None]:
    """Fields of the weights of the one group there is."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= fields
        path.write_text(json.dumps(config))

    return spoil


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "config.json").unlink()
        make(folder / "config.json")

    return spoil


def _group(**fields: Any) -> dict[str, Any]:
    return {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}, **fields}
    }


def _code(folder: Path) -> None:
    """Code beside the weights, which would leave a folder behind if it were imported."""
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(folder / 'marker')!r})\n")
    whole(auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}, model_type="unknown")(
        folder
    )


QUANTIZATION = '{"quantization_config": %s}'

TEXTS = [
    Case("config: empty", text(""), "no valid JSON", CONFIG),
    Case("config: not UTF-8", text(b'{"a": "\xff"}'), "no UTF-8", CONFIG),
    Case("config: NULs", text(b"\0" * 1000), "no valid JSON", CONFIG),
    Case("config: nested a million deep", text('{"a":' * 1_000_000), "nested too deeply|too much", CONFIG),
    Case("config: lists a million deep", text("[" * 1_000_000), "nested too deeply|too much", CONFIG),
    Case("config: a list", text("[]"), "must be an? (JSON )?object", CONFIG),
    Case("config: more behind it", text("{} {}"), "Extra data", CONFIG),
    Case("config: cut", text('{"quantization_config": {"config_groups": '), "no valid JSON", CONFIG),
    Case("config: a million empty lists", text(lambda: "[" + "[]," * 5_000_000 + "[]]"), "too much", CONFIG),
    Case("config: a string of 50 MB", text(lambda: '{"a": "' + "x" * 50_000_000 + '"}'), "too much", CONFIG),
    Case("config: a wide string of 20 MB", text(lambda: '{"a": "😀' + "x" * 20_000_000 + '"}'), "too much", CONFIG),
    Case(
        "config: a million keys", text(lambda: json.dumps({f"k{i}": i for i in range(1_000_000)})), "too much", CONFIG
    ),
    Case(
        "config: 100000 keys in it",
        changed(**{f"k{i}": i for i in range(100_000)}, config_groups={}),
        "",
        LOADERS,
    ),
    Case(
        "config: 100000 wrong keys in a group",
        changed(config_groups=lambda: _group(**{f"k{i}": i for i in range(100_000)})),
        "unknown key",
        CONFIG,
    ),
    Case(
        "config: 100000 wrong targets",
        changed(config_groups=lambda: {"group_0": {"targets": list(range(100_000))}}),
        "must be a string",
        CONFIG,
    ),
    Case(
        "config: 20000 groups of nothing",
        changed(config_groups=lambda: {f"g{i}": 3 for i in range(20_000)}),
        "",
        CONFIG,
    ),
    Case("config: a number of 10000 digits", text(QUANTIZATION % ("9" * 10_000)), "digits", CONFIG),
    Case("config: not an object", text(QUANTIZATION % "[1]"), "must be an object", CONFIG),
    Case("config: no config of compression", text("{}"), "quantization_config", CONFIG),
    Case("config: a folder", instead(os.mkdir), "", CONFIG),
    Case("config: a pipe", instead(os.mkfifo), "", CONFIG),
    Case("config: a device", instead(lambda path: path.symlink_to("/dev/zero")), "", CONFIG),
    Case("config: a link to itself", instead(lambda path: path.symlink_to(path)), "", CONFIG),
    Case("config: missing", instead(lambda _: None), "config", ("config", "load", "fill", "decompress")),
]

FIELDS = [
    Case("bits: 0", args(num_bits=0), "num_bits", CONFIG),
    Case("bits: 10**30", args(num_bits=10**30), "num_bits", CONFIG),
    Case("bits: a float", args(num_bits=4.5), "num_bits", CONFIG),
    Case(
        "bits: 1e999",
        text(QUANTIZATION % '{"config_groups": {"a": {"targets": ["x"], "weights": {"num_bits": 1e999}}}}'),
        "num_bits",
        CONFIG,
    ),
    Case("group size: -7", args(group_size=-7), "group_size", CONFIG),
    Case("group size: 2**62", args(group_size=2**62), "", LOADERS),
    Case("group size: 1", args(group_size=1), "weight_scale", LOADERS),
    Case("block: 2**62 by 2**62", args(strategy="block", group_size=None, block_structure=[2**62, 2**62]), "", LOADERS),
    Case("block: of negative size", args(strategy="block", group_size=None, block_structure=[-1, 8]), "block", CONFIG),
    Case("block: a string", args(strategy="block", group_size=None, block_structure="0x0"), "block", CONFIG),
    Case(
        "half a character",
        text(QUANTIZATION % r'{"config_groups": {"\ud800": {"targets": ["\udfff"], "weights": 3}}}'),
        "weights",
        CONFIG,
    ),
    Case("a format nobody knows", changed(config_groups=_group(format="../../x")), "format", CONFIG),
    Case("another method", changed(config_groups=None, quant_method="gptq"), "config_groups", CONFIG),
]

PATTERNS = [
    Case("a target that hangs", changed(config_groups=_group(targets=[HANGS])), "takes too long", LOADERS),
    Case("an ignore entry that hangs", changed(ignore=[HANGS]), "takes too long", LOADERS),
    Case(
        "100 targets that nearly hang",
        changed(config_groups=_group(targets=[f"re:(.?){{{n}}}.*.*.*.*.*.*.*{n}$" for n in range(20, 120)])),
        "",
        LOADERS,
    ),
    Case("20000 patterns", changed(ignore=lambda: [f"re:.*x{i}(a|b)*$" for i in range(20_000)]), "patterns", CONFIG),
    Case(
        "a pattern of a million characters",
        changed(config_groups=_group(targets=["re:" + "a?" * 500_000])),
        "",
        LOADERS,
    ),
    Case(
        "a pattern that fills the memory", changed(config_groups=_group(targets=["re:((a{99}){99}){99}"])), "", LOADERS
    ),
    Case(
        "a hanging target of sparsity",
        changed(sparsity_config={"format": "sparse-24-bitmask", "targets": [HANGS]}),
        "",
        LOADERS,
    ),
    Case(
        "a hanging target of a rotation",
        changed(
            transform_config={
                "config_groups": {"R": {"type": "hadamard", "apply": [{"targets": [HANGS], "location": "input"}]}}
            }
        ),
        "",
        LOADERS,
    ),
]

MODELS = [
    Case("code in the checkpoint", _code, "", ("load",)),
    Case("a model type nobody knows", whole(model_type="../../etc"), "which model", ("load",)),
    Case("a model type that is a number", whole(model_type=5), "", ("load",)),
    Case("no model type", whole(model_type=None, architectures=None), "which model", ("load",)),
    Case("architectures: a number", whole(architectures=3), "", ("load",)),
    Case("a negative size", whole(hidden_size=-64), "", ("load",)),
    Case("a size that is a string", whole(hidden_size="64"), "", ("load",)),
    Case("ten million layers", whole(num_hidden_layers=10_000_000), "layers", ("load",)),
    Case("a vocabulary of 2**60", whole(vocab_size=2**60), "", ("load",)),
    Case("a model of another size", whole(hidden_size=128), "", ("load",)),
]

CONFIG_CASES = [*TEXTS, *FIELDS, *PATTERNS, *MODELS]
