"""Linear and Embedding classes of models' own: which of them can run packed, and the classes they then become.

Gemma's embedding scales what ``super().forward`` looks up, and OPT's shifts its indices first. Such a class keeps its
forward, its attributes and its buffers; only what ``super()`` reaches is another. A forward that reads the values of
``self.weight`` would be right too, and dequantize them at every call: it is refused. Which of both it is, its source
tells; what cannot be told from it is refused as well.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from compressed_format.modules.base import CompressedModule
from compressed_format.modules.linear import CompressedEmbedding, CompressedLinear
from compressed_format.modules.offloading import original_forward

__all__ = ["HOOKS", "blank_successor", "carry_attributes", "original_class", "subclass_problem"]

_STATE = frozenset(vars(nn.Module())) - {"training"}
# Attributes of a compressed module that say what it is, and those with which accelerate hooks a module.
_RESERVED = frozenset(
    {"scheme", "format", "sparsity", "dtype", "_layout", "_weight_shape", "_weight_name", "_input", "_output"}
)
_HOOKED = frozenset({"forward", "_hf_hook", "_old_forward"})
_LEFT_BEHIND = _RESERVED | _HOOKED
# The hooks that a module's successor takes over: those that see what it computes, not those of its state dict.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STARTED_ANEW = tuple(
    (name, type(value)) for name, value in vars(nn.Module()).items() if name not in (*HOOKS, "training")
)
_OWN_PARAMETERS = frozenset({"weight", "bias"})
_NOT_CARRIED = _STATE | _RESERVED | _HOOKED
_SPECIAL = frozenset({"__call__", "__getattr__", "__getattribute__", "__getstate__", "__setattr__", "__setstate__"})
_METADATA = frozenset({"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "shape", "size"})
_REACHES_ANYTHING = frozenset({"eval", "exec", "globals", "locals", "__class__"})
_HARMLESS_DECORATORS = frozenset({"torch.no_grad()", "torch.inference_mode()"})


def subclass_problem(module: nn.Linear | nn.Embedding) -> str | None:
    """Why ``module`` cannot be compressed, as far as its class and its own attributes tell, or None."""
    kind: Any = type(module)
    if original_forward(module) is not kind.forward:
        return "its forward has been replaced on the object itself, which a compressed module would lose"
    if not module._parameters.keys() <= _OWN_PARAMETERS:
        parameters = sorted(module._parameters.keys() - _OWN_PARAMETERS)
        return f"it holds parameters besides its weight and bias: {', '.join(parameters)}"
    if not all(map(_RESERVED.isdisjoint, (vars(module), module._buffers, module._modules))):
        taken = sorted(_RESERVED.intersection((*vars(module), *module._buffers, *module._modules)))
        return f"it has attributes that a compressed module needs for itself: {', '.join(taken)}"
    return None if kind is nn.Linear or kind is nn.Embedding else _class_problem(kind)


def blank_successor(module: nn.Linear | nn.Embedding) -> CompressedLinear | CompressedEmbedding:
    """A compressed module for ``module``, not yet initialized: of a class derived from that of ``module``.

    It has the mode of ``module``, its very hooks, its buffers, its children and all else but the tensors of the weight.
    """
    base = CompressedLinear if isinstance(module, nn.Linear) else CompressedEmbedding
    kind: Any = type(module)
    kind = base if kind in (nn.Linear, nn.Embedding) else _compressed_class(kind)
    blank: CompressedLinear | CompressedEmbedding = kind.__new__(kind)
    own = vars(blank)
    own.update(vars(module))
    for name in _LEFT_BEHIND & own.keys():
        del own[name]
    own.update([(name, kind_of_container()) for name, kind_of_container in _STARTED_ANEW])
    own["_buffers"].update(module._buffers)
    own["_non_persistent_buffers_set"].update(module._non_persistent_buffers_set)
    own["_modules"].update(module._modules)
    return blank


def original_class(module: CompressedModule) -> type[nn.Module]:
    """The class of the module in whose place ``module`` stands."""
    plain = nn.Linear if isinstance(module, CompressedLinear) else nn.Embedding
    return getattr(type(module), "_original", plain)


def carry_attributes(source: nn.Module, successor: nn.Module) -> None:
    """Give ``successor`` the buffers, the children and all else that ``source`` has, but tensors of the weight."""
    own = vars(successor)
    for name, value in vars(source).items():
        if name not in _NOT_CARRIED:
            own.setdefault(name, value)
    successor._buffers.update(source._buffers)
    successor._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    successor._modules.update(source._modules)


@cache
def _compressed_class(original: type[Any]) -> type[CompressedModule]:
    base = CompressedLinear if issubclass(original, nn.Linear) else CompressedEmbedding

    def reduce(self: CompressedModule, protocol: Any) -> Any:
        # The class is made at run time, so pickle is told how to make it again.
        return _blank, (original,), self.__getstate__()

    content = {"_original": original, "__reduce_ex__": reduce, "__module__": __name__, "__doc__": base.__doc__}
    # Before `base`, so that its own methods come first, and its super() is `base`.
    return types.new_class(f"Compressed{original.__name__}", (original, base), exec_body=lambda ns: ns.update(content))


def _blank(original: Any) -> CompressedModule:
    kind: Any = _compressed_class(original)
    blank: CompressedModule = kind.__new__(kind)
    return blank


# What a class does in forward ----------------------------------------------------------------------------------------


@cache
def _class_problem(kind: type[Any]) -> str | None:
    base: type[nn.Module] = nn.Linear if issubclass(kind, nn.Linear) else nn.Embedding
    own = kind.__mro__[: kind.__mro__.index(base)]
    needed = (_SPECIAL | _RESERVED).union(name for name in vars(CompressedModule) if not name.startswith("__"))
    for found in own:
        overridden = sorted(vars(found).keys() & needed)
        if overridden:
            return f"{found.__name__} has {overridden[0]} of its own, which a compressed module needs for itself"
    pending: list[tuple[type, str]] = [(found, "forward") for found in own if "forward" in vars(found)]
    seen = set(pending)
    while pending:
        owner, name = pending.pop()
        function = vars(owner)[name]
        problem, used = _function_problem(function.fget if isinstance(function, property) else function, base)
        if problem is not None:
            return f"{owner.__name__} {problem}"
        # Whichever of the classes defines what is used, in a subclass it may be another than here.
        reached = [(found, attribute) for attribute in sorted(used) for found in own if attribute in vars(found)]
        pending += [one for one in reached if one not in seen and _is_code(vars(one[0])[one[1]])]
        seen.update(reached)
    return None


def _is_code(attribute: object) -> bool:
    return isinstance(attribute, property) or inspect.isroutine(attribute)


def _function_problem(function: Any, base: type[nn.Module]) -> tuple[str | None, set[str]]:
    """What keeps a method from running packed, and else the attributes of its own object that it uses."""
    if isinstance(function, staticmethod):
        return None, set()
    name = getattr(function, "__name__", "forward")
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return f"computes something of its own in {name}, whose source cannot be read", set()
    if not isinstance(tree, ast.FunctionDef) or not (tree.args.posonlyargs or tree.args.args):
        return f"computes something of its own in {name}, which is no plain method", set()
    unknown = [ast.unparse(found) for found in tree.decorator_list]
    unknown = [found for found in unknown if found not in (*_HARMLESS_DECORATORS, "property")]
    if unknown:
        return f"computes something of its own in {name}, behind the decorator {unknown[0]}", set()
    me = (*tree.args.posonlyargs, *tree.args.args)[0].arg
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    used: set[str] = set()
    for problem, attribute in _uses(tree, me, parents, base):
        if problem is not None:
            return problem.format(name), set()
        used.add(attribute)
    return None, used


def _uses(
    tree: ast.FunctionDef, me: str, parents: dict[ast.AST, ast.AST], base: type[nn.Module]
) -> Iterator[tuple[str | None, str]]:
    """Each attribute of ``me`` that a method uses, with what is wrong with that."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name):
            continue
        parent = parents[node]
        if node.id in _REACHES_ANYTHING:
            yield f"calls {node.id} in {{}}, which may read its weight", ""
        elif node.id == "super":
            reached = parents[parent]
            if not (isinstance(parent, ast.Call) and isinstance(reached, ast.Attribute) and reached.attr == "forward"):
                yield "reaches past its own class in {} for something else than forward", ""
        elif node.id == me and isinstance(parent, ast.Attribute):
            yield _attribute_problem(parent, parents, base), parent.attr
        elif node.id == me and not _is_super(parent):
            yield "passes itself on in {}, to what may read its weight", ""


def _attribute_problem(node: ast.Attribute, parents: dict[ast.AST, ast.AST], base: type[nn.Module]) -> str | None:
    name, parent = node.attr, parents[node]
    if not isinstance(node.ctx, ast.Load) and (name == "weight" or name in _RESERVED):
        return f"sets its {name} in {{}}"
    if name == "weight":
        knows = isinstance(parent, ast.Attribute) and parent.attr in _METADATA
        return None if knows else "reads the values of its weight in {}, which would be dequantized at every call"
    if name in _STATE or (hasattr(base, name) and name != "forward"):
        return f"uses {name} in {{}}, which may read its weight"
    return None


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
