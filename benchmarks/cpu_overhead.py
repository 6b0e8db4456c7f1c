"""What a call of one small ``CompressedLinear`` costs beside one of ``nn.Linear``: 64 x 64, one token of bfloat16.

    python benchmarks/cpu_overhead.py

There is next to nothing to multiply, so this is the price of getting there. The two take turns, of which the fastest
counts, with gradients switched off as models do when they only run, and with gradients recorded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from harness.bars import Bar, Cost, Report
from harness.ceilings import describe_machine
from harness.measuring import Candidate, medians
from torch import nn

from compressed_format import compress

SIZE = 64
TIMES, MORE = 1.5, 5.0
"""The bar: so many times ``nn.Linear``, and so many microseconds more."""


def weights(bits: int, **values: object) -> dict[str, Any]:
    return {"num_bits": bits, **values}


SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16 group 64": {"weights": weights(4, group_size=SIZE)},
    "W8A8": {
        "weights": weights(8, strategy="channel"),
        "input_activations": weights(8, strategy="token", dynamic=True),
    },
    "FP8 W8A8": {
        "weights": weights(8, type="float", strategy="channel"),
        "input_activations": weights(8, type="float", strategy="token", dynamic=True),
    },
}
MODES: dict[str, partial[AbstractContextManager[object]]] = {
    "inference_mode": partial(torch.inference_mode),
    "no_grad": partial(torch.no_grad),
    "gradients": partial(torch.set_grad_enabled, True),
}


def main() -> None:
    torch.manual_seed(0)
    report = Report("overhead of a small layer")
    report.line(describe_machine())
    dense = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    input = torch.randn(1, SIZE, dtype=torch.bfloat16)
    candidates = {"nn.Linear": Candidate(partial(dense, input))}
    for name, scheme in SCHEMES.items():
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16))
        compress(model, {"config_groups": {"group_0": {"targets": ["Linear"], **scheme}}})
        candidates[name] = Candidate(partial(model[0], input))
    for mode, context in MODES.items():
        with context():
            found = {name: seconds * 1e6 for name, seconds in medians(candidates, of_turns=min).items()}
        linear = found.pop("nn.Linear")
        report.line(f"{mode}: nn.Linear {linear:.2f} us")
        for name, microseconds in found.items():
            bound = round(TIMES * linear + MORE, 2)
            what = f"= {TIMES:g} x nn.Linear + {MORE:g} us"
            cost = Cost(microseconds / 1e6)
            work = f"one call, {name} {SIZE}x{SIZE}, {mode}"
            report.add(Bar(work, what, microseconds, bound, "us", at_most=True, cost=cost))
    report.finish()


if __name__ == "__main__":
    main()
