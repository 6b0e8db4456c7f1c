"""Which of 20,000 modules gets which scheme, with 2,000 ignore entries and 10 targets: this library and the peer.

    python benchmarks/resolve_targets.py

The peer compares every module with every entry, so its time is proportional to the number of modules. It is measured
on a slice of them, with all entries, and multiplied.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from compressed_tensors.utils.match import match_named_modules, match_targets
from torch import nn

from compressed_format.config import QuantizationConfig, resolve_targets

MODULES = 20_000
IGNORED = 2_000
PATTERNS = 20
SLICE = 40
REPEATS = 5
TARGET_SECONDS = 1.0


class Model(nn.Module):
    """Names and classes of a mixture of experts; all of its modules share one tiny weight."""

    def __init__(self, count: int) -> None:
        super().__init__()
        linear = nn.Linear(1, 1)
        leaves = ("gate_proj", "up_proj", "down_proj")
        self.named = [
            (f"model.layers.{index // 384}.mlp.experts.{index // 3 % 128}.{leaves[index % 3]}", linear)
            for index in range(count)
        ]

    def named_modules(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.named)


def main() -> None:
    model = Model(MODULES)
    config = make_config(model)
    ours = median_seconds(lambda: resolve_targets(model, config))
    small = Model(MODULES // SLICE)
    peer = median_seconds(lambda: peer_resolves(small, config)) * SLICE
    found = resolve_targets(model, config)
    winners = {name: assignment.target for name, assignment in found.assignments.items()}
    assert all(winners[name] == target for name, target in peer_resolves(small, config).items())
    print(
        f"{MODULES} modules, {IGNORED} ignore entries ({PATTERNS} patterns), "
        f"{len(config.config_groups['narrow'].targets) + 1} targets: {len(found.assignments)} assigned, "
        f"{len(found.ignored)} ignored"
    )
    print(f"ours  {ours:8.3f} s (target: under {TARGET_SECONDS:.0f} s: {'met' if ours < TARGET_SECONDS else 'MISSED'})")
    print(f"peer  {peer:8.3f} s, measured on 1/{SLICE} of the modules and multiplied by {SLICE}")
    print(f"ratio {peer / ours:8.1f}")


def make_config(model: Model) -> QuantizationConfig:
    names = [name for name, _ in model.named_modules()]
    exact = names[:: len(names) // (IGNORED - PATTERNS)][: IGNORED - PATTERNS]
    patterns = [rf"re:.*layers\.{index}\.mlp\.gate$" for index in range(PATTERNS)]
    narrow = [rf"re:.*layers\.{index}\..*(gate|up|down)_proj$" for index in range(9)]
    return QuantizationConfig.from_dict(
        {
            "config_groups": {
                "narrow": {"targets": narrow, "weights": {"num_bits": 4, "group_size": 128}},
                "others": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
            },
            "ignore": [*exact, *patterns],
        }
    )


def peer_resolves(model: Model, config: QuantizationConfig) -> dict[str, str]:
    """What its ``apply_quantization_config`` does to find the schemes."""
    targets = [target for scheme in config.config_groups.values() for target in scheme.targets]
    return {
        name: match_targets(name, module, targets)[0]
        for name, module in match_named_modules(model, targets, config.ignore)
    }


def median_seconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
