"""``save_compressed``: a compressed model as a checkpoint folder that every reader of the format understands."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_format.checkpoint import write_checkpoint
from compressed_format.checkpoint.companions import companion_files
from compressed_format.compression.attached_config import config_of
from compressed_format.config import (
    FORMAT_VERSION,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    expand_ignore,
    resolve_targets,
)
from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.errors import CheckpointError, CompressedFormatWarning, ConfigError, FormatError, Problem
from compressed_format.model_origin import diffusers_class_name, is_diffusers_model, is_transformers_model
from compressed_format.modules.base import is_split
from compressed_format.modules.experts import stored_modules, unstacked_state
from compressed_format.renaming import module_names, rename_modules

__all__ = ["save_compressed", "saved_config"]


def save_compressed(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a compressed ``model`` to the folder ``path``: safetensors, index and ``config.json``, all or nothing.

    ``source`` is the folder of the dense model: its tokenizer and other files are copied, and the keys of its
    ``config.json`` kept if it describes this model, and not one that it is a part of. It defaults to the local folder
    that a model of transformers or diffusers was loaded from. ``ignore`` in the written config lists every Linear that
    is not quantized, as all readers want it. The files of a model of diffusers have the names that its pipelines look
    for, ``diffusion_pytorch_model.safetensors`` and so on. ``progress`` is called with the
    bytes written and their total. A model that is split between processes is saved by all of them together: the first
    one gathers the tensors in its memory, and writes them.

    Raises :class:`CheckpointExistsError` if ``path`` holds something and ``overwrite`` is not set,
    :class:`CheckpointError` if the model holds adapters of PEFT, and :class:`FormatError` if it holds no compressed
    module, or one that its config does not describe.
    """
    _refuse_adapters(model)
    config = saved_config(model)
    tensors, names = _stored_tensors(model)
    # Whoever loads the tensors by the checkpoint's names goes by these in the config too; whoever loads them through
    # transformers, by those of the model.
    config = rename_modules(config, module_names(names), keep=True)
    if config.sparsity_config is not None:
        message = (
            "this checkpoint is sparse: it loads here and in compressed-tensors up to 0.14, "
            "not in vLLM, SGLang or a newer compressed-tensors"
        )
        warnings.warn(message, CompressedFormatWarning, stacklevel=2)
    folder = _source_folder(model, source)
    if folder is None and _is_pretrained(model):
        message = "no source folder is known for this model, so no tokenizer was written; pass source="
        warnings.warn(message, CompressedFormatWarning, stacklevel=2)
    files = _files(model, folder, Path(path))
    files["config.json"] = _config_json(model, folder, config)
    write = partial(
        write_checkpoint,
        path,
        files=files,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
        stem="diffusion_pytorch_model" if is_diffusers_model(model) else "model",
    )
    if any(is_split(tensor) for tensor in tensors.values()):
        from compressed_format.parallel.gathering import first_process_alone, gather_to_first

        whole = gather_to_first(tensors)
        first_process_alone(lambda: write(whole))
    else:
        write(tensors)


def _refuse_adapters(model: nn.Module) -> None:
    """Adapters rename the layers that they wrap: nobody would find the weights under these names."""
    names = [name for name, module in model.named_modules() if type(module).__module__.partition(".")[0] == "peft"]
    if names:
        found = ", ".join(name or "the model itself" for name in names[:2])
        raise CheckpointError(
            f"the model holds adapters of PEFT ({found}, …): save these by its own save_pretrained(); unload() them to "
            "save the packed model, or decompress() it first and merge_and_unload() to save both as one"
        )


def saved_config(model: nn.Module) -> QuantizationConfig:
    """The model's config, with ``ignore`` complete; checked against what its modules really are."""
    compressed = stored_modules(model)
    config = config_of(model)
    if not compressed or config is None:
        parts = [name for name, part in model.named_modules() if name and config_of(part) is not None]
        if compressed and parts:
            message = f"compress() was called with {', '.join(parts)} alone: save that, or decompress() it and compress"
            raise FormatError(f"{message} the whole model, with the rest in ignore")
        if compressed:
            message = "the model holds compressed modules and no config, as part of one that was compressed or loaded"
            raise FormatError(f"{message}: save that whole")
        raise FormatError("the model holds no compressed modules; call compress(model, config) first")
    resolution = resolve_targets(model, config, quantized=compressed)
    problems = []
    for name, module in compressed.items():
        assignment = resolution.assignments.get(name)
        if assignment is None and module.scheme is None and module.sparsity is None:
            continue  # a projection of experts that is held uncompressed beside compressed ones
        if assignment is None:
            problems.append(Problem(name, "is compressed, but no target of the model's config reaches it"))
        elif assignment.sparsity != module.sparsity or not _mean_the_same(assignment.scheme, module.scheme):
            message = f"is compressed as {module.extra_repr()}, but its config says {assignment.reason}"
            problems.append(Problem(name, message))
    if problems:
        raise FormatError("the model is not what its config says:", problems)
    left_dense = [name for name in resolution.assignments if name not in compressed]
    ignore = dict.fromkeys((*config.ignore, *expand_ignore(model, resolution), *left_dense))
    # A config that was read with warnings would not pass as an author's; what is changed here needs no check.
    changes = {
        "ignore": tuple(ignore),
        "quantization_status": QuantizationStatus.COMPRESSED,
        "version": FORMAT_VERSION,
    }
    return config.model_copy(update=changes)


def _mean_the_same(scheme: QuantizationScheme | None, other: QuantizationScheme | None) -> bool:
    """Whether schemes are equal but for targets, which may have got other names since a module was compressed."""
    if scheme is None or other is None or scheme is other:
        return scheme is other
    return scheme.model_copy(update={"targets": ()}) == other.model_copy(update={"targets": ()})


def _is_pretrained(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "save_pretrained") and not is_diffusers_model(model)


def _stored_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors by the checkpoint's names, and these names by the model's, from which transformers' may differ."""
    tensors = unstacked_state(model)
    if not _is_pretrained(model):
        return tensors, {name: name for name in tensors}
    from compressed_format.integrations.checkpoint_names import stored_tensors

    compressed = stored_modules(model)
    packed = {name for name in tensors if name.rpartition(".")[0] in compressed}
    return stored_tensors(model, tensors, packed)


def _source_folder(model: nn.Module, source: str | os.PathLike[str] | None) -> Path | None:
    if source is not None:
        folder = Path(source)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: the source is not a folder")
        return folder
    if is_diffusers_model(model):
        from compressed_format.integrations import diffusers

        return diffusers.source_folder(model)
    known = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(known) if known and Path(known).is_dir() else None


def _files(model: nn.Module, folder: Path | None, destination: Path) -> dict[str, bytes | Path]:
    """What of ``folder`` is no weight, and how the model generates."""
    files = {} if folder is None else companion_files(folder, destination)
    generation: Any = getattr(model, "generation_config", None)
    if "generation_config.json" not in files and hasattr(generation, "to_json_string"):
        files["generation_config.json"] = generation.to_json_string().encode()
    return files


def _config_json(model: nn.Module, folder: Path | None, config: QuantizationConfig) -> bytes:
    """``config.json``: the source's, or else the model's, with its class and ``quantization_config`` put in."""
    model_config: Any = getattr(model, "config", None)
    source = None if folder is None else folder / "config.json"
    content = None
    if source is not None and source.is_file():
        content = parse_json(read_bytes(source), str(source))
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: must be a JSON object, not {type(content).__name__}")
    if content is None or not _describes(content, model):
        content = _own_config(model)
    if is_transformers_model(model):
        # The source's may be another class of the same config, such as that with a head. FSDP derives its own.
        content["architectures"] = [type(model).__name__.removeprefix("FSDP")]
    if getattr(model_config, "tie_word_embeddings", None) is False and content.get("tie_word_embeddings", True):
        content["tie_word_embeddings"] = False
    # The two other places where readers look for it.
    content.pop("compression_config", None)
    if isinstance(content.get("text_config"), dict):
        content["text_config"].pop("quantization_config", None)
    content["quantization_config"] = config.to_dict()
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _describes(content: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether the content of a ``config.json`` is of this model, as far as both say what they are."""
    if is_diffusers_model(model):
        return diffusers_class_name(content) == type(model).__name__
    own = getattr(getattr(model, "config", None), "model_type", None)
    return own is None or content.get("model_type", own) == own


def _own_config(model: nn.Module) -> dict[str, Any]:
    """What a model of transformers or diffusers says of itself; nothing for any other."""
    if is_diffusers_model(model):
        from compressed_format.integrations import diffusers

        return diffusers.config_content(model)
    model_config: Any = getattr(model, "config", None)
    if not _is_pretrained(model) or model_config is None:
        return {}
    content: dict[str, Any] = json.loads(model_config.to_json_string())
    content["architectures"] = content.get("architectures") or [type(model).__name__]
    return content
