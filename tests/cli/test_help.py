"""Every command and option has a help text, and none is cut off at 80 columns."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from cli.main import app

COLUMNS = 80


def commands(command: Any = None, name: str = "lora") -> Iterator[tuple[str, Any]]:
    command = command or get_command(app)
    yield name, command
    for below, its in getattr(command, "commands", {}).items():
        yield from commands(its, f"{name} {below}")


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_has_a_help_text(name: str) -> None:
    assert [param.name for param in COMMANDS[name].params if not getattr(param, "help", None)] == []


@pytest.mark.parametrize(
    "name", [name for name, its in COMMANDS.items() if hasattr(its, "commands")]
)
def test_the_list_of_commands_is_not_cut_off(name: str) -> None:
    below = COMMANDS[name].commands
    # as click has it: margins, and the gap between the columns
    room = COLUMNS - 8 - max(map(len, below))
    for command in below.values():
        assert command.help, command.name
        text = command.get_short_help_str(room)
        assert text and not text.endswith("..."), f"{command.name}: {text}"
