"""What ``load_compressed(path, model=skeleton)`` takes beyond building the skeleton, in milliseconds per 1000 tensors.

    python benchmarks/load.py [part of a case's name ...]

Each case is a checkpoint of W4A16 in groups of 128, whose files are sparse: weights are zeros, and only headers and
``weight_shape`` are written. It is read once before it is measured, so that it comes from the page cache. What is
timed is the call of ``load_compressed`` alone, with a skeleton that was built before: on the meta device, each time
afresh.

Printed are the least time of this process on a CPU among all runs, so that whatever else the machine does counts as
little as it can; what it makes for 1000 tensors of the file, and whether that is within the bound; how large the file
is; and ratios to what a user would pick instead (above 1 is faster here): ``load_file`` of
safetensors with ``load_state_dict(assign=True)`` into a model that is compressed already (``safetensors``), and for
models of transformers ``from_pretrained`` with compressed-tensors, less the time that building the model takes
(``ct``).

One thing takes time by the byte, is part of the time, and is measured alone over the same tensors as well: copying
experts, which are stored one by one, into stacks.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from compressed_format import QuantizationConfig, load_compressed
from compressed_format.checkpoint import read_checkpoint
from compressed_format.checkpoint.header import build_header, byte_size

BOUND = 20.0
"""Milliseconds per 1000 tensors."""
REPEATS = 15
GROUP = 128
VOCABULARY = 512

Specs = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Size:
    """A decoder's sizes; ``experts`` is 0 for a dense one, and else ``intermediate`` is that of one expert."""

    layers: int
    hidden: int
    intermediate: int
    experts: int = 0


@dataclass(frozen=True)
class Case:
    name: str
    size: Size
    of_transformers: bool = False

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            if not self.of_transformers:
                return Decoder(self.size)
            kind = transformers.Qwen3MoeForCausalLM if self.size.experts else transformers.LlamaForCausalLM
            model = kind(model_config(self.size))
        # Computed, and in no file: outside of from_pretrained whoever builds on the meta device has to give it.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        return model


CASES = (
    Case("plain", Size(32, 128, 256)),
    Case("plain, 100 times larger", Size(32, 1280, 2560)),
    Case("plain, 8B", Size(32, 4096, 14336)),
    Case("plain, 10 times as many", Size(320, 128, 256)),
    Case("transformers Llama", Size(32, 128, 256), of_transformers=True),
    Case("transformers Llama, 100 times larger", Size(32, 1280, 2560), of_transformers=True),
    Case("transformers Llama, 10 times as many", Size(320, 128, 256), of_transformers=True),
    Case("transformers Qwen3-MoE", Size(16, 128, 128, 128), of_transformers=True),
    Case("transformers Qwen3-MoE, 16 times larger", Size(16, 512, 512, 128), of_transformers=True),
)


class Decoder(nn.Module):
    """The modules of a Llama under its names, without a forward."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, size.hidden)
        self.model.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.model.norm = nn.RMSNorm(size.hidden)
        self.lm_head = nn.Linear(size.hidden, VOCABULARY, bias=False)


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(size.hidden, size.hidden, bias=False))
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.mlp.up_proj = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.mlp.down_proj = nn.Linear(size.intermediate, size.hidden, bias=False)
        self.input_layernorm = nn.RMSNorm(size.hidden)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden)


def model_config(size: Size) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.hidden // 64,
        "head_dim": 64,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if not size.experts:
        return transformers.LlamaConfig(**common, intermediate_size=size.intermediate)
    return transformers.Qwen3MoeConfig(**common, num_experts=size.experts, moe_intermediate_size=size.intermediate)


def main() -> None:
    chosen = [case for case in CASES if not sys.argv[1:] or any(word in case.name for word in sys.argv[1:])]
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} threads; the bound is {BOUND:.0f} ms per 1000 tensors")
    columns = ("tensors", "MB", "ms", "ms/1000", "bound", "stacking", "safetensors", "ct")
    print(f"{'':<42}" + "".join(f"{column:>12}" for column in columns))
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            measure(case, Path(folder))


def measure(case: Case, folder: Path) -> None:
    count, size = write_checkpoint(case, folder)
    warm(folder)
    ours = seconds(lambda model: load_compressed(folder, model=model), case.skeleton)
    checkpoint = read_checkpoint(folder)
    stacked = seconds(lambda _: stacks(checkpoint)) if case.size.experts else None
    stacked_bytes = sum(checkpoint.spec(name).nbytes for name in checkpoint if ".experts." in name)
    loaded = load_compressed(folder, model=case.skeleton())
    theirs = seconds(lambda _: assign(loaded, folder, case.size.experts > 0))
    peer = peer_seconds(case, folder) if case.of_transformers else None
    rate = 1e3 * ours / (count / 1000)
    cells = (
        f"{count}",
        f"{size / 1e6:.0f}",
        f"{1e3 * ours:.1f}",
        f"{rate:.1f}",
        "met" if rate <= BOUND else f"{rate / BOUND:.1f} times",
        "" if stacked is None else f"{stacked_bytes / stacked / 1e9:.2f} GB/s",
        f"{theirs / ours:.2f}",
        "" if peer is None else f"{peer / ours:.2f}",
    )
    print(f"{case.name:<42}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def write_checkpoint(case: Case, folder: Path) -> tuple[int, int]:
    """A folder of one sparse file, laid out as safetensors lays out what it writes: by falling item size, then by name.

    Returns how many tensors it holds, and how many bytes it takes.
    """
    specs: Specs = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in dense_shapes(case.size).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            specs[name] = "bfloat16", shape
            continue
        rows, columns = shape
        specs[f"{module}.weight_packed"] = "int32", (rows, columns // 8)
        specs[f"{module}.weight_scale"] = "bfloat16", (rows, columns // GROUP)
        specs[f"{module}.weight_shape"] = "int64", (2,)
        shapes[f"{module}.weight_shape"] = rows, columns
    sizes = {"int64": 8, "int32": 4, "bfloat16": 2}
    specs = dict(sorted(specs.items(), key=lambda item: (-sizes[item[1][0]], item[0])))
    header = build_header(((name, *spec) for name, spec in specs.items()), {"format": "pt"})
    position = len(header)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for name, (dtype, shape) in specs.items():
            if name in shapes:
                file.seek(position)
                file.write(b"".join(size.to_bytes(8, "little") for size in shapes[name]))
            position += byte_size(dtype, shape)
        file.truncate(position)
    config = QuantizationConfig.preset("W4A16").replace(ignore=("lm_head",)).to_dict()
    # Routers are dense in files, too, and readers look for a Linear of that name.
    config["ignore"] += ["re:.*mlp.gate$"] if case.size.experts else []
    content = model_config(case.size).to_dict() if case.of_transformers else {}
    if case.of_transformers:
        content["architectures"] = ["Qwen3MoeForCausalLM" if case.size.experts else "LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return len(specs), position


def dense_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """The tensors of the dense model as files have them."""
    hidden = size.hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for number in range(size.layers):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = hidden, hidden
        if size.experts:
            shapes |= {f"{layer}.self_attn.{name}.weight": (64,) for name in ("q_norm", "k_norm")}
            shapes[f"{layer}.mlp.gate.weight"] = size.experts, hidden
        parents = [f"{layer}.mlp.experts.{expert}" for expert in range(size.experts)] or [f"{layer}.mlp"]
        for parent in parents:
            shapes[f"{parent}.gate_proj.weight"] = size.intermediate, hidden
            shapes[f"{parent}.up_proj.weight"] = size.intermediate, hidden
            shapes[f"{parent}.down_proj.weight"] = hidden, size.intermediate
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def stacks(checkpoint: Any) -> list[torch.Tensor]:
    """The tensors of experts, stacked."""
    return [torch.stack([checkpoint[name] for name in names]) for names in expert_names(checkpoint).values()]


def expert_names(names: Iterable[str]) -> dict[str, list[str]]:
    """For each stacked tensor of the model: the tensors that it is made of."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        stack, _, rest = name.partition(".experts.")
        if rest:
            expert, _, of_expert = rest.partition(".")
            found.setdefault(f"{stack}.experts.{of_expert}", []).append((int(expert), name))
    return {target: [name for _, name in sorted(sources)] for target, sources in found.items()}


def assign(model: nn.Module, folder: Path, has_experts: bool) -> None:
    """What takes the place of ``load_compressed`` once a compressed model is there."""
    tensors = load_file(folder / "model.safetensors")
    if has_experts:
        for target, names in expert_names(list(tensors)).items():
            tensors[target] = torch.stack([tensors.pop(name) for name in names])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.is_floating_point())
    model.load_state_dict(tensors, assign=True)


def peer_seconds(case: Case, folder: Path) -> float | None:
    """What transformers with compressed-tensors takes, less the time that building the model takes."""

    def load(_: Any) -> None:
        transformers.AutoModelForCausalLM.from_pretrained(folder)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return seconds(load, repeats=1) - seconds(lambda _: case.skeleton(), repeats=1)
    except Exception as error:
        print(f"  transformers with compressed-tensors: {type(error).__name__}: {str(error)[:100]}")
        return None


def warm(folder: Path) -> None:
    """Read the file, so that no measurement waits for a disk."""
    with (folder / "model.safetensors").open("rb") as file:
        while file.read(1 << 24):
            pass


def seconds(
    function: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None, *, repeats: int = REPEATS
) -> float:
    """The least time on a CPU of ``function``, called with what ``prepare`` makes, whose time is not counted."""
    times = []
    for number in range(repeats + (repeats > 1)):
        argument = prepare()
        gc.collect()
        start = time.process_time()
        result = function(argument)
        times.append(time.process_time() - start)
        del result, argument
        if number == 0 and repeats > 1:
            times.clear()  # the first call fills caches
    return min(times)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
