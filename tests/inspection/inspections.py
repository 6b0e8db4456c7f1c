"""Inspections made by hand, for what shows them."""

from __future__ import annotations

from compressed_format.errors import Problem
from compressed_format.inspection.inspection import (
    InspectedModule,
    InspectedScheme,
    InspectedTensor,
    Inspection,
    LayerError,
)
from compressed_format.inspection.kernels import Kernel

HOSTILE = (
    "</script><script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "\"'><svg onload=window.hurt=1>",
    "<a href='javascript:window.hurt=1'>x</a>",
    "%{x}<b>{{ 7*7 }}</b>@series-1",
    "a\u202eb\x1b[31m\ud800",
)
PARTS = ("self_attn.q_proj", "mlp.down_proj")


def error_of(snr: float, *, row: int = 3) -> LayerError:
    """An error with a signal of 1, and a worst row 5 dB below the whole."""
    return LayerError(1.0, 10 ** (-snr / 10), row, snr - 5, 0.25)


def an_inspection(*, layers: int = 4, experts: int = 0, errors: bool = True, names: tuple[str, ...] = ()) -> Inspection:
    """A model of some ``layers`` with a part of 4 and a part of 8 bits each, and modules with these ``names``."""
    modules: list[InspectedModule] = []

    def add(name: str, scheme: int) -> None:
        # Far apart in steps that are no multiples of each other, so that no two are equal.
        error = error_of(18 + scheme * 12 + (len(modules) * 7 % 31) / 10) if errors else None
        modules.append(InspectedModule(name, "Linear", scheme, (64, 64), (2200, 4224)[scheme], error))

    for layer in range(layers):
        for scheme, part in enumerate(PARTS):
            add(f"model.layers.{layer}.{part}", scheme)
        for expert in range(experts):
            add(f"model.layers.{layer}.mlp.experts.{expert}.up_proj", 0)
    for name in names:
        add(name, 0)
    tensors = (
        InspectedTensor("model.embed_tokens.weight", "bfloat16", (500, 64), 64000),
        *(InspectedTensor(f"model.layers.{n}.input_layernorm.weight", "bfloat16", (64,), 128) for n in range(layers)),
        InspectedTensor("lm_head.weight", "bfloat16", (500, 64), 64000),
        *(InspectedTensor(f"{name}.tensor", "bfloat16", (2, 2), 8) for name in names),
    )
    schemes = []
    for index, (title, bits) in enumerate((("int4 group 64 symmetric", 4), ("int8 channel symmetric", 8))):
        alike = [module for module in modules if module.scheme == index]
        parameters = sum(module.parameters for module in alike)
        nbytes = sum(module.nbytes for module in alike)
        kernel = Kernel("linear", "cpu", "reference", "this release has no native kernel for it")
        of_groups = (64 if bits == 4 else None, None, True, None, None)
        words = ("pack-quantized", bits, "int", "group" if bits == 4 else "channel")
        sizes = (len(alike), parameters, nbytes, 2 * parameters)
        schemes.append(InspectedScheme(title, (f"group_{index}", *names[:1]), *words, *of_groups, *sizes, (kernel,)))
    problems = tuple(Problem(name, f"is <i>odd</i>: {name}") for name in names)
    return Inspection(
        path=f"/models/{(names or ('a-model',))[0].replace('/', '')}",
        files=1,
        dtype="bfloat16",
        dtype_source="config.json",
        schemes=tuple(schemes),
        modules=tuple(modules),
        tensors=tensors,
        reference="/models/dense" if errors else None,
        unmatched=problems,
        warnings=(),
    )
