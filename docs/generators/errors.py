"""docs/reference/errors.md: exit codes, and every message of a `UserError`, read from the code
without running it.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD = """# Errors

Written by `python -m docs` from the code. An error that you can fix is one message on stderr, without a traceback: what
is wrong, the rule, the value, and what to do next. Search this page for the words of a message: below each file are its
messages, and the function that raises each. Words in CAPITALS stand for a value, … for what depends on the case.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | an error with a message; also a broken limit of `lora evaluate`, and data with errors in `lora data check` |
| 2 | wrong usage: an unknown command or option, or a value that an option does not take |
| 128 + n | stopped by signal n: 130 by Ctrl+C, 143 by SIGTERM. The message says whether the same command resumes |

A traceback is a bug.

## Out of memory

`out of memory (…). Use a smaller model, shorter texts or smaller params` comes from PyTorch or the operating system.
`lora calc` shows what a training needs; [quantization](../how-to/quantization.md), gradient checkpointing, a smaller
batch and [other methods](../how-to/methods.md) need less. On the CPU (`--device cpu`) there is more memory than on most
GPUs.
"""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def pages() -> dict[str, str]:
    lines = [HEAD]
    for path in sorted(
        path for folder in ("cli", "pipeline", "tui") for path in (ROOT / folder).rglob("*.py")
    ):
        name = path.relative_to(ROOT).as_posix()
        found = list(dict.fromkeys(_raised(path)))
        if found:
            lines += [f"## `{name}`\n"]
            lines += [
                f"- {_code(message)} in [`{function}`](../../{name}#{function})"
                for message, function in found
            ]
            lines += [""]
    return {"reference/errors.md": "\n".join(lines).rstrip() + "\n"}


def definitions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, Definition]]:
    """Every class and function of a file, by its qualified name: anchors of its page in the
    site.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield f"{outer}{node.name}", node
            yield from definitions(node, f"{outer}{node.name}.")
        else:
            yield from definitions(node, outer)


def _raised(path: Path) -> Iterator[tuple[str, str]]:
    """Each message with the innermost function that makes it; none that only hands on another's
    words.
    """
    constants = _constants(path)
    owners = {
        each: name
        for name, node in definitions(ast.parse(path.read_text(encoding="utf-8")))
        for each in ast.walk(node)
    }
    for node, owner in owners.items():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError":
            message = " ".join(_text(node.args[0], constants).split())
            if re.search("[a-z]{2} [a-z]{2}", message):
                yield message, owner


def _text(node: ast.expr, constants: Mapping[str, str]) -> str:
    """A message with NAMES for its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Constant):
        return str(node.value)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.Name) and value.id in constants:
        return constants[value.id]
    return _placeholder(value)


def _placeholder(value: ast.expr) -> str:
    """What stands for a value: the last of its names that says what it is."""
    match value:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").upper()
        case ast.Subscript(value=inner) | ast.BinOp(left=inner) | ast.Starred(value=inner):
            return _placeholder(inner)
        case ast.Call(
            args=[*_, ast.Name() | ast.Attribute() | ast.Call() | ast.Subscript() as inner]
        ):  # str(x), ", ".join(x)
            return _placeholder(inner)
        case ast.Call(
            args=[ast.Name() | ast.Attribute() | ast.Call() | ast.Subscript() as inner, *_]
        ):  # abbreviate(x, 200)
            return _placeholder(inner)
        case ast.Call(func=ast.Attribute(value=inner)):  # x.upper()
            return _placeholder(inner)
    return "…"


@cache
def _constants(path: Path) -> Mapping[str, str]:
    """Texts that a file defines or imports by a NAME in capitals."""
    constants = dict[str, str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            source = ROOT.joinpath(*node.module.split("."))
            source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
            wanted = {each.name for each in node.names if each.name.isupper()}
            if wanted and source.is_file():
                constants |= {
                    name: text for name, text in _constants(source).items() if name in wanted
                }
        elif isinstance(node, ast.Assign):
            constants |= _assigned(node)
    return constants


def _assigned(node: ast.Assign) -> Iterator[tuple[str, str]]:
    """NAME = "text", and FIRST, SECOND = "text", "text"."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            pairs = list(zip(targets, values, strict=False))
        case _:
            pairs = [(node.targets[0], node.value)]
    for target, value in pairs:
        if (
            isinstance(target, ast.Name)
            and isinstance(value, ast.Constant)
            and isinstance(value.value, str)
        ):
            yield target.id, value.value


def _code(message: str) -> str:
    return f"`` {message} ``" if "`" in message or message.startswith("lora ") else f"`{message}`"
