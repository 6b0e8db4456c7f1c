"""torch.compile of whole models: one graph without breaks, for every batch size, with a static cache, in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig, StaticCache

from compressed_format import compress
from tests.integrations.decoders import DECODERS
from tests.models import LLAMA_CONFIGS, token_ids, weights

pytestmark = pytest.mark.filterwarnings(
    # What generation with a compiled step calls in torch, and torch in itself.
    "ignore:.*is deprecated:FutureWarning",
)

CONFIGS: dict[str, Any] = {
    **{name: LLAMA_CONFIGS[name] for name in ("W4A16 group", "W8A8", "W8A8 static asymmetric", "FP8_DYNAMIC")},
    "FP8_BLOCK": LLAMA_CONFIGS["FP8_BLOCK"],
    "W4A16 asymmetric": weights(4, strategy="group", group_size=32, symmetric=False),
    "2:4": {"config_groups": {"g": {"targets": ["Linear"], "weights": None, "sparsity": "2:4"}}},
    "everything": weights(8, "Linear", "Embedding"),
}
# Every kind of weight in a Llama; each op that runs experts in mixtures of these.
CASES = [
    *(("Llama", config) for config in CONFIGS),
    *(("Mixtral", config) for config in ("W4A16 group", "W8A8", "W8A8 static asymmetric", "FP8_BLOCK")),
    ("Qwen3-MoE", "W4A16 asymmetric"),
]
EAGER = "aot_eager"  # traces as inductor does, and compiles no C++


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def packed(model: str, config: str) -> Any:
    # Larger weights than those of a fresh model, whose next tokens are all but equally likely. One layer is traced in
    # half the time of two.
    built = DECODERS[model](initializer_range=0.1, num_hidden_layers=1)
    return compress(built, CONFIGS[config], calibration=[{"input_ids": token_ids()}])


def prompt(batch: int, length: int = 12) -> torch.Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(batch))


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("model", "config"), CASES)
def test_one_graph_serves_every_batch(model: str, config: str) -> None:
    net = packed(model, config)
    compiled = torch.compile(net.forward, fullgraph=True, backend=EAGER)
    with torch.no_grad():
        for first, batch in ((True, 2), (False, 3), (False, 7)):
            ids = prompt(batch)
            torch._dynamo.mark_dynamic(ids, 0)
            with torch._dynamo.config.patch(error_on_recompile=not first):
                found = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, net(input_ids=ids, use_cache=False).logits)
    assert graphs() == 1


def greedy(model: Any, step: Callable[..., Any], ids: torch.Tensor, new: int) -> torch.Tensor:
    """Tokens that ``step`` adds one by one to a prompt, with a static cache that the uncompiled model has begun."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    tokens = [ids]
    with torch.no_grad():
        output = model(ids, past_key_values=cache, use_cache=True)
        for _ in range(new):
            tokens.append(output.logits[:, -1:].argmax(dim=-1))
            output = step(tokens[-1], past_key_values=cache, use_cache=True)
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize(("model", "config"), CASES)
def test_a_step_with_a_static_cache_is_one_graph(model: str, config: str) -> None:
    net = packed(model, config)
    compiled = torch.compile(net.forward, fullgraph=True, backend=EAGER)
    tokens = greedy(net, compiled, prompt(2), new=6)
    assert graphs() == 1
    assert torch.equal(tokens, greedy(net, net, prompt(2), new=6))


@pytest.mark.parametrize(("model", "config"), [("Llama", "W8A8"), ("Mixtral", "W4A16 group")])
def test_generate_compiles_its_steps(model: str, config: str) -> None:
    """transformers' own compilation for a static cache, which its quantizers may refuse."""
    net = packed(model, config)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected = net.generate(prompt(2), disable_compile=True, **options)
    assert graphs() == 0
    compilation = CompileConfig(fullgraph=True, backend=EAGER, mode=None)
    compilation._compile_all_devices = True  # on a CPU too
    found = net.generate(prompt(2), compile_config=compilation, **options)
    assert torch.equal(found, expected)
    assert graphs() >= 1


def losses_and_gradients(model: Any, step: Callable[..., Any], batches: list[int]) -> tuple[list[float], Any]:
    losses = []
    for count, batch in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=count > 0):
            loss = step(prompt(batch))
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("model", "config"), [("Llama", "FP8_DYNAMIC"), ("Mixtral", "W4A16 group")])
def test_training_adapters_is_one_graph(model: str, config: str) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        targets = ["q_proj", "o_proj"]
        tuned = get_peft_model(packed(model, config), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))

        def loss(ids: torch.Tensor, tuned: Any = tuned) -> torch.Tensor:
            logits = tuned(input_ids=ids, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        step = torch.compile(loss, fullgraph=True, backend=EAGER, dynamic=True) if compiled else loss
        results.append(losses_and_gradients(tuned.train(), step, [2, 3]))
    assert graphs() == 1
    (expected, expected_gradients), (found, found_gradients) = results
    assert found == pytest.approx(expected)
    assert len(found_gradients) == 4
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, msg=name)


def test_checkpointed_training_is_one_graph() -> None:
    results = []
    for compiled in (False, True):
        net = packed("Llama", "W4A16 group")
        net.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        def loss(ids: torch.Tensor, net: Any = net) -> torch.Tensor:
            return net(input_ids=ids, use_cache=False).logits.square().mean()

        step = torch.compile(loss, fullgraph=True, backend=EAGER) if compiled else loss
        results.append(losses_and_gradients(net, step, [2]))
    assert graphs() == 1
    assert results[0][0] == pytest.approx(results[1][0])
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= results[0][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=name)


@pytest.mark.parametrize(("model", "config"), [("Llama", "W8A8"), ("Mixtral", "W4A16 group")])
def test_inductor(model: str, config: str) -> None:
    net = packed(model, config)
    compiled = torch.compile(net.forward, fullgraph=True)
    tokens = greedy(net, compiled, prompt(2), new=3)
    assert graphs() == 1
    assert torch.equal(tokens, greedy(net, net, prompt(2), new=3))
