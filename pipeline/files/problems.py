"""What is wrong in the rows of data files: the first rows, and groups of one fault."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.errors import UserError

Level = Literal["error", "warning"]
KEPT = 50  # problems of one kind; all are counted
LONGEST = 500  # characters of a problem: some list all words of a row
MAX_GROUPS = 200  # of one level; what is in none of them is counted by its kind
NUMBERS = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Problem:
    """A problem of a row, or of the file if `row` is None. An "error" would spoil a training."""

    row: int | None
    file: str
    problem: str
    level: Level


@dataclass(frozen=True)
class Group:
    """Rows with the same fault, up to the numbers in it, and what is said of the first of them."""

    level: Level
    problem: str
    file: str
    row: int | None
    rows: int

    def __str__(self) -> str:
        if self.rows > 1:
            return f"{self.file}: {self.rows:,} rows: {self.problem} First: row {self.row}."
        return f"{self.file}{'' if self.row is None else f':{self.row}'}: {self.problem}"


@dataclass
class Problems:
    """Collects problems in bounded memory."""

    _kept: list[tuple[int, Problem]] = field(default_factory=list)  # with the number of its file
    counts: Counter[str] = field(default_factory=Counter)
    levels: Counter[Level] = field(default_factory=Counter)
    _groups: dict[tuple[Level, str, str], Group] = field(default_factory=dict)

    def add(self, kind: str, level: Level, file: int, problem: Problem) -> None:
        self.counts[kind] += 1
        self.levels[level] += 1
        if self.counts[kind] <= KEPT:
            self._kept.append((file, problem))
        key = (level, problem.file, NUMBERS.sub("#", problem.problem))
        if (
            key not in self._groups
            and sum(level == group[0] for group in self._groups) >= MAX_GROUPS
        ):
            key = (level, problem.file, kind)
        group = self._groups.get(key) or Group(level, problem.problem, problem.file, problem.row, 0)
        self._groups[key] = replace(group, rows=group.rows + 1)

    def in_order(self) -> tuple[Problem, ...]:
        """Errors first, then by file and row."""

        def place(item: tuple[int, Problem]) -> tuple[bool, int, int]:
            file, problem = item
            return problem.level != "error", file, problem.row or 0

        return tuple(problem for _, problem in sorted(self._kept, key=place))

    def groups(self) -> tuple[Group, ...]:
        """Errors first, then the largest."""
        return tuple(
            sorted(self._groups.values(), key=lambda group: (group.level != "error", -group.rows))
        )


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def without_location(error: UserError, file: str, row: int | None) -> str:
    """The message of an error without the file and the row that it begins with."""
    text = str(error)
    for location in (f"{file}:{row}: ", f"{file}: row {row}: ", f"{file}: "):
        if text.startswith(location):
            return text.removeprefix(location)
    return text
