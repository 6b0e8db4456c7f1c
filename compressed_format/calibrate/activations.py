"""One pass of calibration data through a dense model, watching what goes into and comes out of chosen modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compressed_format.calibrate.observers import Observer, observer_for
from compressed_format.config import QuantizationScheme
from compressed_format.errors import CalibrationError, Problem

__all__ = ["calibrate_activations", "needs_calibration"]


def needs_calibration(scheme: QuantizationScheme) -> bool:
    """Whether a scheme has static activation scales, which only data can give."""
    ends = (scheme.input_activations, scheme.output_activations)
    return any(args is not None and not args.dynamic for args in ends)


def calibrate_activations(
    model: nn.Module,
    modules: Mapping[str, tuple[nn.Module, QuantizationScheme]],
    calibration: Iterable[Any],
) -> dict[str, dict[str, torch.Tensor]]:
    """The static scales of ``modules``, for each name: ``input_scale``, ``input_zero_point`` and so on.

    ``calibration`` yields what ``model`` is called with: a mapping of keyword arguments, a tuple or list of positional
    ones, or a single one. The model runs in evaluation mode, without gradients, and is left in the mode it was in.

    Raises one :class:`CalibrationError` that lists every module that no input reached, or that met NaN or infinity.
    """
    observers: dict[str, dict[str, Observer]] = {}
    handles = []
    problems: list[Problem] = []
    for name, (_, scheme) in modules.items():
        found = observers.setdefault(name, {})
        for end, args in (("input", scheme.input_activations), ("output", scheme.output_activations)):
            if args is not None and not args.dynamic:
                found[end] = observer_for(args, name)
    training = [module for module in model.modules() if module.training]
    batches = 0
    try:
        for name, (module, _) in modules.items():
            hook = _watch(name, observers[name], problems)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                _call(model, batch)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if batches == 0:
        raise CalibrationError("calibration yielded no input; static activation scales need at least one")
    scales: dict[str, dict[str, torch.Tensor]] = {}
    failed = {problem.place for problem in problems}
    for name, found in observers.items():
        for end, observer in found.items():
            if f"{name} {end}" in failed:
                continue
            try:
                scale, zero_point = observer.scale()
            except CalibrationError as error:
                problems.append(Problem(f"{name} {end}", error.message))
                continue
            scales.setdefault(name, {})[f"{end}_scale"] = scale
            if zero_point is not None:
                scales[name][f"{end}_zero_point"] = zero_point
    if problems:
        unique = dict.fromkeys(problems)
        raise CalibrationError("static activation scales could not be found:", unique)
    return scales


def _watch(
    name: str, observers: Mapping[str, Observer], problems: list[Problem]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values = {"input": args[0] if args else kwargs.get("input"), "output": output}
        for end, observer in observers.items():
            try:
                observer.observe(values[end].detach())
            except CalibrationError as error:
                problems.append(Problem(f"{name} {end}", error.message))

    return hook


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
