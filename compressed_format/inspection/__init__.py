"""What is in a checkpoint: schemes, sizes, kernels, and how far it is from its dense original."""

from compressed_format.inspection.inspecting import inspect_checkpoint
from compressed_format.inspection.inspection import Inspection

__all__ = ["Inspection", "inspect_checkpoint"]
