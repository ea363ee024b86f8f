"""The expression language of a claim's `measure`: arithmetic, comparisons, access to JSON, calls of named functions.

The syntax is a subset of Python's. Only the operators in the tables below are allowed; anything else is rejected when
the expression is read. Expressions are interpreted node by node and never passed to eval().
"""

import ast
import inspect
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.document.tables import Spread
from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr

MAX_CHARACTERS, MAX_DEPTH, MAX_BITS = 1000, 40, 1024  # of an expression, of its syntax tree, of an integer
ALLOWED = (
    "numbers, texts, true, false, + - * / **, comparisons, and, or, not, parts (a.b, a['b'], a[0]), calls of functions"
)

Function = Callable[..., Any]
Values = Mapping[str, Any]

CONSTANTS = (bool, int, float, str)
UNARY: Mapping[type[ast.unaryop], Function] = {ast.USub: operator.neg}
BINARY: Mapping[type[ast.operator], Function] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.Div: operator.truediv, ast.Pow: operator.pow},
}
ORDER: Mapping[type[ast.cmpop], Function] = {
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
}
EQUAL: Mapping[type[ast.cmpop], Function] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne},
    **{ast.In: lambda item, items: item in items, ast.NotIn: lambda item, items: item not in items},
}
TRUTH = {"true": True, "false": False}  # as YAML and JSON write them


class _Rejected(Exception):
    """The reason an expression is rejected; `_user_error` adds the expression itself."""


@dataclass(frozen=True)
class Expression:
    """A checked expression; `calls` are the functions and `names` the values that it uses."""

    text: str
    calls: frozenset[str]
    names: frozenset[str]

    def value(self, names: Values, functions: Mapping[str, Function]) -> Any:
        """Evaluate the expression. Raises UserError, and whatever a called function raises."""
        try:
            return _evaluate(_tree(self.text), names, functions)
        except _Rejected as error:
            raise _user_error(self.text, error) from None


def parse(text: str, names: Collection[str], functions: Mapping[str, Function]) -> Expression:
    """Parse an expression that may use these names and functions. Raises UserError listing what is allowed."""
    try:
        tree = _tree(text)
        _check(tree, names, functions)
    except _Rejected as error:
        raise _user_error(text, error) from None
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    value_names = frozenset(node.id for node in used) - calls - TRUTH.keys()
    return Expression(text, frozenset(calls), value_names)


def _user_error(text: str, error: _Rejected) -> UserError:
    shown = text if len(text) <= 120 else text[:120] + "…"
    return UserError(f"`{' '.join(shown.split())}`: {error}")


@lru_cache(maxsize=1024)
def _tree(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise _Rejected(f"an expression must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    for _ in range(3):
        try:
            return ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "nested too deeply"
            raise _Rejected(f"this is not an expression ({reason}). Allowed: {ALLOWED}") from None
        except SystemError:  # a CPython 3.11 bug, if another thread parses at the same time
            continue
    raise _Rejected("the expression could not be parsed. Try again")


def _check(node: ast.AST, names: Collection[str], functions: Mapping[str, Function], depth: int = 0) -> None:
    """Raises _Rejected at the first node that is not allowed."""
    if depth > MAX_DEPTH:
        raise _Rejected(f"an expression must be at most {MAX_DEPTH} levels deep")
    match node:
        case ast.Constant(value=value) if type(value) in CONSTANTS:
            _check_size(value)
        case ast.Name(id=name):
            _check_exists(name, [*TRUTH, *names], "name")
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            _check_exists(name, functions, "function")
            _check_arguments(name, functions[name], args, keywords)
        case ast.BinOp(op=op) if type(op) in BINARY:
            pass
        case ast.UnaryOp(op=op) if type(op) in UNARY or isinstance(op, ast.Not):
            pass
        case ast.Compare(ops=ops) if all(type(op) in ORDER or type(op) in EQUAL for op in ops):
            pass
        case ast.BoolOp() | ast.Attribute() | ast.Subscript():
            pass
        case _:
            raise _Rejected(f"{_source(node)} is not allowed. Allowed: {ALLOWED}")
    for child in _children(node):
        _check(child, names, functions, depth + 1)


def _children(node: ast.AST) -> list[ast.AST]:
    """The subexpressions of a node, without its operators."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr | ast.comprehension)]


def _source(node: ast.AST) -> str:
    """The node's source text, at most 60 characters of it."""
    try:
        text = ast.unparse(node)
    except (ValueError, RecursionError):
        text = type(node).__name__
    return text if len(text) <= 60 else text[:60] + "…"


def _check_exists(name: str, existing: Collection[str], what: str) -> None:
    if name not in existing:
        raise _Rejected(f"there is no {what} {name}. There are: {', '.join(sorted(existing)) or 'none'}")


def _check_arguments(name: str, function: Function, args: list[ast.expr], keywords: list[ast.keyword]) -> None:
    """Raises _Rejected if the function does not take these arguments."""
    if any(keyword.arg is None for keyword in keywords):
        raise _Rejected(f"{name}(**…) is not allowed. Name each argument")
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **{str(keyword.arg): keyword.value for keyword in keywords})
    except TypeError as error:
        raise _Rejected(f"{name}: {error}. It is called as {name}{_format_signature(signature)}") from None


def _format_signature(signature: inspect.Signature) -> str:
    unannotated = [value.replace(annotation=inspect.Parameter.empty) for value in signature.parameters.values()]
    return str(signature.replace(parameters=unannotated, return_annotation=inspect.Signature.empty))


def _evaluate(node: ast.expr, names: Values, functions: Mapping[str, Function]) -> Any:
    def value_of(child: ast.expr) -> Any:
        return _evaluate(child, names, functions)

    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return TRUTH[name] if name in TRUTH else names[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = {str(keyword.arg): value_of(keyword.value) for keyword in keywords}
            return _call(name, functions[name], [*map(value_of, args)], named)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value_of(operand)
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](number(value_of(operand)))
        case ast.BinOp(left=left, op=op, right=right):
            return _compute(type(op), number(value_of(left)), number(value_of(right)))
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(value_of(part) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compare(value_of(left), ops, list(map(value_of, others)))
        case ast.Attribute(value=inner, attr=key):
            return _get_item(value_of(inner), key)
        case ast.Subscript(value=inner, slice=key_node):
            return _get_item(value_of(inner), value_of(key_node))
    raise _Rejected(f"{_source(node)} is not allowed. Allowed: {ALLOWED}")


def _call(name: str, function: Function, args: list[Any], keywords: Values) -> Any:
    try:
        return function(*args, **keywords)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise _Rejected(f"{name} cannot be called with these arguments ({error})") from None


def number(value: Any) -> int | float:
    """The value as a number, a Spread as its mean. Raises _Rejected for anything else."""
    if isinstance(value, Spread):
        return value.mean
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Rejected(f"expected a number, got {abbreviate_repr(value)}")
    return value


def _compute(op: type[ast.operator], left: float, right: float) -> Any:
    if op is ast.Pow and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 2 * MAX_BITS:
        raise _Rejected("the number is too large")
    try:
        return _check_size(BINARY[op](left, right))
    except ZeroDivisionError:
        raise _Rejected("division by zero") from None
    except OverflowError:
        raise _Rejected("the number is too large") from None


def _check_size(value: Any) -> Any:
    """Returns the value. Raises _Rejected for a complex, infinite or huge number."""
    if isinstance(value, complex):
        raise _Rejected("the root of a negative number is not real")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _Rejected("the number is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Rejected("the number is too large")
    return value


def _compare(left: Any, ops: list[ast.cmpop], others: list[Any]) -> bool:
    """A chain such as a < b < c: true if every pair holds."""
    for op, right in zip(ops, others, strict=True):
        if type(op) in ORDER:
            holds = ORDER[type(op)](number(left), number(right))
        elif isinstance(op, ast.In | ast.NotIn) and not isinstance(right, list | dict | str):
            raise _Rejected(f"`in` needs a list, got {abbreviate_repr(right)}")
        else:
            holds = EQUAL[type(op)](_mean_of_seeds(left), _mean_of_seeds(right))
        if not holds:
            return False
        left = right
    return True


def _mean_of_seeds(value: Any) -> Any:
    return value.mean if isinstance(value, Spread) else value


def _get_item(container: Any, key: Any) -> Any:
    """A mapping's value, a list's element, or `mean`, `low` or `high` of a Spread."""
    if isinstance(container, Spread):
        container = container._asdict()
    if isinstance(container, Mapping) and isinstance(key, str | int):
        if key not in container:
            keys = ", ".join(map(str, list(container)[:12]))
            raise _Rejected(f"there is no {key!r} among {keys}")
        return container[key]
    if isinstance(container, list) and isinstance(key, int) and not isinstance(key, bool):
        if not -len(container) <= key < len(container):
            raise _Rejected(f"there is no element {key} in a list of {len(container)}")
        return container[key]
    raise _Rejected(f"{abbreviate_repr(container)} has no element {key!r}")
