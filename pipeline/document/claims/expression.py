"""A small language that says how a claim is measured: arithmetic, comparisons, parts of JSON, calls of named functions.

It has Python's syntax. What stands in the tables below exists, all else is refused when it is read; no code runs.
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

LONGEST, DEEPEST, BITS = 1000, 40, 1024  # characters, nodes above a node, of a whole number
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
    **{ast.In: lambda one, many: one in many, ast.NotIn: lambda one, many: one not in many},
}
TRUTH = {"true": True, "false": False}  # as YAML and JSON write them


class _Refused(Exception):
    """Why an expression is refused; `Expression` says which."""


@dataclass(frozen=True)
class Expression:
    """A text whose every node is allowed; `calls` are the functions and `names` the values that it takes."""

    text: str
    calls: frozenset[str]
    names: frozenset[str]

    def value(self, names: Values, functions: Mapping[str, Function]) -> Any:
        """What it comes to. Raises UserError, and what a function raises."""
        try:
            return _value(_tree(self.text), names, functions)
        except _Refused as error:
            raise _problem(self.text, error) from None


def parse(text: str, names: Collection[str], functions: Mapping[str, Function]) -> Expression:
    """Read an expression that may use these names and functions. Raises UserError with what is allowed."""
    try:
        tree = _tree(text)
        _check(tree, names, functions)
    except _Refused as error:
        raise _problem(text, error) from None
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    found = frozenset(node.id for node in used) - calls - TRUTH.keys()
    return Expression(text, frozenset(calls), found)


def _problem(text: str, error: _Refused) -> UserError:
    shown = text if len(text) <= 120 else text[:120] + "…"
    return UserError(f"`{' '.join(shown.split())}`: {error}")


@lru_cache(maxsize=1024)
def _tree(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise _Refused(f"it must be at most {LONGEST:,} characters long, not {len(text):,}")
    for _ in range(3):
        try:
            return ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "too many levels"
            raise _Refused(f"it is no expression ({reason}). Allowed: {ALLOWED}") from None
        except SystemError:  # CPython 3.11, where another thread parses at the same time
            continue
    raise _Refused("it cannot be read now. Try again")


def _check(node: ast.AST, names: Collection[str], functions: Mapping[str, Function], depth: int = 0) -> None:
    """Raises _Refused at the first node that is not in this language."""
    if depth > DEEPEST:
        raise _Refused(f"it must be at most {DEEPEST} levels deep")
    match node:
        case ast.Constant(value=value) if type(value) in CONSTANTS:
            _bounded(value)
        case ast.Name(id=name):
            _known(name, [*TRUTH, *names], "name")
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            _known(name, functions, "function")
            _fits(name, functions[name], args, keywords)
        case ast.BinOp(op=op) if type(op) in BINARY:
            pass
        case ast.UnaryOp(op=op) if type(op) in UNARY or isinstance(op, ast.Not):
            pass
        case ast.Compare(ops=ops) if all(type(op) in ORDER or type(op) in EQUAL for op in ops):
            pass
        case ast.BoolOp() | ast.Attribute() | ast.Subscript():
            pass
        case _:
            raise _Refused(f"{_said(node)} is not allowed. Allowed: {ALLOWED}")
    for child in _children(node):
        _check(child, names, functions, depth + 1)


def _children(node: ast.AST) -> list[ast.AST]:
    """The expressions below a node; not what stands between them."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr | ast.comprehension)]


def _said(node: ast.AST) -> str:
    """A node as its writer wrote it, as far as that is short."""
    try:
        text = ast.unparse(node)
    except (ValueError, RecursionError):
        text = type(node).__name__
    return text if len(text) <= 60 else text[:60] + "…"


def _known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        raise _Refused(f"there is no {what} {name}. There are: {', '.join(sorted(known)) or 'none'}")


def _fits(name: str, function: Function, args: list[ast.expr], keywords: list[ast.keyword]) -> None:
    """Raises _Refused for arguments that the function does not take."""
    if any(keyword.arg is None for keyword in keywords):
        raise _Refused(f"{name}(**…) is not allowed. Name each argument")
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **{str(keyword.arg): keyword.value for keyword in keywords})
    except TypeError as error:
        raise _Refused(f"{name}: {error}. It is called as {name}{_arguments(signature)}") from None


def _arguments(signature: inspect.Signature) -> str:
    plain = [value.replace(annotation=inspect.Parameter.empty) for value in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _value(node: ast.expr, names: Values, functions: Mapping[str, Function]) -> Any:
    def of(one: ast.expr) -> Any:
        return _value(one, names, functions)

    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return TRUTH[name] if name in TRUTH else names[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = {str(each.arg): of(each.value) for each in keywords}
            return _called(name, functions[name], [*map(of, args)], named)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not of(operand)
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](number(of(operand)))
        case ast.BinOp(left=left, op=op, right=right):
            return _computed(type(op), number(of(left)), number(of(right)))
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(of(part) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compared(of(left), ops, list(map(of, others)))
        case ast.Attribute(value=inner, attr=key):
            return _part(of(inner), key)
        case ast.Subscript(value=inner, slice=key_node):
            return _part(of(inner), of(key_node))
    raise _Refused(f"{_said(node)} is not allowed. Allowed: {ALLOWED}")


def _called(name: str, function: Function, args: list[Any], keywords: Values) -> Any:
    try:
        return function(*args, **keywords)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise _Refused(f"{name} cannot be asked so ({error})") from None


def number(value: Any) -> int | float:
    """A number; of several seeds, their mean. Raises UserError's cause for anything else."""
    if isinstance(value, Spread):
        return value.mean
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(f"a number is needed, got {_short(value)}")
    return value


def _computed(op: type[ast.operator], left: float, right: float) -> Any:
    if op is ast.Pow and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 2 * BITS:
        raise _Refused("a number is too large")
    try:
        return _bounded(BINARY[op](left, right))
    except ZeroDivisionError:
        raise _Refused("it divides by zero") from None
    except OverflowError:
        raise _Refused("a number is too large") from None


def _bounded(value: Any) -> Any:
    """The value itself, if it is a real number of a sensible size, or no number at all."""
    if isinstance(value, complex):
        raise _Refused("a root of a negative number is not a real number")
    if isinstance(value, int) and value.bit_length() > BITS:
        raise _Refused("a number is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused("a number is too large")
    return value


def _compared(left: Any, ops: list[ast.cmpop], others: list[Any]) -> bool:
    """a < b < c, as mathematics has it."""
    for op, right in zip(ops, others, strict=True):
        if type(op) in ORDER:
            holds = ORDER[type(op)](number(left), number(right))
        elif isinstance(op, ast.In | ast.NotIn) and not isinstance(right, list | dict | str):
            raise _Refused(f"`in` needs a list, got {_short(right)}")
        else:
            holds = EQUAL[type(op)](_plain(left), _plain(right))
        if not holds:
            return False
        left = right
    return True


def _plain(value: Any) -> Any:
    return value.mean if isinstance(value, Spread) else value


def _part(whole: Any, key: Any) -> Any:
    """A mapping's value, a list's element, or mean, low or high of several seeds."""
    if isinstance(whole, Spread):
        whole = whole._asdict()
    if isinstance(whole, Mapping) and isinstance(key, str | int):
        if key not in whole:
            near = ", ".join(map(str, list(whole)[:12]))
            raise _Refused(f"there is no {key!r} among {near}")
        return whole[key]
    if isinstance(whole, list) and isinstance(key, int) and not isinstance(key, bool):
        if not -len(whole) <= key < len(whole):
            raise _Refused(f"there is no element {key} in a list of {len(whole)}")
        return whole[key]
    raise _Refused(f"{_short(whole)} has no part {key!r}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
