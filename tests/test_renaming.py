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


def test_a_module_keeps_its_group() -> None:
    """By its old name, a pattern that the new name does not match may stand before one that both match."""

    def targets(keep: bool, **groups: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        schemes = {name: {"targets": list(found), "weights": {"num_bits": 8}} for name, found in groups.items()}
        config = rename_modules(QuantizationConfig.from_dict({"config_groups": schemes}), {"a.x": "b.x"}, keep=keep)
        return {name: scheme.targets for name, scheme in config.config_groups.items()}

    assert targets(False, one=("re:.*x",), two=("re:a",)) == {"one": ("re:.*x",), "two": ()}
    assert targets(False, one=("re:.*x",), two=("re:-?a",)) == {"one": ("re:.*x",), "two": ("b.x",)}
    assert targets(True, one=("re:.*x",), two=("re:a",)) == {"one": ("re:.*x",), "two": ("re:a",)}
    # The later of two groups does not take what the earlier one has by an exact name.
    assert targets(False, one=("a.x",), two=("re:.*x",)) == {"one": ("b.x",), "two": ("re:.*x",)}
    assert targets(True, one=("a.x",), two=("b.x",)) == {"one": ("a.x", "b.x"), "two": ()}
    # What speaks of the new name alone still does.
    assert targets(True, one=("b.x",), two=("re:.*x",)) == {"one": ("b.x",), "two": ("re:.*x",)}
    assert targets(False, one=("re:b",), two=("Linear",)) == {"one": ("re:b",), "two": ("Linear",)}
