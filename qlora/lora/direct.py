"""Linear layers whose weight other code reads, instead of calling the layer: they are neither adapted nor quantized.

Mamba's layers give the weight of their last projection to a fused kernel in training. A layer that replaces it has no
such weight, or another one, and an adapter in it would have no effect.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

# Methods that set initial values, which are those of the files in a base that is loaded.
SETS_VALUES = ("__init__", "init_", "_init_", "reset_", "_reset_")
# What a condition may consist of to be evaluated: attributes of the module and constants.
CONDITION = (
    ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.boolop, ast.cmpop, ast.unaryop,
    ast.expr_context,
)  # fmt: skip

OWN = __name__.partition(".")[0]
# Where the base classes of all models are defined, whose methods know no names of a model's parts.
GENERAL = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation.")

# A condition, and the value that it has where a weight is read.
Condition = tuple[CodeType, bool]


def read_directly(model: nn.Module) -> list[str]:
    """Return the names of the modules whose weight is read by the code of a module around them, in the model's order.

    The code is that of the classes' methods, so a model without values is enough. Reads under a condition that the
    module's own attributes exclude don't count, such as Bloom's for `pretraining_tp`.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        kind: Any = type(module)
        if kind.__module__.partition(".")[0] == OWN:  # adapters read the weight that they are around
            continue
        for path, conditions in _reads(kind):
            if all(_may_hold(module, condition) for condition in conditions):
                found.add(f"{name}.{path}" if name else path)
    return [name for name, _ in model.named_modules() if name in found]


def _may_hold(module: nn.Module, condition: Condition) -> bool:
    code, expected = condition
    try:
        return bool(eval(code, {"__builtins__": {}}, {"self": module})) == expected
    except (AttributeError, TypeError):
        return True


@cache
def _reads(kind: Any) -> list[tuple[str, tuple[Condition, ...]]]:
    """Return the paths of the modules whose weight a class's methods read, each with the conditions around it."""
    found: list[tuple[str, tuple[Condition, ...]]] = []
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name.startswith(SETS_VALUES) or method.__module__.startswith(GENERAL):
            continue
        try:
            source = inspect.getsource(method)
        except OSError:
            continue
        if ".weight" in source:
            found += _reads_below(ast.parse(textwrap.dedent(source)), ())
    return found


def _reads_below(node: ast.AST, conditions: tuple[Condition, ...]) -> Iterator[tuple[str, tuple[Condition, ...]]]:
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        path = _path(node.value)
        if path:
            yield path, conditions
    if isinstance(node, ast.If) and (code := _evaluable(node.test)) is not None:
        for statements, expected in ((node.body, True), (node.orelse, False)):
            for statement in statements:
                yield from _reads_below(statement, (*conditions, (code, expected)))
        return
    for child in ast.iter_child_nodes(node):
        yield from _reads_below(child, conditions)


def _path(node: Any) -> str:
    """Return the path of an attribute of `self`, such as `mixer.out_proj`; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if isinstance(node, ast.Name) and node.id == "self" else ""


def _evaluable(test: ast.expr) -> CodeType | None:
    """Return a condition that follows from the module's attributes; None for others, and for its mode."""
    nodes = [*ast.walk(test)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    changes = any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes)
    if changes or names != {"self"} or not all(isinstance(node, CONDITION) for node in nodes):
        return None
    return compile(ast.Expression(test), "<condition>", "eval")
