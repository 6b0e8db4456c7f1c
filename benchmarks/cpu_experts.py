"""A layer of experts on the CPU, W4A16, as a Mixtral has it: against the same in dense bfloat16, and its own products.

    python benchmarks/cpu_experts.py [--hidden 2048] [--intermediate 4096] [--seconds 4]

Eight experts in groups of 128, of which each token goes to two, anywhere among them. ``eager``, ``batched_mm`` and
``grouped_mm`` are the ways in which transformers runs its dense experts (the second copies the weights for every
token, and is left out where there are many). All get the same activations of bfloat16 and the same routes.
``linears`` is what the layer takes at least: ``ops.linear`` with gate, up and down of each routed expert, of rows that
are gathered already, with nothing in between. All candidates take turns (``harness/measuring.py``), on several layers
one after the other, each call with routes of its own.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from harness.bars import Bar, Report
from harness.ceilings import describe_machine, reader
from harness.measuring import copies_to_rotate, medians, rotated
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from compressed_format import QuantizationConfig, compress, ops
from compressed_format.modules.experts import CompressedExperts

EXPERTS, SLOTS = 8, 2
TOKENS = (1, 4, 64)
DENSE = {1: ("eager", "batched_mm", "grouped_mm"), 4: ("eager", "grouped_mm"), 64: ("eager", "grouped_mm")}
DENSE_BARS = {1: 2.5, 4: 2.5, 64: 0.95}
LINEARS_BAR = 0.9
TOLERANCE = 0.02
OURS, LINEARS, READ = "ours", "linears", "read"

Call = tuple[CompressedExperts, torch.Tensor, torch.Tensor, torch.Tensor]
"""A layer, its input, and for each token its experts and their shares."""


def dense_experts(hidden: int, intermediate: int) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=EXPERTS, num_experts_per_tok=SLOTS
    )
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).to(torch.bfloat16)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts.requires_grad_(False)


def compressed(dense: MixtralExperts) -> CompressedExperts:
    model = nn.ModuleDict({"experts": copy.deepcopy(dense)})
    compress(model, QuantizationConfig.preset("W4A16"))
    experts = model["experts"]
    assert isinstance(experts, CompressedExperts)
    return experts


def routes(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shares, experts = torch.randn(tokens, EXPERTS).softmax(-1).topk(SLOTS)
    return experts, (shares / shares.sum(-1, keepdim=True)).to(torch.bfloat16)


def run_dense(implementation: str, call: tuple[MixtralExperts, torch.Tensor, torch.Tensor, torch.Tensor]) -> object:
    experts, *arguments = call
    experts.config._experts_implementation = implementation
    return experts(*arguments)


def linears_of(layer: CompressedExperts, input: torch.Tensor, index: torch.Tensor) -> list[partial[torch.Tensor]]:
    """The products of each routed expert, ready to be called."""
    calls = []
    for expert in index.unique().tolist():
        rows = input[(index == expert).any(-1)]
        inner = torch.randn(len(rows), layer.down_proj.in_features).to(input.dtype)
        for name, projection in layer.projections.items():
            tensors = (None if tensor is None else tensor[expert] for tensor in projection._weight_tensors())
            operand = inner if name == "down_proj" else rows
            calls.append(partial(ops.linear, operand, *tensors, None, *projection._layout))
    return calls


def call_all(calls: list[partial[torch.Tensor]]) -> None:
    for call in calls:
        call()


def routed_bytes(layer: CompressedExperts, index: torch.Tensor) -> int:
    held = sum(parameter.nbytes for parameter in layer.parameters())
    return held * len(index.unique()) // EXPERTS


def measure(
    report: Report, dense: list[MixtralExperts], packed: list[CompressedExperts], tokens: int, seconds: float
) -> None:
    input = torch.randn(tokens, dense[0].hidden_dim).to(torch.bfloat16)
    drawn = [routes(tokens) for _ in range(len(dense) * len(packed))]
    ours = [(packed[i % len(packed)], input, *each) for i, each in enumerate(drawn)]
    theirs = [(dense[i % len(dense)], input, *each) for i, each in enumerate(drawn)]
    expected = run_dense("eager", (dense_twin(packed[0]), *ours[0][1:]))
    result = ours[0][0](*ours[0][1:])
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"the result differs from that of the dense weights by {error:.3f} of it")
    candidates = {
        OURS: rotated(lambda call: call[0](*call[1:]), ours),
        LINEARS: rotated(call_all, [linears_of(*call[:3]) for call in ours]),
        READ: reader(),
        **{name: rotated(partial(run_dense, name), theirs) for name in DENSE[tokens]},
    }
    with torch.inference_mode():
        found = medians(candidates, seconds)
    work = f"W4A16 experts, M={tokens}"
    nbytes = sum(routed_bytes(call[0], call[2]) for call in ours) / len(ours)
    rivals = ", ".join(f"{name} {found[name] * 1e6:.0f}" for name in (LINEARS, *DENSE[tokens]))
    rate = f"{nbytes / found[OURS] / 1e9:.1f} GB/s of {1 / found[READ] / 1e9:.1f} read"
    report.line(f"{work}: {found[OURS] * 1e6:.0f} us, {rate}; {rivals}")
    best = min(DENSE[tokens], key=found.__getitem__)
    report.add(Bar(work, f"dense bf16 ({best})", found[best] / found[OURS], DENSE_BARS[tokens]))
    report.add(Bar(work, "its plain products", found[LINEARS] / found[OURS], LINEARS_BAR))


def dense_twin(packed: CompressedExperts) -> MixtralExperts:
    """The same weights, as transformers has them."""
    twin = dense_experts(packed.up_proj.in_features, packed.up_proj.out_features)
    gate, up, down = (projection.dequantized_weight() for projection in packed.projections.values())
    twin.gate_up_proj.copy_(torch.cat((gate, up), dim=1))
    twin.down_proj.copy_(down)
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(description="A layer of experts on the CPU, packed and dense.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each number of tokens")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report("a layer of experts")
    report.line(describe_machine())
    dense = [dense_experts(options.hidden, options.intermediate)]
    packed = [compressed(dense[0])]
    nbytes = sum(parameter.nbytes for parameter in packed[0].parameters())
    # An input reaches two of eight experts, so that even a part of a layer is not in the cache.
    packed += [copy.deepcopy(packed[0]) for _ in range(copies_to_rotate(nbytes) - 1)]
    dense += [copy.deepcopy(dense[0])]
    for tokens in TOKENS:
        measure(report, dense, packed, tokens, options.seconds)
    report.finish()


if __name__ == "__main__":
    main()
