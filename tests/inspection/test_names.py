"""What is read out of the names of modules."""

from __future__ import annotations

import pytest

from compressed_format.inspection.names import LayerName, layer_name, layer_order, printable, without_experts


@pytest.mark.parametrize(
    ("module", "stack", "index", "part"),
    [
        ("model.layers.12.self_attn.q_proj", "model.layers", 12, "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.17.up_proj", "model.layers", 0, "mlp.experts.*.up_proj"),
        ("down_blocks.1.attentions.0.to_q", "down_blocks", 1, "attentions.*.to_q"),
        ("0", "", 0, ""),
        ("h.3", "h", 3, ""),
        ("model.embed_tokens", "model.embed_tokens", None, "embed_tokens"),
        ("layers.norm1.fc", "layers.norm1.fc", None, "fc"),
        ("layers.\u0663.fc", "layers.\u0663.fc", None, "fc"),  # a digit, but none that counts layers
        (f"layers.{'9' * 5000}.fc", f"layers.{'9' * 5000}.fc", None, "fc"),  # more digits than int() takes
        ("", "", None, ""),
    ],
)
def test_the_first_number_is_that_of_the_layer(module: str, stack: str, index: int | None, part: str) -> None:
    assert layer_name(module) == LayerName(stack, index, part)


def test_layers_go_by_number_within_their_stack() -> None:
    names = ["head", "b.10.x", "b.2.x", "b.2.y", "a.1.x", "norm"]
    assert [name.layer for name in layer_order(map(layer_name, names))] == ["head", "b.2", "b.10", "a.1", "norm"]


def test_only_the_numbers_of_experts_are_left_out() -> None:
    assert without_experts("model.layers.3.mlp.experts.17.w1") == "model.layers.3.mlp.experts.*.w1"
    assert without_experts("model.my_experts.3.w1") == "model.my_experts.3.w1"


def test_what_does_not_show_is_escaped() -> None:
    assert printable("model.schön.0") == "model.schön.0"
    assert printable("a\x1b[31m\u202e\ud800\n") == r"a\x1b[31m\u202e\ud800\n"
