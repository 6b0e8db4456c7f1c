"""What a comparison of two checkpoints found. Nothing here is mutable, and ``to_dict`` is ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final, Literal

from frozendict import frozendict

__all__ = ["ABSENT", "Absent", "Difference", "KeyDifference", "StoredAs", "TensorDifference", "ValueDifference"]


class Absent(Enum):
    """What stands for the value of a key that one side does not have: null is a value of JSON."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True)
class StoredAs:
    """Dtype and shape of a tensor. ``format`` is that of a weight which was dequantized to be compared."""

    dtype: str
    shape: tuple[int, ...]
    format: str | None = None

    def __str__(self) -> str:
        text = f"{self.dtype} {list(self.shape)}"
        return text if self.format is None else f"{text} from {self.format}"


@dataclass(frozen=True)
class ValueDifference:
    """By how much the values of two tensors of one shape differ.

    ``unit`` is ``"value"``, or ``"word"`` for integers in which codes are packed: a difference of such words means
    nothing, so that only their number is told. ``count`` is how many there are, ``differing`` how many have other
    bits, or, where dtypes differ or weights were dequantized, other values (NaN equals NaN); ``first`` is the index of
    the first of them.

    The rest is of the pairs that are finite on both sides, with a the first checkpoint's and b the other's:
    ``max_abs`` is the largest ``|a - b|``, ``relative_rms`` the root of ``sum((a - b)^2) / sum(a^2)``, and ``snr_db``
    the same in decibels, ``-20 log10``. Each is None where it means nothing: for words, for a sum of zero, and where
    it would not be finite. ``unpaired`` counts the differing pairs left out for a NaN or infinity.
    """

    unit: Literal["value", "word"]
    count: int
    differing: int
    first: tuple[int, ...]
    max_abs: float | None
    relative_rms: float | None
    snr_db: float | None
    unpaired: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names."""
        return {**asdict(self), "first": list(self.first)}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both checkpoints have, and have differently. ``values`` is None where they cannot be
    compared one by one: the shapes differ, or one side has words where the other has numbers."""

    name: str
    first: StoredAs
    second: StoredAs
    values: ValueDifference | None


@dataclass(frozen=True)
class KeyDifference:
    """A key of a config or of a header's metadata with two values; ``place`` is its JSON path.

    ``first`` or ``second`` is :data:`ABSENT` on the side that does not have it.
    """

    place: str
    first: Any
    second: Any

    def to_dict(self) -> dict[str, Any]:
        """The place, and the values that are there."""
        sides = {"first": self.first, "second": self.second}
        return {"place": self.place, **{side: value for side, value in sides.items() if value is not ABSENT}}


@dataclass(frozen=True)
class Difference:
    """Everything in which two checkpoints differ.

    ``first`` and ``second`` are their paths. ``same_tensors`` counts the tensors, or dequantized weights, that do not
    differ; ``shared_tensors`` those among them that are the same bytes of the same file and were not read.
    """

    first: str
    second: str
    dequantized: bool
    only_in_first: frozendict[str, StoredAs]
    only_in_second: frozendict[str, StoredAs]
    tensors: tuple[TensorDifference, ...]
    metadata: tuple[KeyDifference, ...]
    config: tuple[KeyDifference, ...]
    same_tensors: int
    shared_tensors: int

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_in_first or self.only_in_second or self.tensors or self.metadata or self.config)

    def to_dict(self) -> dict[str, Any]:
        """Everything as objects, lists, strings, numbers and null; numbers are finite."""
        return {
            "same": self.same,
            "first": self.first,
            "second": self.second,
            "dequantized": self.dequantized,
            "only_in_first": {name: _stored(stored) for name, stored in self.only_in_first.items()},
            "only_in_second": {name: _stored(stored) for name, stored in self.only_in_second.items()},
            "tensors": [
                {
                    "name": tensor.name,
                    "first": _stored(tensor.first),
                    "second": _stored(tensor.second),
                    "values": None
                    if tensor.values is None
                    else {**asdict(tensor.values), "first": list(tensor.values.first)},
                }
                for tensor in self.tensors
            ],
            "metadata": [key.to_dict() for key in self.metadata],
            "config": [key.to_dict() for key in self.config],
            "same_tensors": self.same_tensors,
            "shared_tensors": self.shared_tensors,
        }


def _stored(stored: StoredAs) -> dict[str, Any]:
    described: dict[str, Any] = {"dtype": stored.dtype, "shape": list(stored.shape)}
    return described if stored.format is None else {**described, "format": stored.format}
