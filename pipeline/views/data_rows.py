"""The rows of a data file as the reading process sends them: a list of any length, how long they
are, what is wrong with them, and the texts in one that can be edited.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import getitem
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.views.data_files import DataFile, flat

PAGE = 100  # rows that are asked for at once
BEFORE = 25  # of them that lie above the first that is missing
MAX_FIELDS = 40  # texts of a row that are edited one by one
CONTENTS = ("content", "value")  # the text of a turn
Answer = Mapping[str, Any]
Path = tuple[str | int, ...]  # of a text in a row
Lengths = Sequence[tuple[int, int]]  # (length, examples), in order


@dataclass
class RowLine:
    """A row in a list."""

    position: int  # in the file, counted from 0
    number: int  # as messages name it
    text: str
    problem: str = ""
    # None until they are counted
    tokens: int | None = None
    cut: int = 0


class FileRows(Sequence[RowLine]):
    """The rows of a file; after a search, those that were found. A row that was not read yet is None.

    `ask` is called with the position from which PAGE rows are wanted.
    """

    def __init__(self, ask: Callable[[int], None]) -> None:
        self.total, self.complete = 0, False  # as far as they are counted
        self.read: dict[int, RowLine] = {}  # by position
        self.found: list[int] | None = None  # positions
        self._ask, self._asked = ask, range(0)

    @property
    def positions(self) -> Sequence[int]:
        return range(self.total) if self.found is None else self.found

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, at: Any) -> Any:
        """A row, which is asked for if it is missing; of a slice, what was read."""
        position = self.positions[at]
        if not isinstance(position, int):
            return [self.read.get(number) for number in position]
        if position not in self.read:
            self.want(position)
        return self.read.get(position)

    def want(self, position: int) -> None:
        """Ask for the page around a row, unless it was the last that was asked for."""
        if position not in self._asked:
            first = max(position - BEFORE, 0)
            self._asked = range(first, first + PAGE)
            self._ask(first)

    def put(self, answer: Answer) -> list[int]:
        """Take rows that were read, or their lengths; returns the positions of the rows."""
        rows = answer["rows"] if answer["event"] == "page" else []
        for row in rows:
            line = RowLine(row["position"], row["row"], flat(row["text"]), row["problem"])
            self.read.setdefault(line.position, line)
            self.total = max(self.total, line.position + 1)
        for position, (tokens, _, cut) in answer.get("lengths", {}).items():
            line = self.read[int(position)]
            line.tokens, line.cut = tokens, cut
        for position, problem in answer.get("problems", {}).items():
            self.read[int(position)].problem = problem
        return [row["position"] for row in rows]


def row_facts(answer: Answer) -> list[str]:
    """How many tokens a row has, how many are trained on, and where it is cut."""
    turns = answer["turns"]
    if answer.get("tokens") is None:
        return ["mask by roles, no tokens"] if turns and not answer["problem"] else []
    facts = [f"{answer['tokens']:,} tokens", f"{answer['trained']:,} trained on"]
    if answer["cut"]:
        cut = [number for number, (_, parts) in enumerate(turns, 1) if "cut" in dict(parts)]
        where = f" from turn {cut[0]}" if cut and len(turns) > 1 else ""
        facts.insert(1, f"{answer['cut']:,} cut{where}")
    return facts


# The report of a check


class Problem(NamedTuple):
    """A problem, and the number of its row; None if it is the file's."""

    level: str
    row: int | None
    problem: str


def problem_facts(report: Answer) -> list[str]:
    """How many errors and warnings there are."""
    counts = {"error": report["errors"], "warning": report["warnings"]}
    return [f"{count:,} {name}{'s' * (count != 1)}" for name, count in counts.items() if count]


def length_facts(report: Answer, file: DataFile) -> list[str]:
    """How many examples are cut or windowed, and how long they are."""
    quantiles, cut = report["quantiles"], report["truncated"]
    if not quantiles:
        return []
    facts = [f"median {quantiles['p50']:,}", f"99% ≤ {quantiles['p99']:,}"]
    if file.max_length:
        share = cut / max(report["examples"], 1)
        facts.insert(0, f"{cut:,} cut ({share:.0%})" if cut else "none cut")
    elif file.window:
        # a window predicts as many tokens as it is long, from one more
        longer = sum(count for length, count in report["lengths"] if length > file.window + 1)
        facts.insert(0, f"{longer:,} in windows")
    return facts


def length_counts(
    lengths: Lengths, longest: int, max_length: int, width: int
) -> list[tuple[int, int]]:
    """Examples in each column of a histogram from 0 to `longest`, and how many of them are cut.

    Where there are more columns than lengths, a length has several.
    """
    counts, cut = [0] * width, [0] * width
    for length, count in lengths:
        first, behind = length * width // (longest + 1), (length + 1) * width // (longest + 1)
        for column in range(first, max(behind, first + 1)):
            counts[column] += count
            cut[column] += count * (0 < max_length < length)
    return list(zip(counts, cut, strict=True))


# The texts of a row


@dataclass(frozen=True)
class RowTexts:
    """A row that is edited: each text of it, or all of it as JSON, as a row must be that is no JSON
    object, or has no texts or too many.
    """

    first: str  # the row as it was, which may be no JSON yet
    line: str
    as_json: bool = False

    @cached_property
    def record(self) -> Any:
        """The row; None if it is no JSON."""
        return _loaded(self.line)

    @cached_property
    def paths(self) -> dict[Path, str]:
        """Where its texts are → what they are; () is all of it."""
        found = {} if self.as_json else _text_paths(self.record)
        return found if 0 < len(found) <= MAX_FIELDS else {(): ""}

    @property
    def fields(self) -> list[tuple[str, str]]:
        """What each text is, and the text."""
        if () not in self.paths:
            return [(name, reduce(getitem, at, self.record)) for at, name in self.paths.items()]
        if self.record is None:
            return [("", self.line.rstrip("\n"))]
        return [("", json.dumps(self.record, ensure_ascii=False, indent=2))]

    def with_texts(self, texts: Sequence[str]) -> str:
        """The row with these texts as a line. Raises UserError if it is no JSON object."""
        record = deepcopy(self.record)
        for path, text in zip(self.paths, texts, strict=True):
            if path:
                reduce(getitem, path[:-1], record)[path[-1]] = text
            else:
                record = _parsed(text)
        return json.dumps(record, ensure_ascii=False)

    def is_changed(self, texts: Sequence[str]) -> bool:
        """Whether the row would be another than it was."""
        try:
            return bool(_loaded(self.with_texts(texts)) != _loaded(self.first))
        except UserError:
            return [*texts] != [text for _, text in self.fields]


def _text_paths(record: Any) -> dict[Path, str]:
    paths: dict[Path, str] = {}
    for key, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, str):
            paths[key,] = key
        for number, turn in enumerate(value if isinstance(value, list) else ()):
            for name in CONTENTS if isinstance(turn, dict) else ():
                if isinstance(turn.get(name), str):
                    paths[key, number, name] = str(turn.get("role") or turn.get("from") or key)
    return paths


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parsed(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}. Correct it.") from None
    if not isinstance(record, dict):
        raise UserError('must be a JSON object, such as {"text": …}.')
    return record
