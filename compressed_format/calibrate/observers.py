"""Observers: each sees batches of activations and says which range their codes should span.

The names are those that configs carry in ``observer``; ``observer_kwargs`` are the keyword arguments of the class.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod

import torch
from frozendict import frozendict

from compressed_format.activations import WHOLE_TENSOR, activation_group_size
from compressed_format.config import QuantizationArgs
from compressed_format.errors import CalibrationError, Problem
from compressed_format.scales import check_shrinking, compute_scale, least_error_range

__all__ = ["OBSERVERS", "Observer", "observer_for"]

DEFAULT_OBSERVER = "minmax"


class Observer(ABC):
    """Accumulates the range of activations ``[..., n]``: one for all of them, or one for each group of ``n``."""

    def __init__(self, args: QuantizationArgs) -> None:
        self.args = args
        self.group_size = activation_group_size(args)
        self.range: tuple[torch.Tensor, torch.Tensor] | None = None

    @abstractmethod
    def _accumulate(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range so far, with ``values`` ``[ranges, observations]`` added to it."""

    def observe(self, values: torch.Tensor) -> None:
        """See one batch. NaN and infinity raise :class:`CalibrationError`."""
        if values.numel() == 0:
            return
        if not torch.isfinite(values).all():
            raise CalibrationError("the calibration data leads to NaN or infinity")
        if self.group_size == WHOLE_TENSOR:
            rows = values.reshape(1, -1)
        elif values.shape[-1] % self.group_size:
            message = f"its group_size {self.group_size} does not divide the {values.shape[-1]} values of a token"
            raise CalibrationError(message)
        else:
            rows = values.reshape(-1, values.shape[-1] // self.group_size, self.group_size)
            rows = rows.transpose(0, 1).flatten(1)
        self.range = self._accumulate(rows)

    def scale(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point ``[1]`` or ``[groups]``, in the dtype of the activations that were seen."""
        if self.range is None:
            raise CalibrationError("no calibration input reached it")
        return compute_scale(*self.range, self.args)


class MinMax(Observer):
    """The smallest and the largest value of all batches."""

    def _accumulate(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        minimum, maximum = values.amin(dim=-1), values.amax(dim=-1)
        if self.range is None:
            return minimum, maximum
        return torch.minimum(self.range[0], minimum), torch.maximum(self.range[1], maximum)


class MovingAverageMinMax(Observer):
    """A moving average of each batch's range: ``range += momentum * (batch_range - range)``."""

    def __init__(self, args: QuantizationArgs, momentum: float = 0.01) -> None:
        super().__init__(args)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], not {momentum}")
        self.momentum = momentum

    def _accumulate(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._average(values.amin(dim=-1), values.amax(dim=-1))

    def _average(self, minimum: torch.Tensor, maximum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.range is None:
            return minimum, maximum
        return (
            self.range[0] + self.momentum * (minimum - self.range[0]),
            self.range[1] + self.momentum * (maximum - self.range[1]),
        )


class MeanSquaredError(MovingAverageMinMax):
    """The moving average of each batch's :func:`~compressed_format.scales.least_error_range`, by its options."""

    def __init__(
        self,
        args: QuantizationArgs,
        momentum: float = 0.01,
        maxshrink: float = 0.2,
        grid: int = 20,
        norm: float = 2.4,
    ) -> None:
        super().__init__(args, momentum)
        check_shrinking(maxshrink, grid, norm)
        self.maxshrink, self.grid, self.norm = maxshrink, grid, norm

    def _accumulate(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        minimum, maximum = least_error_range(
            values, (-1,), self.args, maxshrink=self.maxshrink, grid=self.grid, norm=self.norm
        )
        return self._average(minimum.squeeze(-1), maximum.squeeze(-1))


OBSERVERS: frozendict[str, type[Observer]] = frozendict(
    {
        "minmax": MinMax,
        "static_minmax": MinMax,
        "memoryless_minmax": MinMax,
        "moving_average_minmax": MovingAverageMinMax,
        "mse": MeanSquaredError,
        "memoryless_mse": MeanSquaredError,
    }
)


def observer_for(args: QuantizationArgs, place: str) -> Observer:
    """The observer that ``args`` name, ``minmax`` if they name none.

    Raises :class:`CalibrationError`, naming ``place``, for a name that is not in :data:`OBSERVERS` and for keyword
    arguments that the observer does not take.
    """
    name = args.observer or DEFAULT_OBSERVER
    if name not in OBSERVERS:
        message = f"the observer {name!r} is not known; there are {', '.join(OBSERVERS)}"
        raise CalibrationError(problems=[Problem(place, message)])
    observer = OBSERVERS[name]
    allowed = [option for option in inspect.signature(observer).parameters if option != "args"]
    unknown = sorted(set(args.observer_kwargs) - set(allowed))
    if unknown:
        message = f"the observer {name} takes no {', '.join(unknown)}; allowed: {', '.join(allowed) or 'nothing'}"
        raise CalibrationError(problems=[Problem(place, message)])
    try:
        return observer(args, **args.observer_kwargs)
    except (TypeError, ValueError) as error:
        raise CalibrationError(problems=[Problem(place, f"observer {name}: {error}")]) from error
