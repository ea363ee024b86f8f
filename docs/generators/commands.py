"""docs/reference/commands.md: every command of `lora` with its arguments and options, as Typer has
them.
"""

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from cli.main import app
from docs.generators import cell, table

HEAD = """# The commands of lora

Written by `python -m docs` from the commands themselves; each with `--help` prints the same in a terminal.
`lora --version` shows the version, `lora --install-completion` completes commands in your shell. The result goes to
stdout, messages and progress to stderr.
[Exit codes](errors.md#exit-codes) · [settings of params.yaml](params.md)
"""
METAVARS = {
    "path": "PATH",
    "str": "TEXT",
    "text": "TEXT",
    "int": "N",
    "int range": "N",
    "float": "X",
    "float range": "X",
}


def pages() -> dict[str, str]:
    return {
        "reference/commands.md": "\n".join([HEAD, *_described(get_command(app), "lora", 1)]) + "\n"
    }


def _described(command: Any, name: str, level: int) -> Iterator[str]:
    """A command's section, then those of its subcommands."""
    subcommands = getattr(command, "commands", {})
    if level > 1:  # `lora` itself is the page
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [
            each for each in command.params if each.param_type_name == "option" and not each.hidden
        ]
        yield f"{'#' * level} {name}\n"
        yield f"{' '.join((command.help or '').split())}\n"
        if not subcommands or getattr(command, "invoke_without_command", False):
            words = [_argument(each) for each in arguments] + ["[OPTIONS]"] * bool(options)
            yield f"    {' '.join((name, *words))}\n"
        if arguments:
            yield from table(
                ("argument", "meaning"),
                [(f"`{_metavar(each)}`", _help(each)) for each in arguments],
            )
        if options:
            rows = [(_option(each), _help(each), _default(each)) for each in options]
            yield from table(("option", "meaning", "default"), rows)
    for part in subcommands:
        yield from _described(subcommands[part], f"{name} {part}", level + 1)


def _metavar(parameter: Any) -> str:
    name = parameter.name.upper() if parameter.param_type_name == "argument" else ""
    return str(
        parameter.metavar or name or METAVARS.get(parameter.type.name, "VALUE")
    ).removesuffix("...")


def _argument(parameter: Any) -> str:
    name = _metavar(parameter) + ("…" if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    names = [f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts)]
    if not parameter.is_flag:
        names[-1] = f"{names[-1][:-1]} {_metavar(parameter)}`"
    return ", ".join(names) + (", repeatable" if parameter.multiple else "")


def _help(parameter: Any) -> str:
    """Its line of help, with the values that it takes."""
    kind, text = parameter.type, cell(parameter.help or "")
    if kind.name == "choice":
        text += f" One of {', '.join(f'`{choice}`' for choice in kind.choices)}."
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    if low is not None or high is not None:
        text += f" {f'At least {low}' if high is None else f'At most {high}' if low is None else f'{low} to {high}'}."
    return text


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value == ():
        return ""
    return f"`{parameter.opts[0]}`" if value is True else f"`{value}`"
