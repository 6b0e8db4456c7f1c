"""How candidates are timed: in turns, so that whatever else the machine does falls on all of them alike.

A turn of a candidate is as many calls as take some milliseconds; the turns of all candidates make a round, and the
figure of a candidate is the median over its turns. Between turns the threads of the one before come to rest: those of
OpenMP go on polling for a while, on the cores that the next candidate needs.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["ROTATED_BYTES", "Candidate", "copies_to_rotate", "medians", "rotated"]

ROTATED_BYTES = 400e6
"""What a candidate's weights come to, used in turn: no cache serves them, as none does in a model."""

TURN_SECONDS = 0.03
REST_SECONDS = 0.006
FEWEST_ROUNDS, MOST_ROUNDS = 3, 25

Item = TypeVar("Item")


@dataclass(frozen=True)
class Candidate:
    """``function`` does the work ``times`` times."""

    function: Callable[[], object]
    times: int = 1


def copies_to_rotate(nbytes: int) -> int:
    """How many weights of this size there must be."""
    return max(2, math.ceil(ROTATED_BYTES / nbytes))


def rotated(function: Callable[[Item], object], items: Sequence[Item]) -> Candidate:
    """``function`` of one item after the other."""
    following = itertools.cycle(items)
    return Candidate(lambda: function(next(following)))


def medians(
    candidates: Mapping[str, Candidate],
    seconds: float = 2.0,
    of_turns: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """The seconds that each candidate takes to do its work once; measuring all of them takes about ``seconds``.

    Slow ones get fewer calls a turn, down to one, and all of them fewer rounds, down to three. ``of_turns`` may be
    ``min`` for what takes microseconds: nothing but other work makes such a turn longer than another.
    """
    calls = {name: calls_of_turn(candidate) for name, candidate in candidates.items()}
    turns: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for number in range(MOST_ROUNDS):
        for name, candidate in candidates.items():
            time.sleep(REST_SECONDS)
            turns[name].append(turn(candidate, calls[name]))
        so_far = time.perf_counter() - begin
        if number + 1 >= FEWEST_ROUNDS and so_far * (number + 2) / (number + 1) > seconds:
            break
    return {name: of_turns(times) for name, times in turns.items()}


def calls_of_turn(candidate: Candidate) -> int:
    """After a first call, which makes threads and memory."""
    candidate.function()
    begin = time.perf_counter()
    candidate.function()
    return max(1, math.ceil(TURN_SECONDS / (time.perf_counter() - begin)))


def turn(candidate: Candidate, calls: int) -> float:
    if calls > 1:
        candidate.function()  # wakes the threads
    begin = time.perf_counter()
    for _ in range(calls):
        candidate.function()
    return (time.perf_counter() - begin) / (calls * candidate.times)
