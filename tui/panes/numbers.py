"""A column of numbers in a table."""

from collections.abc import Callable
from typing import Any, TypeVar

from textual.content import Content

from pipeline.evaluation.comparison import MISSING
from tui.panes.table import Column

R = TypeVar("R")


def numbers(
    title: str, get: Callable[[R], Any], form: Callable[[Any], Content | str], **how: Any
) -> Column[R]:
    """A column of a number by which rows are sorted; – where it was not measured."""

    def cell(row: R) -> Content | str:
        number = get(row)
        return MISSING if number is None else form(number)

    return Column(title, cell, get, right=True, **how)
