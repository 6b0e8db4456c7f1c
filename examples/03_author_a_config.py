"""Write a config by hand, be told of every mistake at once, and see what it would do to a model's modules.

Checking a config imports no torch, and neither does this program.
"""

from __future__ import annotations

import sys

from compressed_format import ConfigError, QuantizationConfig, resolve_targets

MISTAKEN = {
    "config_groups": {
        "attention": {"targets": ["re:.*self_attn.*_proj$"], "weights": {"num_bits": 9, "grup_size": 128}},
        "mlp": {"targets": ["Linaer"], "weights": {"num_bits": 4, "strategy": "chanel"}},
    },
}
CORRECTED = {
    "config_groups": {
        "attention": {
            "targets": ["re:.*self_attn.*_proj$"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        },
        "mlp": {"targets": ["re:.*mlp.*_proj$"], "weights": {"num_bits": 4, "group_size": 128}},
    },
    "ignore": ["lm_head"],
}
MODULES = [
    *(f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "lm_head",
]


def main() -> None:
    try:
        QuantizationConfig.from_dict(MISTAKEN)
    except ConfigError as error:
        print(f"{error}\n")

    config = QuantizationConfig.from_dict(CORRECTED)
    resolution = resolve_targets(MODULES, config)
    for name in MODULES:
        assignment = resolution.assignments.get(name)
        print(f"{name:<34} {assignment.format.value if assignment else 'dense'}")
    print(f"\nthe whole file: {config.format.value}")
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
