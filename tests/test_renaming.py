"""Configs follow modules that get other names."""

from __future__ import annotations

from compressed_format import QuantizationConfig
from compressed_format.renaming import rename_modules

NAMES = {"language.head": "head", "language.layers.0": "model.layers.0", "norm": "norm"}
CONFIG = QuantizationConfig.from_dict(
    {
        "config_groups": {"a": {"targets": ["Linear", "language.layers.0"], "weights": {"num_bits": 8}}},
        "sparsity_config": {"format": "sparse-bitmask", "targets": ["re:language"], "ignore": ["language.head"]},
        "ignore": ["language.head", "re:.*layers.1", "re:language.layers"],
    }
)


def test_entries_follow_and_what_says_nothing_any_more_goes() -> None:
    renamed = rename_modules(CONFIG, NAMES, keep=False)
    assert renamed.config_groups["a"].targets == ("Linear", "model.layers.0")
    assert renamed.ignore == ("head", "re:.*layers.1", "model.layers.0")
    assert renamed.sparsity_config.targets == ("head", "model.layers.0")
    assert renamed.sparsity_config.ignore == ("head",)


def test_entries_are_kept_beside_those_of_the_other_naming() -> None:
    renamed = rename_modules(CONFIG, NAMES, keep=True)
    assert renamed.config_groups["a"].targets == ("Linear", "language.layers.0", "model.layers.0")
    assert renamed.ignore == ("language.head", "head", "re:.*layers.1", "re:language.layers", "model.layers.0")
    assert renamed.sparsity_config.targets == ("re:language", "head", "model.layers.0")


def test_without_a_change_of_names_the_config_is_the_same() -> None:
    assert rename_modules(CONFIG, {"norm": "norm"}, keep=False) is CONFIG
    assert rename_modules(CONFIG, {}, keep=True) is CONFIG
