"""Which tensors of a checkpoint are whose weight, told by their names and shapes alone: no model is needed.

A matrix ``X.weight`` belongs to a Linear, unless ``X`` is called like an embedding or a norm. Routers are Linear
modules too, which targets reach by their exact name only (:data:`~compressed_format.config.modules.ROUTERS`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["EMBEDDINGS", "NORMS", "OF_COMPRESSED", "layer_class", "layer_classes"]

EMBEDDINGS = re.compile(
    r"(\w+_)?(embed|embeds|embedding|embeddings|emb)|(embed|embedding)_(tokens|positions|in)(_per_layer)?"
    r"|tok_embeddings|wte|wpe|relative_attention_bias",
    re.ASCII,
)
"""What the last part of an embedding's name looks like, in full. T5's is called ``shared``, at the top."""
NORMS = re.compile(r"\w*norm(_?\d+)?|ln(_\w+)?", re.ASCII | re.IGNORECASE)
"""What the last part of a norm's name looks like, in full."""
OF_COMPRESSED = frozenset({"weight_packed", "weight_scale", "scale_packed", "compressed"})
"""Each compressed module has a tensor with one of these suffixes."""


def layer_class(module: str) -> str | None:
    """The class that the name of a module with a matrix for a weight suggests: Linear, Embedding, or None: a norm."""
    last = module.rpartition(".")[2]
    if EMBEDDINGS.fullmatch(last) or module == "shared":
        return "Embedding"
    return None if NORMS.fullmatch(last) else "Linear"


def layer_classes(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The class of each module of a checkpoint that can be compressed, or is: module name to ``Linear`` or
    ``Embedding``, in the order of the tensors. ``shapes`` has the shape of each tensor."""
    classes: dict[str, str] = {}
    for name, shape in shapes.items():
        module, _, suffix = name.rpartition(".")
        if module and module not in classes and (suffix in OF_COMPRESSED or (suffix == "weight" and len(shape) == 2)):
            kind = layer_class(module)
            if kind is not None or suffix in OF_COMPRESSED:
                classes[module] = kind or "Linear"
    return classes
