"""The switch that makes plain transformers run through this library; it imports transformers when it is used."""

from __future__ import annotations

from contextlib import AbstractContextManager

__all__ = ["disable_transformers", "enable_transformers"]


def enable_transformers() -> AbstractContextManager[None]:
    """Make transformers run ``compressed-tensors`` checkpoints packed, through this library, until further notice.

    From here on ``AutoModelForCausalLM.from_pretrained(path)``, ``pipeline(..., model=path)`` and whatever else of
    transformers loads such a checkpoint gives a model of compressed modules, for which compressed-tensors need not be
    installed, and what does not fit is a :class:`CheckpointError` instead of random weights.
    ``CompressedTensorsConfig(dequantize=True)`` as ``quantization_config=`` gives plain dense modules. A
    ``quantization_config=`` for a dense checkpoint compresses it while it is loaded; it may also be a
    :class:`QuantizationConfig` or its ``to_dict()``.

    What this library does not serve goes to transformers' own quantizer, and a :class:`CompressedFormatWarning` says
    why. :func:`disable_transformers` gives transformers back what it had; so does the end of a ``with`` block around
    this call, unless it was enabled before. Calling it again changes nothing.
    """
    from compressed_format.integrations.takeover import enable

    return enable()


def disable_transformers() -> None:
    """Undo :func:`enable_transformers`; models that are loaded stay as they are. Calling it again changes nothing."""
    from compressed_format.integrations.takeover import disable

    disable()
