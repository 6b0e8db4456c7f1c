"""Whether what a job will write can be served, told before it starts and not after hours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compressed_format.checking.consumers import CONSUMERS, consumer_findings
from compressed_format.checking.findings import Severity
from compressed_format.checking.plan import LayerShape
from compressed_format.config import QuantizationConfig
from compressed_format.errors import Problem, UnsupportedFormatError

__all__ = ["refuse_unservable", "unservable"]


def refuse_unservable(config: QuantizationConfig, layers: Mapping[str, LayerShape], consumers: Iterable[str]) -> None:
    """Raise :class:`UnsupportedFormatError` with every rule by which one of ``consumers`` would not load the result."""
    found = [
        Problem(finding.place, f"{finding.message} ({finding.code})")
        for finding in consumer_findings(config, layers, consumers)
        if finding.severity is Severity.ERROR
    ]
    if found:
        raise UnsupportedFormatError("the result could not be served as asked:", found)


def unservable(config: QuantizationConfig, layers: Mapping[str, LayerShape]) -> list[Problem]:
    """For each consumer that would not load the result, or load it wrong: the first rule by which it is so."""
    problems = []
    for consumer in CONSUMERS:
        errors = [
            finding for finding in consumer_findings(config, layers, [consumer]) if finding.severity is Severity.ERROR
        ]
        if errors:
            first = errors[0]
            more = f" (and {len(errors) - 1} more rules)" if len(errors) > 1 else ""
            where = f"{first.place}: " if first.place else ""
            problems.append(
                Problem(consumer, f"will not serve the result: {where}{first.message} ({first.code}){more}")
            )
    return problems
