"""diffusers: sub-models of pipelines, each a folder whose ``config.json`` names its class as ``_class_name``.

diffusers' ``from_pretrained`` knows no quantizer for this format. Its models are built here, empty, and filled like
any other module. What they are saved as is named the way pipelines look for it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.hooks.hooks import HookRegistry
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.errors import CheckpointError, Problem
from compressed_format.integrations.model_dtype import computing_dtype
from compressed_format.model_origin import diffusers_class_name
from compressed_format.save import saved_config

__all__ = ["attach", "build", "config_content", "detach", "kept_in_float32", "source_folder"]


def build(content: Mapping[str, Any], path: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model that the ``config.json`` in ``path`` describes: parameters on the meta device, buffers with values.

    ``dtype`` is that of buffers which the model computes, where it does not say otherwise. The class is looked up
    among the models that diffusers itself exports, and nowhere else. Raises :class:`CheckpointError` if it is none of
    them, and if it cannot be built from that config.
    """
    place = path / "config.json"
    name = diffusers_class_name(content)
    model_class = _exported_model(name)
    if model_class is None:
        message = f"{name!r} is no model of diffusers {diffusers.__version__}; install one that has it, or pass model="
        raise CheckpointError(problems=[Problem(f"{place}: _class_name", message)])
    fields = {key: value for key, value in content.items() if key not in ("quantization_config", "compression_config")}
    try:
        with _parameters_on_meta(), _default_dtype(dtype):
            model = model_class.from_config(fields)
    except Exception as error:  # whatever a constructor makes of arguments out of a file
        message = f"{place}: diffusers cannot build a {name} from it ({type(error).__name__}: {error}); pass model="
        raise CheckpointError(message) from error
    model.register_to_config(_name_or_path=str(path))
    built: nn.Module = model.eval()
    return built


def attach(model: Any) -> None:
    """Have ``save_pretrained`` write the model's config, and ``model.dtype`` be the one that the model computes in."""
    model.register_to_config(quantization_config=saved_config(model).to_dict())
    if not hasattr(model, "_diffusers_hook"):
        model._diffusers_hook = _DtypeRegistry(model)


def detach(model: Any) -> None:
    """Undo :func:`attach`."""
    kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = FrozenDict(kept)  # type: ignore[no-untyped-call]
    if isinstance(getattr(model, "_diffusers_hook", None), _DtypeRegistry):
        del model._diffusers_hook


def config_content(model: Any) -> dict[str, Any]:
    """What ``config.json`` says of a model in memory, its class included, and the path it came from left out."""
    content: dict[str, Any] = json.loads(model.to_json_string())
    content.pop("_name_or_path", None)
    return content


def source_folder(model: Any) -> Path | None:
    """The local folder of this very model, if it was loaded from one.

    diffusers may have noted that of the whole pipeline instead, whose other files are not the model's.
    """
    name = model.config.get("_name_or_path")
    if not isinstance(name, (str, os.PathLike)) or not name:
        return None
    file = Path(name) / "config.json"
    if not file.is_file():
        return None
    is_its_own = diffusers_class_name(parse_json(read_bytes(file), str(file))) == type(model).__name__
    return file.parent if is_its_own else None


def kept_in_float32(model: Any) -> frozenset[str]:
    """The parts of names of parameters that are to be float32, whatever the dtype of the others."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    return frozenset([names] if isinstance(names, str) else names)


class _DtypeRegistry(HookRegistry):
    """The hooks of a model, which also say in which dtype it computes.

    Before diffusers looks for the first float among the parameters, it asks for a hook that casts layers, and for its
    dtype.
    """

    def get_hook(self, name: str) -> Any:
        hook = super().get_hook(name)
        if hook is not None or name != "layerwise_casting":
            return hook
        dtype = computing_dtype(self._module_ref, kept_in_float32(self._module_ref))
        return None if dtype is None else SimpleNamespace(compute_dtype=dtype)


def _exported_model(name: str | None) -> Any:
    """The class ``name`` among the models that diffusers exports, or None."""
    if name is None or not name[:1].isupper() or name not in dir(diffusers.models):
        return None
    found = getattr(diffusers.models, name)
    is_model = isinstance(found, type) and issubclass(found, ModelMixin) and found is not ModelMixin
    return found if is_model else None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built by this thread get parameters without memory; buffers, which files may not hold, stay as built."""
    thread = threading.get_ident()

    def without_memory(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    register: Any = register_module_parameter_registration_hook  # typed as if the hook could return nothing
    handle = register(without_memory)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
