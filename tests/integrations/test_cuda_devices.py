"""Models of transformers on a GPU, and spread over a GPU, the CPU and the disk: the same as on the CPU, and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressed_format import QuantizationConfig, compress, load_compressed, save_compressed
from tests.models import LLAMA_CONFIGS, tiny_llama, token_ids

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore::compressed_format.CompressedFormatWarning")]

INT4 = LLAMA_CONFIGS["W4A16 group"]


def tiny_mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, tie_word_embeddings=False)).eval()


def saved(model: Any, config: QuantizationConfig, folder: Path) -> torch.Tensor:
    """Save the compressed model, and return its logits on the CPU."""
    compress(model, config, calibration=[{"input_ids": token_ids()}])
    save_compressed(model, folder)
    with torch.no_grad():
        return model(token_ids()).logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids().to("cuda")).logits.cpu()


def held(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("name", list(LLAMA_CONFIGS))
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_a_model_runs_on_the_gpu(build: Any, name: str, tmp_path: Path) -> None:
    expected = saved(build(), LLAMA_CONFIGS[name], tmp_path / "packed")
    model = load_compressed(tmp_path / "packed", device_map={"": 0})
    before = held(model)
    # TF32 is off by default; codes of activations may still differ where a sum of another order falls between two.
    tolerance = 1e-4 if "A16" in name else 0.05
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)
    assert held(model) == before
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("last", ["cpu", "disk"])
def test_a_model_is_spread_over_devices(build: Any, last: str, tmp_path: Path) -> None:
    expected = saved(build(), INT4, tmp_path / "packed")
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": last, "model.norm": 0, "lm_head": 0}
    device_map["model.rotary_emb"] = 0
    model = load_compressed(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offloaded")
    before = held(model)
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert held(model) == before
    tokens = model.generate(token_ids().cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = load_compressed(tmp_path / "packed", device_map={"": 0})
    assert torch.equal(tokens, whole.generate(token_ids().cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_map_of_two_gpus(tmp_path: Path) -> None:
    expected = saved(tiny_mixtral(), INT4, tmp_path / "packed")
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    device_map["model.rotary_emb"] = 0
    model = load_compressed(tmp_path / "packed", device_map=device_map)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    automatic = load_compressed(tmp_path / "packed", device_map="auto")
    torch.testing.assert_close(logits(automatic), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_a_compiled_model_on_the_gpu(build: Any, tmp_path: Path) -> None:
    saved(build(), INT4, tmp_path / "packed")
    model = load_compressed(tmp_path / "packed", device_map={"": 0})
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-3, atol=1e-3)


def test_gradients_pass_through_experts_on_the_gpu() -> None:
    model = compress(tiny_mixtral().cuda(), INT4)
    embedded = model.get_input_embeddings()(token_ids().cuda()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    on_cpu = compress(tiny_mixtral(), INT4)
    expected = embedded.detach().cpu().requires_grad_()
    on_cpu(inputs_embeds=expected).logits.square().sum().backward()
    torch.testing.assert_close(embedded.grad.cpu(), expected.grad, rtol=1e-3, atol=1e-3)


def test_a_weight_tells_its_device_without_being_dense() -> None:
    model = compress(tiny_llama().cuda(), INT4)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.device == torch.device("cuda", 0)
    assert weight.is_cuda
    assert torch.equal(weight.cpu(), compress(tiny_llama(), INT4).model.layers[0].mlp.up_proj.weight.clone())


def test_a_model_is_compressed_on_the_gpu_as_it_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compressed_format import enable_transformers

    tiny_llama().save_pretrained(tmp_path / "dense")
    with enable_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=INT4.to_dict(), device_map={"": 0}
        )
    expected = compress(tiny_llama(), INT4)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name
