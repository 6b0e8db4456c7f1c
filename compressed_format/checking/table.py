"""The table of all codes; ``python -m compressed_format.checking`` prints it as the page ``docs/findings.md``."""

from __future__ import annotations

from collections.abc import Iterable

from frozendict import frozendict

from compressed_format.checking import codes, consumer_codes
from compressed_format.checking.findings import Code

__all__ = ["CODES", "page"]

CODES: frozendict[str, Code] = frozendict({code.code: code for code in (*codes.ALL, *consumer_codes.ALL)})
"""Every code that a finding can have. Codes are never renamed, and one that is given up is not used again."""

_HEAD = """\
# Findings

What `check` and `compressed-format check` can find, by its code. Codes are stable: one never changes its meaning.
This page is written by `python -m compressed_format.checking`.

| severity | means |
|---|---|
| error | does not load, or is wrong without saying so |
| warning | can be used, but not everywhere, or not as one might expect |
| note | worth knowing, nothing to do |

| exit code | means |
|---|---|
| 0 | nothing worse than a note |
| 1 | at least one warning or error |
| 2 | nothing at the path could be opened, so that nothing was checked |

A finding names a place: a path inside the config, a module, a tensor, or a file. At most one finding of a kind is made
for a tensor; it names the first offending index and value, and how many there are. What is true of many modules alike
is said once, at the first of them, with the number of the others.

`quick` reads headers and configs only, and so finds nothing of CF3 but what headers tell. Otherwise tensors are read
once, some megabytes at a time. Rules of a consumer (CF4 to CF7) are applied on request, and hold for the release named
in the headline.
"""
_SECTIONS = (
    ("CF0", "Files"),
    ("CF1", "The config, and which modules it means"),
    ("CF2", "Tensors against the config"),
    ("CF3", "Values"),
    ("CF4", consumer_codes.VLLM),
    ("CF5", consumer_codes.SGLANG),
    ("CF6", consumer_codes.TRANSFORMERS),
    ("CF7", consumer_codes.LLAMA_CPP),
)


def page() -> str:
    """``docs/findings.md``."""
    parts = [_HEAD]
    for prefix, title in _SECTIONS:
        rows = [code for code in CODES.values() if code.code.startswith(prefix)]
        parts.append(f"\n## {title}\n\n| code | severity | | what it means | what to do |\n|---|---|---|---|---|\n")
        parts += _rows(rows)
    return "".join(parts)


def _rows(rows: Iterable[Code]) -> list[str]:
    return [f"| {row.code} | {row.severity} | {row.title} | {row.meaning} | {row.remedy} |\n" for row in rows]
