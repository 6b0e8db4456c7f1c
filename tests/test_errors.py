"""The exceptions: the tree in the docstring is the tree of classes, and an error reads and travels as it should."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable

import pytest

from compressed_format import errors
from compressed_format.errors import (
    CheckpointExistsError,
    CompressedFormatError,
    CompressedFormatWarning,
    ConfigError,
    Problem,
)

ERRORS = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, CompressedFormatError) and value.__module__ == errors.__name__
]
PROBLEMS = (Problem("model.layers.0", "is wrong"), Problem("", "has no place"))


def test_the_docstring_draws_the_tree() -> None:
    """Each line names a class; its depth says its parent, and parentheses the builtin exception it also is."""
    assert errors.__doc__ is not None
    drawing = errors.__doc__.split("::\n")[1].split("    CompressedFormatWarning")[0]
    path: list[str] = []
    drawn: dict[str, set[str]] = {}
    for line in filter(str.strip, drawing.splitlines()):
        found = re.match(r"([ │├└─]*)(\w+)(?:\s+\((\w+)\))?", line[4:])
        assert found, line
        depth = len(found[1]) // 4
        path[depth:] = [found[2]]
        drawn[found[2]] = {*path[depth - 1 : depth], *filter(None, [found[3]])}
    actual = {error.__name__: {base.__name__ for base in error.__bases__} for error in ERRORS}
    assert drawn.pop("CompressedFormatError") == set()
    assert actual.pop("CompressedFormatError") == {"Exception"}
    assert drawn == actual


def test_all_names_are_public() -> None:
    names = {error.__name__ for error in ERRORS} | {"Problem", "CompressedFormatWarning"}
    assert sorted(names) == errors.__all__
    assert issubclass(CompressedFormatWarning, UserWarning)


def test_a_checkpoint_that_exists_is_a_file_that_exists() -> None:
    error = CheckpointExistsError("out holds a checkpoint")
    assert isinstance(error, FileExistsError)
    assert str(error) == "out holds a checkpoint"
    assert str(CheckpointExistsError("", PROBLEMS[:1])) == "model.layers.0: is wrong"


@pytest.mark.parametrize("error", ERRORS)
def test_what_an_error_says(error: type[CompressedFormatError]) -> None:
    assert str(error("nothing fits")) == "nothing fits"
    assert str(error(problems=PROBLEMS[:1])) == "model.layers.0: is wrong"
    assert str(error("nothing fits:", PROBLEMS[:1])) == "nothing fits:\n  model.layers.0: is wrong"
    assert str(error("nothing fits:", PROBLEMS)) == "nothing fits:\n  model.layers.0: is wrong\n  has no place"
    assert str(error(problems=PROBLEMS)) == "model.layers.0: is wrong\n  has no place"
    assert str(error()) == ""
    assert error("nothing fits", iter(PROBLEMS)).problems == PROBLEMS
    assert error("nothing fits").problems == ()


@pytest.mark.parametrize("travel", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", ERRORS)
def test_errors_travel(
    error: type[CompressedFormatError], travel: Callable[[CompressedFormatError], CompressedFormatError]
) -> None:
    """Between processes, for instance."""
    for original in (error("nothing fits"), error("nothing fits:", PROBLEMS), error(problems=PROBLEMS), error()):
        arrived = travel(original)
        assert type(arrived) is error
        assert (arrived.message, arrived.problems, str(arrived)) == (original.message, original.problems, str(original))


def test_notes_and_causes_are_left_to_python() -> None:
    with pytest.raises(ConfigError) as caught:
        raise ConfigError("wrong") from KeyError("cause")
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, ValueError)


def test_problems_are_values() -> None:
    problem = Problem("a.b", "is wrong")
    assert problem == Problem("a.b", "is wrong")
    assert len({problem, Problem("a.b", "is wrong")}) == 1
    assert str(problem) == "a.b: is wrong"
    assert str(Problem("", "is wrong")) == "is wrong"
    with pytest.raises(AttributeError):
        problem.place = "c"  # type: ignore[misc]


def test_words_out_of_a_file_can_always_be_written() -> None:
    error = ConfigError("half \ud800", [Problem("a.\udfff", "ä")])
    assert str(error).encode().decode() == "half \\ud800\n  a.\\udfff: ä"
