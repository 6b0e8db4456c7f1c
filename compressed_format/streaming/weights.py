"""The weights of an uncompressed checkpoint that a config may reach, found by names and shapes; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from frozendict import frozendict

from compressed_format.checkpoint import Checkpoint, TensorSpec
from compressed_format.config.experts import ExpertStack
from compressed_format.config.layers import layer_class
from compressed_format.dtypes import DTYPES
from compressed_format.streaming.sources import SourceFile, SourceMatrix, StoredTensorSpan

__all__ = ["INTERLEAVED", "FusedExperts", "SourceWeight", "fused_experts", "source_weights"]

INTERLEAVED = frozenset({"gpt_oss"})
"""Model types whose fused experts have the rows of gate and up in turn. All others have gate's before up's."""

_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class SourceWeight:
    """A matrix that can be compressed; ``tensor`` is the stored tensor that it is, or is a part of."""

    module: str
    kind: str
    tensor: str
    matrix: SourceMatrix


@dataclass(frozen=True)
class FusedExperts:
    """Experts of a layer, stacked in 3-D tensors: ``tensors`` has the spec of each by the name of its projections.

    ``called`` has the name of each projection that a checkpoint has where experts are stored one by one, and ``parent``
    what stands before their numbers there.
    """

    name: str
    stack: ExpertStack
    tensors: Mapping[str, TensorSpec]
    transposed: bool
    interleaved: bool
    parent: str
    called: Mapping[str, str] = field(default_factory=frozendict)

    def weights(self, files: Mapping[str, SourceFile]) -> list[SourceWeight]:
        """Each projection of each expert."""
        found = []
        for expert in range(self.stack.num_experts):
            for parameter, spec in self.tensors.items():
                projections = _FUSED[parameter]
                for number, projection in enumerate(projections):
                    module = f"{self.parent}.{expert}.{self.called.get(projection, projection)}"
                    matrix = self._matrix(spec, files[spec.file], expert, number, len(projections))
                    found.append(SourceWeight(module, "Linear", f"{self.name}.{parameter}", matrix))
        return found

    def _matrix(self, spec: TensorSpec, file: SourceFile, expert: int, number: int, count: int) -> SourceMatrix:
        _, rows, columns = spec.shape
        size = rows * columns * (DTYPES[spec.dtype].bits // 8)
        stored = StoredTensorSpan(file, spec.dtype, (rows, columns), spec.start + expert * size)
        features = (columns if self.transposed else rows) // count
        interleaved = self.interleaved and count > 1
        first, step = (number, count) if interleaved else (number * features, 1)
        return SourceMatrix(stored, features, transposed=self.transposed, first=first, step=step)


def source_weights(
    checkpoint: Checkpoint, files: Mapping[str, SourceFile], known: Mapping[str, Sequence[str]]
) -> dict[str, SourceWeight]:
    """The matrices ``X.weight`` of floats that belong to a Linear or an Embedding, by module.

    ``known`` has the classes of modules whose architecture is known; names tell the others.
    """
    found = {}
    for name in checkpoint:
        module, _, suffix = name.rpartition(".")
        spec = checkpoint.spec(name)
        if module and suffix == "weight" and len(spec.shape) == 2 and _is_float(spec):
            if module in known:
                kind = next((kind for kind in ("Embedding", "Linear") if kind in known[module]), None)
            else:
                kind = layer_class(module)
            if kind is not None:
                matrix = SourceMatrix.whole(StoredTensorSpan.of(spec, files[spec.file]))
                found[module] = SourceWeight(module, kind, name, matrix)
    return found


def fused_experts(checkpoint: Checkpoint, model_type: str | None) -> dict[str, FusedExperts]:
    """The modules ``….experts`` whose weights are stacked in 3-D tensors.

    Whether they are transposed, the shapes of gate, up and down tell; whether rows alternate, only the architecture.
    """
    tensors: dict[str, dict[str, TensorSpec]] = {}
    for name in checkpoint:
        module, _, parameter = name.rpartition(".")
        spec = checkpoint.spec(name)
        if parameter in _FUSED and len(spec.shape) == 3 and _is_float(spec) and module.endswith("experts"):
            tensors.setdefault(module, {})[parameter] = spec
    found = {}
    for module, specs in tensors.items():
        up = "gate_up_proj" if "gate_up_proj" in specs else "up_proj"
        if up not in specs or "down_proj" not in specs or len(specs) != 2:
            continue
        transposed = _transposed(specs[up].shape, specs["down_proj"].shape, len(_FUSED[up]))
        if transposed is None:
            continue
        stack = ExpertStack(specs[up].shape[0], (*_FUSED[up], "down_proj"))
        ordered = {parameter: specs[parameter] for parameter in (up, "down_proj")}
        found[module] = FusedExperts(module, stack, ordered, transposed, model_type in INTERLEAVED, module)
    return found


def _transposed(up: tuple[int, ...], down: tuple[int, ...], projections: int) -> bool | None:
    """Whether ``[E, I, O]`` is stored instead of ``[E, O, I]``; None for shapes that fit neither."""
    experts, inner_rows, hidden = up
    if (experts, hidden, inner_rows) == (down[0], down[1], down[2] * projections):
        return False
    if (experts, inner_rows, hidden) == (down[0], down[2], down[1] * projections):
        return True
    return None


def _is_float(spec: TensorSpec) -> bool:
    dtype = DTYPES[spec.dtype]
    return dtype.is_float and not dtype.name.startswith("complex")
