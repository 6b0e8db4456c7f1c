"""float8 parameters as pickle can carry them: torch pickles float8 tensors, and fails to read them back."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

__all__ = ["Envelope"]


class Envelope:
    """A float8 parameter on its way through pickle, which yields the parameter itself.

    There is one for each parameter at a time, so that parameters which modules share stay shared.
    """

    _open: ClassVar[WeakValueDictionary[int, Envelope]] = WeakValueDictionary()

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Envelope:
        return cls._open.setdefault(id(parameter), cls(parameter))

    def __reduce__(self) -> tuple[Any, ...]:
        return _float8_parameter, (self.parameter.detach().view(torch.uint8),)


def _float8_parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.view(torch.float8_e4m3fn), requires_grad=False)
