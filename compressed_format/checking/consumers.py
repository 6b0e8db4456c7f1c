"""Who loads a checkpoint: each consumer's rules as checks of a config and of layers, before any file is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

from frozendict import frozendict

from compressed_format.checking import codes
from compressed_format.checking.findings import Finding
from compressed_format.checking.for_llama_cpp import check_llama_cpp
from compressed_format.checking.for_sglang import check_sglang
from compressed_format.checking.for_transformers import check_transformers
from compressed_format.checking.for_vllm import check_vllm
from compressed_format.checking.plan import LayerShape, Plan
from compressed_format.config import QuantizationConfig
from compressed_format.config.report import options
from compressed_format.errors import ConfigError, Problem, TargetError

__all__ = ["CONSUMERS", "check_names", "consumer_findings"]

CONSUMERS: frozendict[str, Callable[[Plan], None]] = frozendict(
    {
        "vllm": check_vllm,
        "sglang": check_sglang,
        "transformers": check_transformers,
        "llama.cpp": check_llama_cpp,
    }
)
"""Each consumer's rules; ``docs/findings.md`` names the releases that they hold for."""


def consumer_findings(
    config: QuantizationConfig,
    layers: Mapping[str, LayerShape],
    consumers: Iterable[str],
    *,
    quantized: Container[str] = (),
    tensors: Mapping[str, Sequence[int]] | None = None,
    word_aligned: Collection[str] = (),
) -> list[Finding]:
    """Whether a checkpoint loads where it is meant to be served, and if not, by which rule.

    ``config`` is the one that is or will be written; ``layers`` are the checkpoint's Linear and Embedding modules,
    compressed or not, by name (none, where only a config is known); ``consumers`` are keys of :data:`CONSUMERS`. Of a
    checkpoint that exists, ``quantized`` are the modules known to be compressed (which decides about routers),
    ``tensors`` its tensors' names and shapes, and ``word_aligned`` the modules in the layout of releases before 0.18.

    An error says that it does not load, or that its outputs are wrong without a word. Raises :class:`ConfigError` for a
    consumer that is not known.
    """
    wanted = check_names(consumers)
    if not wanted:
        return []
    try:
        plan = Plan(config, layers, quantized=quantized, tensors=tensors, word_aligned=word_aligned)
        for name in wanted:
            CONSUMERS[name](plan)
    except TargetError as error:
        return [codes.TARGETS.of(problem) for problem in error.problems]
    return list(plan.findings())


def check_names(consumers: Iterable[str]) -> tuple[str, ...]:
    """The names without repetitions. Raises :class:`ConfigError` for one that is not known, or a bare string."""
    if isinstance(consumers, str):
        message = f"must be a list of names, not the string {consumers!r}"
        raise ConfigError(problems=[Problem("consumers", message)])
    wanted = tuple(dict.fromkeys(consumers))
    unknown = [name for name in wanted if name not in CONSUMERS]
    if unknown:
        raise ConfigError(problems=[Problem("consumers", options(name, CONSUMERS)) for name in unknown])
    return wanted
