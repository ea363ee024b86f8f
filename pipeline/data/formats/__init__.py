"""The shapes that a line of a .jsonl file may have: one file each, found here and asked in their order.

A format's file has `FORMAT`; an example names the line of the file that it was read from.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from pipeline.data.examples import Example
from pipeline.data.records import Record, parse_record
from pipeline.errors import UserError


class Format(NamedTuple):
    """`shape`: its keys, for messages. `detect`: whether a record is of this format, by its keys alone.

    `read(record, file, line)`: the example. Raises UserError with the line and the reason.
    """

    order: int
    shape: str
    detect: Callable[[Record], bool]
    read: Callable[[Record, str, int], Example]


def read_line(line: str, file: str, number: int) -> Example:
    """The example in a line of JSON. Raises UserError with the file, the line and the reason."""
    location, shapes = f"{file}:{number}", " or ".join([", ".join(SHAPES[:-1]), SHAPES[-1]])
    record = parse_record(line, location, shapes)
    for each in FORMATS:
        if each.detect(record):
            return each.read(record, file, number)
    raise UserError(f"{location}: the keys must be {shapes}, got {', '.join(map(repr, record)) or 'none'}.")


FORMATS: tuple[Format, ...] = tuple(
    sorted(
        (import_module(f"{__name__}.{module.name}").FORMAT for module in pkgutil.iter_modules(__path__)),
        key=lambda each: each.order,
    )
)
SHAPES = [each.shape for each in FORMATS]
