"""ggml's products of a quantized weight, through its C interface.

``make ggml`` builds the libraries for this machine, out of the source package of llama-cpp-python, into ``build/ggml``;
they are looked for there unless ``--ggml FOLDER`` names another build. One graph multiplies by many of the weights that
are rotated, one after the other, as it does for a model: starting it is paid for once.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from harness.measuring import Candidate, copies_to_rotate, rotated

__all__ = ["Ggml", "Weights", "find_ggml"]

BUILT = Path(__file__).parents[2] / "build" / "ggml"

TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}
REPACKED = ("Q4_0", "Q4_K")
"""What ggml has another order for on x86, which it takes by itself when it loads a model."""
ERRORS = {"Q4_0": 0.13, "Q4_K": 0.11, "Q8_0": 0.02}
"""Relative RMS of the result against the dense product, beyond which it would be a wrong one."""
FLOAT32 = 0
OPERATIONS_OF_GRAPH = 10e9
"""Some 20 ms: a graph of all weights would take seconds where there are many tokens."""


class Parameters(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_free": (None, [c_void_p]),
    "ggml_init": (c_void_p, [Parameters]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
}


def find_ggml(folder: Path | None) -> Ggml | None:
    """The build in a folder, or what ``make ggml`` has built, or ``None``."""
    if folder is not None:
        return Ggml(folder)
    return Ggml(BUILT) if BUILT.is_dir() else None


class Ggml:
    """The libraries of a build."""

    def __init__(self, folder: Path) -> None:
        # In the order in which they need each other.
        libraries = [
            ctypes.CDLL(str(self.find(folder, f"libggml-{part}.so")), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")
        ]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.silence = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
        self.log_set(ctypes.cast(self.silence, c_void_p), None)  # or it says of each weight that it is repacked
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, torch.get_num_threads())

    @staticmethod
    def find(folder: Path, name: str) -> Path:
        found = next(folder.rglob(name), None)
        if found is None:
            raise SystemExit(f"there is no {name} in {folder}; `make ggml` builds it")
        return found

    def candidate(self, weights: Weights, input: torch.Tensor, expected: torch.Tensor) -> Candidate:
        """Multiplies ``input`` by the copies of a weight; the first rows of a result are held against ``expected``."""
        operations = 2 * input.shape[0] * weights.rows * weights.columns
        size = min(weights.copies, math.ceil(OPERATIONS_OF_GRAPH / operations))
        tensors = [weights.tensors[number % weights.copies] for number in range(weights.copies + size - 1)]
        graphs = [Graph(self, weights, input, tensors[at : at + size]) for at in range(0, weights.copies, size)]
        graphs[0].compute()
        error = float((graphs[0].first_result()[: len(expected)] - expected).norm() / expected.norm())
        if not error <= ERRORS[weights.type_name]:
            raise SystemExit(f"ggml's {weights.type_name} differs from the dense product by {error:.3f} of it")
        return Candidate(rotated(Graph.compute, graphs).function, size)

    def buffer_type(self, repacked: bool) -> int:
        """That of plain memory, or of memory in which weights get the order that ggml's faster kernels want."""
        if not repacked:
            return self.backend_cpu_buffer_type()
        register = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(register, 0))
        for found in types:
            if found is None:
                break
            if self.backend_buft_name(found) == b"CPU_REPACK":
                return found
        raise SystemExit("this build of ggml does not repack weights")


class Context:
    """Descriptions of tensors, and later the memory of all of them."""

    def __init__(self, ggml: Ggml) -> None:
        self.ggml = ggml
        self.handle = ggml.init(Parameters(1 << 20, None, True))
        self.buffer: int | None = None

    def matrix(self, type_number: int, columns: int, rows: int) -> int:
        return self.ggml.new_tensor_2d(self.handle, type_number, columns, rows)

    def allocate(self, buffer_type: int) -> None:
        self.buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(self.handle, buffer_type)
        if self.buffer is None:
            raise MemoryError("ggml has no memory for its tensors")

    def __del__(self) -> None:
        if self.buffer is not None:
            self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.handle)


class Weights:
    """The same weight as often as it is rotated, each time in memory of its own."""

    def __init__(self, ggml: Ggml, type_name: str, weight: torch.Tensor) -> None:
        self.type_name = type_name
        number, (self.rows, self.columns) = TYPES[type_name], weight.shape
        size = ggml.row_size(number, self.columns) * self.rows
        self.copies = copies_to_rotate(size)
        self.context = Context(ggml)
        self.tensors = [self.context.matrix(number, self.columns, self.rows) for _ in range(self.copies)]
        self.context.allocate(ggml.buffer_type(type_name in REPACKED))
        quantized, values = torch.empty(size, dtype=torch.uint8), weight.float().contiguous()
        arguments = number, values.data_ptr(), quantized.data_ptr(), 0, self.rows, self.columns, None
        assert ggml.quantize_chunk(*arguments) == size
        for tensor in self.tensors:
            ggml.backend_tensor_set(tensor, quantized.data_ptr(), 0, size)


class Graph:
    """Products of one input with some of the weights."""

    def __init__(self, ggml: Ggml, weights: Weights, input: torch.Tensor, tensors: list[int]) -> None:
        self.ggml, self.weights = ggml, weights
        self.shape = input.shape[0], weights.rows
        self.context = Context(ggml)
        source = self.context.matrix(FLOAT32, weights.columns, input.shape[0])
        self.results = [ggml.mul_mat(self.context.handle, tensor, source) for tensor in tensors]
        self.graph = ggml.new_graph_custom(self.context.handle, len(tensors) + 1, False)
        for result in self.results:
            ggml.build_forward_expand(self.graph, result)
        self.context.allocate(ggml.buffer_type(repacked=False))
        values = input.float().contiguous()
        ggml.backend_tensor_set(source, values.data_ptr(), 0, values.nbytes)

    def compute(self) -> None:
        if self.ggml.backend_graph_compute(self.ggml.backend, self.graph):
            raise RuntimeError("ggml could not compute its graph")

    def first_result(self) -> torch.Tensor:
        result = torch.empty(self.shape)
        self.ggml.backend_tensor_get(self.results[0], result.data_ptr(), 0, result.nbytes)
        return result
