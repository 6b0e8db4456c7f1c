"""What callers of a job choose, checked before anything is read or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from compressed_format.checkpoint import Checkpoint
from compressed_format.dtypes import DTYPES
from compressed_format.errors import CheckpointError, Problem, QuantizationError

if TYPE_CHECKING:
    import torch

__all__ = ["checked_device", "checked_dtype", "checked_workers", "refuse_destination_around"]


def checked_workers(workers: int | None) -> int | None:
    """``workers`` as it is. Raises :class:`CheckpointError` for what is no number of workers."""
    if workers is not None and (type(workers) is not int or workers < 1):
        message = f"must be at least 1, not {workers!r}; None stands for as many as there are cores"
        raise CheckpointError(problems=[Problem("workers", message)])
    return workers


def checked_device(device: torch.device | str | None, *, here: bool) -> str | None:
    """The name of the device that is to compute; with ``here``, it must be one of this process.

    Raises :class:`QuantizationError` for what is no device, for one that holds no values, and for one that is not here.
    """
    if device is None:
        return None
    import torch

    try:
        if not isinstance(device, str | torch.device):
            raise TypeError(f"it is of the type {type(device).__name__}")
        found = torch.device(device)
        if found.type == "meta":
            raise ValueError("it holds no values")
        if here:
            torch.empty(0, device=found)
    except Exception as error:  # each backend that is missing has an exception of its own
        reason = str(error).partition("\n")[0]
        message = f'{device!r} cannot compute here ({reason}); give "cpu", such as "cuda:0", or None'
        raise QuantizationError(problems=[Problem("device", message)]) from error
    return str(found)


def checked_dtype(dtype: torch.dtype | str) -> str:
    """The name of the dtype that dense weights are stored as. Raises :class:`QuantizationError` for what cannot be."""
    name = str(dtype).removeprefix("torch.")
    known = [
        dtype.name for dtype in DTYPES.values() if dtype.is_float and dtype.bits >= 16 and "complex" not in dtype.name
    ]
    if name not in known:
        message = f"{dtype!r} holds no dense weights; give one of {', '.join(f'torch.{one}' for one in sorted(known))}"
        raise QuantizationError(problems=[Problem("dtype", message)])
    return name


def refuse_destination_around(source: Checkpoint, destination: Path) -> None:
    """Raise :class:`CheckpointError` for a destination that, once it is replaced, takes the source with it.

    A checkpoint may take its own place, though: the folder that of the folder, the file that of the file.
    """
    own, target = Path(os.path.realpath(source.path)), Path(os.path.realpath(destination))
    if target == own:
        return
    files = [Path(os.path.realpath(source.folder / name)) for name in source.files]
    inside = next((path for path in (own, *files) if target == path or target in path.parents), None)
    if inside is not None:
        message = f"holds the source, or part of it ({inside}), which would be lost; choose another destination"
        raise CheckpointError(problems=[Problem(str(destination), message)])
