"""Which kernel would run a module on this machine: a pure function of the module's scheme and of what ops there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressed_format.config import CompressionFormat, QuantizationScheme

__all__ = ["OPS_WITH_KERNELS", "REFERENCE", "Kernel", "KernelProblem", "kernel_for"]

REFERENCE = "reference"
"""The name of what is no kernel: an op's definition in plain torch."""

OPS_WITH_KERNELS: frozenset[str] = frozenset(
    {"embedding", "linear", "quantized_linear", "expert_linear", "expert_quantized_linear"}
)
"""The ops that run modules and for which :func:`kernel_for` knows when their kernels are chosen."""


@dataclass(frozen=True)
class KernelProblem:
    """What decides about the kernel: the op that runs the modules, and how their weights are stored."""

    op: str
    scheme: QuantizationScheme | None
    format: CompressionFormat
    sparsity: CompressionFormat | None


@dataclass(frozen=True)
class Kernel:
    """What runs ``op`` on ``device``, and the ``reason``; ``name`` is :data:`REFERENCE` where it is plain torch."""

    op: str
    device: str
    name: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Ready for JSON."""
        return {"op": self.op, "device": self.device, "name": self.name, "reason": self.reason}


def kernel_for(problem: KernelProblem, backend: Mapping[str, Any], *, device: str = "cpu") -> Kernel:
    """What would run ``problem`` on ``device`` of a machine that :func:`~compressed_format.ops.backend_info` describes.

    The one place to extend when an op gets kernels: add it to :data:`OPS_WITH_KERNELS`, and say here for which
    problems which of them is chosen, as ``csrc/ops`` does.
    """
    library = backend["libraries"].get(device)
    if library is None:
        reason = f"there is no native library for {device}"
    elif library["path"] is None:
        reason = f"the native library is not in use: {library['reason']}"
    elif problem.op == "embedding" and problem.sparsity is not None:
        reason = "rows of sparse tables have no native kernel"
    elif problem.op in OPS_WITH_KERNELS and problem.op in backend["kernels"]:
        kernels = ", ".join(backend["kernels"][problem.op])
        return Kernel(problem.op, device, backend["cpu"]["instructions"], kernels)
    else:
        reason = "this release has no native kernel for it"
    return Kernel(problem.op, device, REFERENCE, reason)
