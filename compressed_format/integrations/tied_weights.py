"""The table that transformers keeps of the weights that a model ties: which tensors stand for them once packed."""

from __future__ import annotations

from typing import Any

from torch import nn

from compressed_format.modules.base import CompressedModule, is_of_weight

__all__ = ["restore_ties", "retie"]

# Where a model keeps what it tied before it was compressed.
_DENSE_TIES = "_compressed_format_dense_ties"


def retie(model: nn.Module) -> None:
    """Make transformers tie the tensors of compressed modules, where these share a weight, and no others of theirs.

    It keeps a table of names of weights, which compressed modules have none of, in every model within ``model``.
    """
    for part in _models(model):
        tied: dict[str, str] = {}
        for target, source in part.all_tied_weights_keys.items():
            tied |= _tied_tensors(part, target, source)
        if tied != part.all_tied_weights_keys:
            before = part.all_tied_weights_keys, vars(part).get("_tied_weights_keys")
            vars(part).setdefault(_DENSE_TIES, before)
            # The second is asked for again whenever transformers ties anew, as when embeddings are resized.
            part.all_tied_weights_keys, part._tied_weights_keys = tied, dict(tied)


def restore_ties(model: nn.Module) -> None:
    """Undo :func:`retie` for a model that is dense again: what has been untied meanwhile stays so."""
    for part in _models(model):
        if _DENSE_TIES not in vars(part):
            continue
        tied, own = vars(part).pop(_DENSE_TIES)
        kept = {target: source for target, source in tied.items() if _tensor(part, target) is _tensor(part, source)}
        part.all_tied_weights_keys = kept
        vars(part).pop("_tied_weights_keys", None)
        if len(kept) < len(tied):
            part._tied_weights_keys = dict(kept)
        elif own is not None:
            part._tied_weights_keys = own


def _models(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "all_tied_weights_keys" in vars(module)]


def _tied_tensors(model: nn.Module, target: str, source: str) -> dict[str, str]:
    """What stands for one tie between weights, once the modules that have them may be compressed."""
    (place, _, suffix), (other_place, _, _) = target.rpartition("."), source.rpartition(".")
    own, other = (_module(model, name) for name in (place, other_place))
    packed = [isinstance(module, CompressedModule) for module in (own, other)]
    if not any(packed) or not is_of_weight(suffix):
        return {target: source}
    if own is None or other is None or not all(packed):
        return {}
    return {
        f"{place}.{name}": f"{other_place}.{name}"
        for name, parameter in own._parameters.items()
        if is_of_weight(name) and parameter is not None and parameter is other._parameters.get(name)
    }


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _tensor(model: nn.Module, name: str) -> object:
    place, _, suffix = name.rpartition(".")
    module = _module(model, place)
    return name if module is None else module._parameters.get(suffix, name)
