"""``inspect_checkpoint``: what is in a checkpoint, from its headers, and with a reference from its weights too."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from compressed_format import ops
from compressed_format.config import Assignment, CompressionFormat, QuantizationScheme
from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.config.scheme import describe_scheme
from compressed_format.dtypes import DTYPES
from compressed_format.errors import CheckpointError, FormatError, Problem
from compressed_format.inspection.inspection import (
    InspectedModule,
    InspectedScheme,
    InspectedTensor,
    Inspection,
    LayerError,
)
from compressed_format.inspection.kernels import KernelProblem, kernel_for
from compressed_format.inspection.names import without_experts
from compressed_format.inspection.reference_error import error_against
from compressed_format.reading import CheckpointReader, StoredModule, open_checkpoint
from compressed_format.threads import on_all_cores

__all__ = ["inspect_checkpoint"]

_SchemeKey = tuple[QuantizationScheme | None, CompressionFormat, CompressionFormat | None]


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Say what the checkpoint at ``path`` holds, how large it is, and which kernels would run it on this machine.

    Only headers, the config and the tensors that hold a shape are read. With a ``reference``, the checkpoint that has
    the same weights dense, both are read once, a slab of rows at a time, and each module's error is found; modules
    that have no equal there are listed in ``unmatched``. ``progress`` is called with how many of how many weights
    (their values) are done.

    Raises :class:`CheckpointError` for files that cannot be read, :class:`ConfigError` for a config that means
    nothing, :class:`FormatError` for tensors that contradict their format, and :class:`UnsupportedFormatError` for
    formats that cannot be decoded.
    """
    stored = open_checkpoint(path)
    original = None if reference is None else open_checkpoint(reference)
    found = _Found()
    for module in stored.modules.values():
        found.add(module)
    dtype, dtype_source = _model_dtype(stored, found.tensors)
    modules, unmatched = _with_errors(found, stored, original, progress)
    order = sorted(range(len(found.schemes)), key=lambda index: -found.nbytes(index))
    place = {index: rank for rank, index in enumerate(order)}
    return Inspection(
        path=str(stored.path),
        files=len(stored.files),
        dtype=dtype,
        dtype_source=dtype_source,
        schemes=tuple(found.summary(index, dtype) for index in order),
        modules=tuple(
            InspectedModule(each.name, each.kind, place[each.scheme], each.shape, each.nbytes, each.error)
            for each in modules
        ),
        tensors=tuple(found.tensors),
        reference=None if original is None else str(original.path),
        unmatched=tuple(unmatched),
        warnings=stored.warnings,  # those of targets are for authors, and for `check`
    )


@dataclass
class _Found:
    """What has been found while one goes through the modules; ``schemes`` maps each scheme to the config's groups."""

    schemes: dict[_SchemeKey, set[str]] = field(default_factory=dict)
    ops: dict[_SchemeKey, dict[str, None]] = field(default_factory=dict)
    modules: list[InspectedModule] = field(default_factory=list)
    tensors: list[InspectedTensor] = field(default_factory=list)

    def add(self, module: StoredModule) -> None:
        compressed = 0
        for suffix, spec in module.tensors.items():
            if module.assignment is None or suffix == "bias":
                name = f"{module.name}.{suffix}" if module.name else suffix
                self.tensors.append(InspectedTensor(name, spec.dtype, spec.shape, spec.nbytes))
            else:
                compressed += spec.nbytes
        if module.assignment is None:
            return
        key = _scheme_key(module.assignment)
        self.schemes.setdefault(key, set()).update({module.assignment.group} - {None})  # type: ignore[arg-type]
        kind = module.kind or "Linear"
        self.ops.setdefault(key, {})[_op(module.name, kind, module.assignment.scheme)] = None
        shape = module.shape
        assert shape is not None  # a compressed module has a weight, or its layout raises
        index = list(self.schemes).index(key)
        self.modules.append(InspectedModule(module.name, kind, index, tuple(shape), compressed))

    def nbytes(self, index: int) -> int:
        return sum(module.nbytes for module in self.modules if module.scheme == index)

    def summary(self, index: int, dtype: str) -> InspectedScheme:
        key = list(self.schemes)[index]
        scheme, format, sparsity = key
        args = None if scheme is None else scheme.weights
        modules = [module for module in self.modules if module.scheme == index]
        parameters = sum(module.parameters for module in modules)
        backend = ops.backend_info()
        return InspectedScheme(
            title=_title(scheme, sparsity),
            groups=tuple(sorted(self.schemes[key])),
            format=format.value,
            bits=None if args is None else args.num_bits,
            type=None if args is None else args.type.value,
            strategy=None if args is None or args.strategy is None else args.strategy.value,
            group_size=None if args is None else args.group_size,
            block_structure=None if args is None else args.block_structure,
            symmetric=None if args is None else args.symmetric,
            activations=_activations(scheme),
            sparsity=None if sparsity is None else sparsity.value,
            modules=len(modules),
            parameters=parameters,
            nbytes=sum(module.nbytes for module in modules),
            dense_nbytes=parameters * DTYPES[dtype].bits // 8,
            kernels=tuple(kernel_for(KernelProblem(op, *key), backend) for op in self.ops[key]),
        )


def _scheme_key(assignment: Assignment) -> _SchemeKey:
    """What is one scheme, whatever group of the config says so."""
    scheme = assignment.scheme
    alike = None if scheme is None else scheme.replace(targets=("Linear",))
    return alike, assignment.format, assignment.sparsity


def _op(module: str, kind: str, scheme: QuantizationScheme | None) -> str:
    if kind == "Embedding":
        return "embedding"
    op = "linear" if scheme is None or scheme.input_activations is None else "quantized_linear"
    return op if without_experts(module) == module else f"expert_{op}"


def _title(scheme: QuantizationScheme | None, sparsity: CompressionFormat | None) -> str:
    parts = [] if scheme is None else [describe_scheme(scheme)]
    if sparsity is not None:
        parts.append(f"{'' if parts else 'not quantized, '}{sparsity.value}")
    return ", ".join(filter(None, parts)) or "not quantized"


def _activations(scheme: QuantizationScheme | None) -> str | None:
    if scheme is None:
        return None
    alone = QuantizationScheme(
        targets=scheme.targets,
        input_activations=scheme.input_activations,
        output_activations=scheme.output_activations,
    )
    return describe_scheme(alone) or None


def _model_dtype(stored: CheckpointReader, tensors: Iterable[InspectedTensor]) -> tuple[str, str]:
    """The dtype of the model's dense weights, and where that is known from."""
    file = stored.folder / "config.json"
    if file.is_file():
        config = parse_json(read_bytes(file), str(file))
        for place in (config, config.get("text_config") if isinstance(config, Mapping) else None):
            for key in ("dtype", "torch_dtype"):
                named = place.get(key) if isinstance(place, Mapping) else None
                name = named.removeprefix("torch.") if isinstance(named, str) else ""
                if name in DTYPES and DTYPES[name].is_float:
                    return name, "config.json"
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    dense = [dtype for dtype, _ in sizes.most_common() if DTYPES[dtype].is_float and DTYPES[dtype].bits >= 16]
    if dense:
        return dense[0], "the tensors that are not compressed"
    for module in stored.modules.values():
        spec = module.tensors.get("weight_scale") or module.tensors.get("compressed")
        if spec is not None and DTYPES[spec.dtype].is_float and DTYPES[spec.dtype].bits >= 16:
            return spec.dtype, "the scales"
    return "float32", "nothing in the checkpoint, so torch's own is taken"


def _with_errors(
    found: _Found,
    stored: CheckpointReader,
    original: CheckpointReader | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[InspectedModule], list[Problem]]:
    """The modules with their errors, and what cannot be compared."""
    if original is None:
        return found.modules, []
    modules: list[InspectedModule] = []
    unmatched: list[Problem] = []
    done, total = 0, sum(module.parameters for module in found.modules)

    def compared(module: InspectedModule) -> LayerError | str:
        dense = original.modules.get(module.name)
        problem = _mismatch(module, dense, original)
        if problem is not None or dense is None:
            return problem or ""
        return error_against(stored.modules[module.name], dense)

    for module, error in zip(found.modules, on_all_cores(compared, found.modules), strict=True):
        if isinstance(error, LayerError):
            module = InspectedModule(module.name, module.kind, module.scheme, module.shape, module.nbytes, error)
        else:
            unmatched.append(Problem(module.name, error))
        modules.append(module)
        done += module.parameters
        if progress is not None:
            progress(done, total)
    if modules and len(unmatched) == len(modules):
        message = (
            f"has an equal of none of the {len(modules)} compressed modules of {stored.path}; "
            f"the first is {unmatched[0].place}, which {unmatched[0].message}: give the dense checkpoint of this model"
        )
        raise CheckpointError(problems=[Problem(str(original.path), message)])
    return modules, unmatched


def _mismatch(module: InspectedModule, dense: StoredModule | None, original: CheckpointReader) -> str | None:
    """Why a module cannot be compared with that of the same name in the reference."""
    if dense is None:
        return "is not in the reference"
    try:
        shape = dense.shape
    except FormatError as error:
        return f"cannot be read in the reference: {error}"
    if shape is None:
        return "has no weight in the reference"
    if dense.assignment is None and not DTYPES[dense.tensors["weight"].dtype].is_float:
        return f"has a weight of {dense.tensors['weight'].dtype} in the reference"
    if tuple(shape) != module.shape:
        return f"has shape {list(shape)} in the reference, and {list(module.shape)} here"
    return None
