"""Every kind of model in every format: the table "Models and formats" of the README, one cell after the other."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from frozendict import frozendict
from packaging.version import Version
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from compressed_format import compress, decompress, enable_transformers, load_compressed, save_compressed
from compressed_format.modules.base import CompressedModule, compressed_modules
from compressed_format.modules.experts import CompressedExpertLinear
from tests.checks import assert_same_bits, use_exact_products
from tests.integrations.every_model import FORMATS, KINDS
from tests.integrations.oracles import dense_twin
from tests.models import read_tensors, recorded_warnings

SPARSE = (
    "this checkpoint is sparse: it loads here and in compressed-tensors up to 0.14, not in vLLM, SGLang or a newer "
    "compressed-tensors"
)
NO_SOURCE = "no source folder is known for this model, so no tokenizer was written; pass source="

README = Path(__file__).parents[2] / "README.md"


class Pair:
    """A kind of model compressed to a format, in memory and in a folder."""

    def __init__(self, kind: str, format: str, folder: Path) -> None:
        self.kind, self.format, self.folder = KINDS[kind], FORMATS[format], folder
        self.names = kind, format
        self.model = compress(self.kind.build(), self.format.config(self.kind), calibration=[self.kind.inputs()])
        with recorded_warnings() as texts:
            save_compressed(self.model, folder)
        assert texts == ([SPARSE] if self.format.sparsity else []) + [NO_SOURCE]

    @cached_property
    def output(self) -> torch.Tensor:
        return self.run(self.model)

    @cached_property
    def oracle(self) -> nn.Module:
        """Dense, rounding activations where the scheme does."""
        return dense_twin(self.model)

    @cached_property
    def tolerance(self) -> float:
        """How far outputs may be from the oracle's, as the root of a mean square.

        Where activations are rounded, sums in another order may round a few of them to the neighbouring step: a
        tenth of what all the rounding makes out.
        """
        expected = self.run(self.oracle)
        if self.format.inputs is None:
            return 1e-5 * root_mean_square(expected)
        return 0.1 * root_mean_square(expected - self.run(decompress(load_compressed(self.folder))))

    def run(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.kind.inputs()).logits

    def generate(self, model: Any) -> torch.Tensor:
        inputs = {name: value for name, value in self.kind.inputs().items() if name in (self.kind.prompt or ())}
        return model.generate(**inputs, max_new_tokens=4, do_sample=False)


@pytest.fixture(
    scope="module",
    params=[pytest.param((kind, format), id=f"{kind} | {format}") for kind in KINDS for format in FORMATS],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("every_model")
    yield Pair(*request.param, folder / "x")
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def exact_products_of_rounded_activations(request: pytest.FixtureRequest) -> None:
    """The oracle's outputs are met as long as no code of an activation is another."""
    if "pair" in request.fixturenames and request.getfixturevalue("pair").format.inputs is not None:
        request.getfixturevalue("exact_products")


def root_mean_square(values: torch.Tensor) -> float:
    assert values.isfinite().all()
    return float(values.square().mean().sqrt())


def held(model: nn.Module) -> Counter[tuple[Any, ...]]:
    """Last name, dtype and shape of every parameter and stored buffer, each memory once, experts one by one."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for module in model.modules():
        left_out = module._non_persistent_buffers_set
        tensors = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in left_out}}
        for name, tensor in tensors.items():
            if tensor is not None:
                parts = tensor.data.unbind() if isinstance(module, CompressedExpertLinear) else [tensor]
                found[id(tensor)] = [(name, part.dtype, tuple(part.shape)) for part in parts]
        if isinstance(module, CompressedModule):  # and nothing is kept beside them
            rest = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
            assert not [leaf for leaf in tree_leaves(rest) if isinstance(leaf, torch.Tensor)]
    return Counter(description for descriptions in found.values() for description in descriptions)


def passing_buffers(model: nn.Module) -> dict[str, int]:
    """The bytes of every buffer that no file has."""
    return {
        f"{place}.{name}": module._buffers[name].nbytes
        for place, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None
    }


def assert_packed(model: nn.Module, pair: Pair) -> None:
    """``model`` holds what the file has, tensor by tensor and byte for byte, and not more."""
    stored = read_tensors(pair.folder)
    in_file = Counter((name.rpartition(".")[2], one.dtype, tuple(one.shape)) for name, one in stored.items())
    assert held(model) == in_file
    assert passing_buffers(model) == passing_buffers(pair.model)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    passing = sum(passing_buffers(model).values())
    assert sum(one.nbytes for one in tensors.values()) == sum(one.nbytes for one in stored.values()) + passing


# What a cell of the table stands for ---------------------------------------------------------------------------------


def test_all_that_can_be_is_compressed(pair: Pair) -> None:
    """Every Linear, every expert's too, and the embedding where it was asked for."""
    dense = pair.kind.build()
    ignored = re.compile("|".join(entry.removeprefix("re:") for entry in pair.kind.ignore) or "(?!)")
    linears = {name for name, module in dense.named_modules() if type(module) is nn.Linear}
    expected = {name for name in linears if not ignored.match(name)}
    if pair.kind.embeddings:
        expected |= {name for name, module in dense.named_modules() if isinstance(module, nn.Embedding)}
    reached = compressed_modules(pair.model)
    experts = {name for name, module in reached.items() if isinstance(module, CompressedExpertLinear)}
    assert reached.keys() - experts == expected
    assert len(expected) >= 4
    stacks = {name.rpartition(".")[0] for name in experts}
    assert bool(stacks) == pair.kind.experts
    for stack in stacks:
        left = dict(pair.model.get_submodule(stack).named_parameters(recurse=False))
        assert all(name.endswith("bias") for name in left)
    for module in reached.values():
        assert sum(one.nbytes for one in module.parameters()) < 0.4 * module.weight.nbytes
    assert root_mean_square(pair.run(dense) - pair.output) > pair.tolerance


def test_saved_and_loaded_it_computes_the_same_and_stays_packed(pair: Pair) -> None:
    loaded = load_compressed(pair.folder)
    assert type(loaded) is type(pair.model)
    assert_packed(loaded, pair)
    output = pair.run(loaded)
    assert_same_bits(output, pair.output)
    distance = root_mean_square(output - pair.run(pair.oracle))
    assert distance <= pair.tolerance
    if pair.kind.experts and pair.format.inputs is not None:
        assert 2 * distance < root_mean_square(output - pair.run(dense_twin(pair.model, experts=False)))
    if pair.kind.prompt is not None and pair.format.inputs is None:
        assert torch.equal(pair.generate(loaded), pair.generate(pair.oracle))
    assert_packed(loaded, pair)


@pytest.mark.parametrize("format", [name for name, format in FORMATS.items() if format.inputs is not None])
def test_kernels_that_round_activations(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels sum in another order rounds some activations otherwise, which is far less than rounding them is."""
    found = Pair("Llama", format, tmp_path / "x")
    with monkeypatch.context() as patch:
        use_exact_products(patch)
        exact = found.run(found.model)
    plain = found.run(decompress(load_compressed(found.folder)))
    assert root_mean_square(found.output - exact) <= 0.5 * root_mean_square(plain - exact)


def test_plain_transformers_runs_it_packed(pair: Pair) -> None:
    before = AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    with enable_transformers():
        loaded = type(pair.model).from_pretrained(pair.folder)
    assert AUTO_QUANTIZER_MAPPING["compressed-tensors"] is before
    assert_packed(loaded, pair)
    assert_same_bits(pair.run(loaded), pair.output)
    assert_packed(loaded, pair)


# The same files, read by transformers and compressed-tensors 0.20.0 --------------------------------------------------

SAME, UNROUNDED, OTHER, FAILS = "=", "≈", "≠", "x"
"""What becomes of a file there: the same outputs; the same, but that inputs of experts are not rounded; other outputs
without an error; an error."""

PEER: Mapping[str, str] = frozendict(
    {
        "Llama": "= x = = = = = = = x",
        "Llama, tied": "= x = = = = = = = x",
        # With FP8 the head gets the codes of the embedding, and no scale.
        "Llama, tied, embedding and head quantized": "x x x x x x ≠ ≠ ≠ x",
        "Gemma, tied": "= x = = = = = = = x",
        "Gemma 3, tied": "= x = = = = = = = x",
        "Gemma 3, tied, embedding and head quantized": "x x x x x x ≠ ≠ ≠ x",
        "Mixtral": "= x = = x x ≈ ≈ ≈ x",
        "Qwen3-MoE": "= x = = x x ≈ ≈ ≈ x",
        # kv_b_proj has a head's inputs in four dimensions, and there they share one scale instead of one a token.
        "DeepSeek-V3": "= x = = x x ≠ ≈ ≈ x",
        # Experts stored one by one are not found, and stay as they were initialised.
        "GPT-OSS": "≠ x ≠ ≠ ≠ ≠ ≠ ≠ ≠ x",
        "Llava": "= x = = = = = = = x",
        "Qwen2.5-VL": "= x = = = = = = = x",
        "T5": "x x x x = = = = = x",
        "Whisper": "= x = = = = = = = x",
        "BERT": "= x = = = = = = = x",
    }
)
"""The formats of each kind, in the order of ``FORMATS``, with the newest transformers 5."""

OLDEST: Mapping[str, Mapping[str, str]] = frozendict(
    {
        "W4A16 asymmetric": dict.fromkeys(
            ["Llama", "Llama, tied", "Gemma, tied", "Gemma 3, tied", "Llava", "Qwen2.5-VL", "Whisper", "BERT"], SAME
        )
        | {"GPT-OSS": OTHER},
    }
)
"""What is otherwise with 5.17: by format, then kind."""


def expected_of_peer(kind: str, format: str) -> str:
    newest = dict(zip(FORMATS, PEER[kind].split(), strict=True))[format]
    if Version(transformers.__version__) >= Version("5.23"):
        return newest
    return OLDEST.get(format, {}).get(kind, newest)


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """What is left as memory was when it was allocated may else hold the very weights that another model had there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def read_by_peer(pair: Pair) -> str:
    try:
        with uninitialized_is_nan():
            model = type(pair.model).from_pretrained(pair.folder)
        output = pair.run(model)
    except (AttributeError, NotImplementedError, RuntimeError):
        return FAILS
    if not output.isfinite().all():
        return OTHER
    found = {SAME: pair.output}
    if pair.kind.experts and pair.format.inputs is not None:
        found[UNROUNDED] = pair.run(dense_twin(pair.model, experts=False))
    distance, nearest = min((root_mean_square(output - expected), name) for name, expected in found.items())
    return nearest if distance <= pair.tolerance else OTHER


def test_the_peer_reads_it_or_not_as_the_table_says(pair: Pair) -> None:
    """Should another release of transformers or compressed-tensors do otherwise, this test says so."""
    assert read_by_peer(pair) == expected_of_peer(*pair.names)


# The table of the README ---------------------------------------------------------------------------------------------


def readme_table() -> str:
    """What the tests above have found to be so, for the newest transformers 5."""
    cells = {SAME: "✓ =", UNROUNDED: "✓ ≈", OTHER: "✓ ≠", FAILS: "✓"}
    rows = [["", *FORMATS], ["---"] * (len(FORMATS) + 1)]
    rows += [[kind, *(cells[found] for found in PEER[kind].split())] for kind in KINDS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_readme_has_the_table() -> None:
    assert PEER.keys() == KINDS.keys()
    assert readme_table() in README.read_text()
