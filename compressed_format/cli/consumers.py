"""What ``compress --for`` asks before a job begins: whether its result can be served."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressed_format.errors import CompressedFormatWarning, ConfigError, Problem

if TYPE_CHECKING:
    from compressed_format.config import QuantizationConfig

__all__ = ["refuse_unserved"]


def refuse_unserved(source: Path, config: QuantizationConfig, consumers: Sequence[str]) -> None:
    """Raise :class:`ConfigError` with every rule by which one of ``consumers`` would not serve what compressing the
    checkpoint ``source`` by ``config`` makes; what it would serve with reservations is warned of.

    The rules are asked about the config that the job would write and the layers it would find. Raises as
    :func:`~compressed_format.streaming.compress_checkpoint` does before it begins.
    """
    from compressed_format.checking import LayerShape, Severity, consumer_findings
    from compressed_format.config.layers import layer_classes
    from compressed_format.streaming.job_builder import Source
    from compressed_format.streaming.targets import plan_targets

    opened = Source.open(source)
    plan = plan_targets(opened, config, None)
    copied = {name: opened.checkpoint.spec(name).shape for name in opened.checkpoint if name not in plan.consumed}
    layers = {name: LayerShape(copied[f"{name}.weight"], (kind,)) for name, kind in layer_classes(copied).items()}
    layers |= {
        planned.weight.module: LayerShape(planned.weight.matrix.shape, (planned.weight.kind,))
        for planned in plan.weights
    }
    compressed = {planned.weight.module for planned in plan.weights if planned.assignment is not None}
    findings = consumer_findings(plan.config, layers, consumers, quantized=compressed)
    refused = [finding for finding in findings if finding.severity is Severity.ERROR]
    if refused:
        names = " and ".join(consumers)
        problems = [Problem(f"{finding.code} {finding.place}".strip(), finding.message) for finding in refused]
        raise ConfigError(f"the result could not be served by {names}:", problems)
    for finding in findings:
        if finding.severity is Severity.WARNING:
            warnings.warn(str(finding).removeprefix("warning "), CompressedFormatWarning, stacklevel=2)
