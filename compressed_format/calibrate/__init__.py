"""Static activation scales: observers of the values that flow through a model, and the pass that feeds them."""

from __future__ import annotations

from compressed_format.calibrate.activations import calibrate_activations, needs_calibration
from compressed_format.calibrate.observers import OBSERVERS, Observer, observer_for

__all__ = ["OBSERVERS", "Observer", "calibrate_activations", "needs_calibration", "observer_for"]
