"""Linear layers whose weight other code reads, instead of calling the layer: they are neither adapted nor quantized.

Mamba's layers give the weight of their last projection to a fused kernel in training. A layer that replaces it has no
such weight, or another one, and an adapter in it would have no effect.
"""

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

# Methods that set initial values, which are those of the files in a base that is loaded.
SETS_VALUES = ("__init__", "init_", "_init_", "reset_", "_reset_")
# Comparisons that are computed in conditions; a condition with another one counts as unknown.
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip

OWN = __name__.partition(".")[0]
# Where the base classes of all models are defined, whose methods know no names of a model's parts.
GENERAL = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation.")

# A condition, and the value that it has where a weight is read.
Condition = tuple[ast.expr, bool]


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
    test, expected = condition
    try:
        return bool(_value(test, module)) == expected
    except (AttributeError, TypeError, ValueError):
        return True


def _value(node: ast.expr, module: nn.Module) -> Any:
    """Return the value of a condition on the attributes of a module, which is `self` there.

    Raises:
        AttributeError: The module has no such attribute.
        TypeError: Values can't be compared.
        ValueError: The condition depends on something else, or on whether the module is being trained.
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Attribute() if (path := _path(node)) and "training" not in path.split("."):
            return operator.attrgetter(path)(module)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, module)
        case ast.BoolOp(op=op, values=values):
            combine = all if isinstance(op, ast.And) else any
            return combine(_value(each, module) for each in values)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return COMPARISONS[type(op)](_value(left, module), _value(right, module))
    raise ValueError(f"{ast.unparse(node)} is no condition on attributes of a module")


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
    if isinstance(node, ast.If):
        yield from _reads_below(node.test, conditions)
        for statements, expected in ((node.body, True), (node.orelse, False)):
            for statement in statements:
                yield from _reads_below(statement, (*conditions, (node.test, expected)))
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
