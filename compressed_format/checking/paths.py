"""``check``: everything that is wrong with what lies at a path."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from compressed_format.checking import codes
from compressed_format.checking.configs import authored_config, is_of_a_model, model_config, read_json
from compressed_format.checking.consumers import check_names, consumer_findings
from compressed_format.checking.findings import Report
from compressed_format.checking.notebook import Notebook
from compressed_format.errors import CheckpointError, ConfigError

__all__ = ["check"]

_INDEX_SUFFIX = ".safetensors.index.json"


def check(path: str | os.PathLike[str], *, quick: bool = False, consumers: Iterable[str] = ()) -> Report:
    """Everything that is wrong with a config or a checkpoint, as findings with stable codes.

    ``path`` is a config written by hand, a model's ``config.json``, a folder, an index, or a safetensors file. Of a
    checkpoint, headers are checked against the specification and against its config, and values are read once, some
    megabytes at a time; ``quick`` reads headers only. ``consumers`` names those that it is meant for (keys of
    :data:`~compressed_format.checking.CONSUMERS`), whose rules are then applied too.

    Whatever the files hold, the result is a report: nothing is raised for them, no pickle is read, and no code that
    they bring is run. A config alone needs no torch. ``docs/findings.md`` lists all codes. Raises
    :class:`ConfigError` for a consumer that is not known.
    """
    wanted = check_names(consumers)
    notebook = Notebook()
    try:
        place = Path(path)
        mode = place.stat().st_mode
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        notebook.add(codes.UNREADABLE, str(path), f"cannot be read: {reason}")
        return Report(path, notebook.findings(), unreadable=True)
    if not stat.S_ISDIR(mode) and place.suffix == ".json" and not place.name.endswith(_INDEX_SUFFIX):
        return _check_config(path, place, wanted, notebook)
    from compressed_format.checking.checkpoint import check_checkpoint

    unreadable = check_checkpoint(place, notebook, quick=quick, consumers=wanted)
    return Report(path, notebook.findings(), unreadable=unreadable)


def _check_config(path: str | os.PathLike[str], place: Path, consumers: tuple[str, ...], notebook: Notebook) -> Report:
    try:
        content = read_json(place)
    except CheckpointError as error:
        notebook.add_error(codes.UNREADABLE, error)
        return Report(path, notebook.findings(), unreadable=True)
    except ConfigError as error:
        notebook.add_error(codes.CONFIG, error)
        return Report(path, notebook.findings())
    if is_of_a_model(content):
        found = model_config(content, notebook)
        config = found.config
        if not found.is_compressed:
            notebook.add(codes.NOT_COMPRESSED, str(path), "has no quantization_config")
    else:
        del content  # it is read again, by stricter rules
        config = authored_config(place, notebook)
    if config is not None:
        notebook.add_all(consumer_findings(config, {}, consumers))
    return Report(path, notebook.findings())
