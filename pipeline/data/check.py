"""Data files checked in one pass: what would break or spoil a training, and how long the examples
are.

A row with an error is reported, and the pass goes on with the next one. In memory are 37 bytes per
example, no texts.
"""

import json
import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.columns import clean_command
from pipeline.data.containers import Reading
from pipeline.data.examples import Example, content_digest, is_held_out, joins_words
from pipeline.data.formats import EmptyValue, iter_examples, notes
from pipeline.data.masking import Encoded, Encoder
from pipeline.data.preferences import pair
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.data.turns import view
from pipeline.errors import UserError
from pipeline.files.problems import Group, Level, Problem, Problems, shortened, without_location

DataFile = Path | str | tuple[Path | str, Mapping[str, str]]  # with its own columns
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
STEP = 64  # max_length is a multiple of it: kernels are fastest on such lengths
NEAR = 1.25  # × the 99 % quantile: a longest example up to there costs little more than cutting it
OUTLIER = 4  # × the 99 % quantile
FINE = 64  # bins of the histogram for each doubling of the length: 2 % apart
PROGRESS_ROWS = 256
REPLACED = "\ufffd"


@dataclass(frozen=True)
class DataReport:
    """What is in data files. Lengths are in tokens, before a cut; without a tokenizer, all of
    tokens is None.

    `examples`, `turns`, `tokens` and lengths are of the training set, `evaluation` counts the
    examples held out of it or in evaluation files. `rows` are those of all files. `problems` holds
    the first of each kind, `counts` how many there are, `groups` all of them, alike ones together.
    `rendered`: the first example as the model reads it, what is trained on in ⟦ ⟧. `templated`:
    plain prompts and completions that the chat template writes as turns.
    """

    files: tuple[str, ...]
    formats: dict[str, int]  # name → rows
    rows: int
    examples: int
    evaluation: int
    turns: int  # of conversations
    tokens: int | None  # after the cut at max_length
    trained_tokens: int | None
    shortest: int | None
    quantiles: dict[str, int] | None
    # (length, examples of at least this and less than the next), a histogram
    lengths: tuple[tuple[int, int], ...]
    truncated: int | None
    duplicates: int  # examples that repeat an earlier one
    overlap: int  # examples in the training set and in the evaluation set
    blank_lines: int
    extra_keys: dict[str, int]  # key → rows
    suggested_max_length: int | None
    errors: int
    warnings: int
    counts: dict[str, int]  # kind of problem → rows
    problems: tuple[Problem, ...]
    groups: tuple[Group, ...]
    templated: int
    rendered: str | None

    @property
    def ok(self) -> bool:
        """Whether training on these files would be right."""
        return not self.errors

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check(
    files: Sequence[DataFile],
    tokenizer: Tokenizer | None = None,
    *,
    eval_files: Sequence[DataFile] = (),
    eval_share: float = 0.0,
    columns: Mapping[str, str] | None = None,
    max_length: int = 0,
    positions: int | None = None,
    root: Path = Path(),
    progress: Callable[[int], None] | None = None,
    templated: bool = False,
) -> DataReport:
    """The report of data files in `root`, which never raises for what is in them.

    `columns`, as for `iter_examples`, count for files that have none of their own, `templated` for
    all. `max_length` above 0 truncates. Longer than the model's `positions` is an error, so pass
    them as `max_length` where examples are to be cut. `progress` gets the number of rows read so
    far.
    """
    checked = _Check(tokenizer, max_length, positions, progress, templated)
    for several, share in ((files, eval_share), (eval_files, 1.0)):
        for file in several:
            path, own = file if isinstance(file, tuple) else (file, {})
            checked.read(root, str(path), own or columns, share)
    return checked.report(eval_share)


class _Check:
    """The state of the pass: a few numbers per example."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        max_length: int,
        positions: int | None,
        progress: Callable[[int], None] | None,
        templated: bool,
    ) -> None:
        self._tokenizer, self._max_length, self._positions, self._progress = (
            tokenizer,
            max_length,
            positions,
            progress,
        )
        self._templated, self._has_template = (
            templated,
            tokenizer is not None and tokenizer.has_template,
        )
        self._names: list[str] = []
        self._digests = bytearray()  # 16 bytes per example
        self._files, self._rows = array("i"), array("q")
        self._held_out = bytearray()
        self._lengths = array("q")  # of the training set
        self._longest = (0, "", "")  # with its location, and what leaves it out
        # the command that writes the file read now without rows that are too long
        self._leave_out = ""
        self._formats: Counter[str] = Counter()
        self._extra_keys: Counter[str] = Counter()
        self._problems = Problems()
        self._seen = self._encoded = self._blank = self._turns = self._tokens = self._labels = (
            self._truncated
        ) = 0
        self._as_turns, self._rendered = 0, ""

    def read(
        self, root: Path, name: str, columns: Mapping[str, str] | None, held_out: float
    ) -> None:
        """Read a file; the share `held_out` of its examples is for the evaluation."""
        self._names.append(name)
        self._leave_out = f"`{clean_command(name, columns or {})} --drop too-long`"
        self._encoded = len(self._rows)
        reading = Reading(self._refuse)
        read = iter_examples(
            root / name, name, columns=columns, reading=reading, templated=self._templated
        )
        examples = self._add_each(read, reading, held_out)
        try:
            if self._tokenizer is None:
                deque(examples, maxlen=0)
            else:
                for example, encoded in Encoder(self._tokenizer).each(
                    _with_rejected(examples), self._refuse_example
                ):
                    if isinstance(example, _Rejected):
                        self._add_rejected(encoded)
                    else:
                        self._add_tokens(example, encoded)
        except UserError as error:  # about the file, or what it holds from here on
            match = re.match(rf"{re.escape(name)}:(?: row )?(\d+):", str(error))
            row = int(match[1]) if match else None
            text = without_location(error, name, row)
            rest = (
                " Nothing behind it was read."
                if self._rows and self._files[-1] == len(self._names) - 1
                else ""
            )
            self._add_problem("unreadable", "error", row, text + rest)
        self._blank += reading.blank
        self._extra_keys.update(reading.unused)
        for note in notes(name, reading):
            self._warn("notes", None, note.removeprefix(f"{name}: "))

    def _refuse(self, row: int, error: UserError) -> None:
        self._count_row()
        kind = "empty" if isinstance(error, EmptyValue) else "unreadable"
        self._add_problem(kind, "error", row, without_location(error, self._names[-1], row))

    def _add_problem(self, kind: str, level: Level, row: int | None, text: str) -> None:
        problem = Problem(row, self._names[-1], shortened(text), level)
        self._problems.add(kind, level, len(self._names) - 1, problem)

    def _warn(self, kind: str, row: int | None, text: str) -> None:
        self._add_problem(kind, "warning", row, text)

    def _count_row(self) -> None:
        self._seen += 1
        if self._progress and self._seen % PROGRESS_ROWS == 0:
            self._progress(self._seen)

    def _add_each(
        self, examples: Iterable[Example], reading: Reading, share: float
    ) -> Iterator[Example]:
        """The examples, each counted as it is read."""
        for example in examples:
            self._count_row()
            digest = content_digest(example)
            held_out = is_held_out(digest, share)
            self._digests += digest[:16]
            self._files.append(len(self._names) - 1)
            self._rows.append(example.line)
            self._held_out.append(held_out)
            self._formats[reading.format] += 1
            self._turns += 0 if held_out else len(example.messages)
            self._as_turns += example.templated and self._has_template
            for kind, level, text in _problems_of(example):
                self._add_problem(kind, level, example.line, text)
            if self._joins_words(example):
                self._warn("joined words", example.line, _joined(example))
            yield example

    def _joins_words(self, example: Example) -> bool:
        # without a model nobody knows
        if example.templated and (self._has_template or self._tokenizer is None):
            return False
        return example.prompt is not None and joins_words(example.prompt, example.completion)

    def _refuse_example(self, example: Example, error: UserError) -> None:
        self._encoded += not isinstance(example, _Rejected)
        text = without_location(error, example.file, example.line)
        self._add_problem("not tokenized", "error", example.line, text)

    def _add_tokens(self, example: Example, encoded: Encoded) -> None:
        held_out = self._held_out[self._encoded]
        self._encoded += 1
        length, row = len(encoded.ids), example.line
        kept = min(length, self._max_length or length)
        labels = sum(encoded.trained[1:kept])
        if not held_out:
            self._lengths.append(length)
            self._tokens += kept
            self._labels += labels
            self._truncated += kept < length
            longest = length, example.location, self._leave_out
            self._longest = max(self._longest, longest, key=lambda each: each[0])
            if labels and not self._rendered and self._tokenizer:
                self._rendered = rendered(example, self._tokenizer, self._max_length)
        if self._positions is not None and kept > self._positions:
            text = (
                f"{kept:,} tokens with the end token, more than the model's {self._positions:,} "
                "positions. Leave it "
                f"out with {self._leave_out}, or cut it with max_length."
            )
            self._add_problem("too long", "error", row, text)
        if not labels:
            if example.desirable is False:
                self._warn(
                    "labelled false",
                    row,
                    "labelled false: only finetune_dpo with the loss kto trains on it.",
                )
            # max_length is meant to spare the few that are much longer than the others
            elif any(encoded.trained[1:]):
                text = (
                    f"left out of training: all labels are behind the cut at {kept:,} of "
                    f"{length:,} tokens."
                )
                self._warn("nothing to train on", row, text)
            else:
                self._add_problem(
                    "nothing to train on",
                    "error",
                    row,
                    "nothing to train on: no token has a label.",
                )
        elif kept < length:
            lost = sum(encoded.trained[kept:])
            labels_lost = (
                f"{lost:,} of {labels + lost:,} labels are lost" if lost else "no label is lost"
            )
            self._warn(
                "truncated", row, f"truncated from {length:,} to {kept:,} tokens; {labels_lost}."
            )

    def _add_rejected(self, encoded: Encoded) -> None:
        """The length of a pair is that of its longer answer. What the worse one would train is not
        counted.
        """
        if self._lengths and not self._held_out[self._encoded - 1]:
            self._lengths[-1] = max(self._lengths[-1], len(encoded.ids))

    def report(self, eval_share: float) -> DataReport:
        """Called once, after the last file."""
        duplicates, overlap = self._find_repeated()
        held_out = sum(self._held_out)
        examples = len(self._rows) - held_out
        if eval_share and not (examples and held_out):
            selected = (
                f"eval_share {eval_share:g} selects {held_out:,} of {examples + held_out:,} "
                "examples"
            )
            change = "Decrease" if held_out else "Increase"
            self._of_all(
                "evaluation",
                "error",
                f"{selected} (the split is by hash). {change} it, or set it to 0.",
            )
        lengths = np.sort(np.frombuffer(self._lengths, np.int64))
        quantiles = suggested = None
        if len(lengths):
            quantiles = {
                key: int(lengths[ceil(share * len(lengths)) - 1])
                for key, share in QUANTILES.items()
            }
            suggested = suggest_max_length(quantiles["p99"], quantiles["max"], self._positions)
            if quantiles["max"] > OUTLIER * quantiles["p99"]:
                self._of_all(
                    "outlier",
                    "warning",
                    f"the longest example, {self._longest[1]}, has {quantiles['max']:,} tokens, "
                    "99 % have at most "
                    f"{quantiles['p99']:,}. Memory is needed for the longest: set max_length, or "
                    "leave it out with "
                    f"{self._longest[2]}.",
                )
        known = self._tokenizer is not None
        if len(lengths) and self._max_length and not self._labels:
            text = f"no example has a label within max_length {self._max_length:,}. Raise it."
            self._of_all("nothing to train on", "error", text)
        return DataReport(
            files=tuple(self._names),
            formats=dict(self._formats),
            rows=self._seen,
            examples=examples,
            evaluation=held_out,
            turns=self._turns,
            tokens=self._tokens if known else None,
            trained_tokens=self._labels if known else None,
            shortest=int(lengths[0]) if len(lengths) else None,
            quantiles=quantiles,
            lengths=_histogram(lengths),
            truncated=self._truncated if known else None,
            duplicates=duplicates,
            overlap=overlap,
            blank_lines=self._blank,
            extra_keys=dict(self._extra_keys.most_common()),
            suggested_max_length=suggested,
            errors=self._problems.levels["error"],
            warnings=self._problems.levels["warning"],
            counts=dict(self._problems.counts),
            problems=self._problems.in_order(),
            groups=self._problems.groups(),
            templated=self._as_turns,
            rendered=self._rendered or None,
        )

    def _of_all(self, kind: str, level: Level, text: str) -> None:
        self._problems.add(kind, level, -1, Problem(None, ", ".join(self._names), text, level))

    def _find_repeated(self) -> tuple[int, int]:
        """(examples that repeat an earlier one of their set, examples of the evaluation that are
        trained on).
        """
        halves = np.frombuffer(self._digests, "<u8").reshape(-1, 2)
        # stable: the earliest example of each content comes first
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        in_order = halves[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
        first = np.empty(len(order), np.int64)
        first[order] = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        held_out = np.frombuffer(self._held_out, bool)
        repeated = np.flatnonzero(first != np.arange(len(order)))
        leaked = held_out[repeated] & ~held_out[first[repeated]]
        for kind, text, numbers in (
            ("overlap", "also in the training set:", repeated[leaked]),
            ("duplicate", "the same as", repeated[~leaked]),
        ):
            for number in numbers:
                file, row, earlier = self._files[number], self._rows[number], int(first[number])
                same = self._files[earlier]
                where = (
                    f"row {self._rows[earlier]}"
                    if same == file
                    else f"{self._names[same]}:{self._rows[earlier]}"
                )
                problem = Problem(row, self._names[file], f"{text} {where}.", "warning")
                self._problems.add(kind, "warning", file, problem)
        return int((~leaked).sum()), int(leaked.sum())


def _histogram(lengths: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Exact up to 2 × FINE; above, in FINE bins for each doubling."""
    shifts = np.maximum(0, np.frexp(lengths)[1] - FINE.bit_length())
    bins, counts = np.unique(lengths >> shifts << shifts, return_counts=True)
    return tuple(zip(bins.tolist(), counts.tolist(), strict=True))


def suggest_max_length(p99: int, longest: int, positions: int | None = None) -> int:
    """The 99 % quantile, or the longest example if it is near, as a multiple of 64 that the model
    has positions for.
    """
    length = -(-(longest if longest <= NEAR * p99 else p99) // STEP) * STEP
    return min(length, positions or length)


class _Rejected(Example):
    """The worse answer of the pair that comes before it."""


def _with_rejected(examples: Iterable[Example]) -> Iterator[Example]:
    for example in examples:
        yield example
        if example.rejected is not None:
            yield _Rejected(**vars(pair(example)[1]))


def rendered(example: Example, tokenizer: Tokenizer, max_length: int = 0) -> str:
    """An example as the model reads it, what is trained on in ⟦ ⟧, up to the cut."""
    parts = [
        part
        for turn in view(replace(example, rejected=None), tokenizer, max_length).turns
        for part in turn.parts
    ]
    pieces = (f"⟦{text}⟧" if kind == "trained" else text for kind, text in parts if kind != "cut")
    return "".join(pieces)


def _joined(example: Example) -> str:
    first, second = (example.prompt or "").split()[-1], example.completion.split()[0]
    return (
        f"{first!r:.60} and {second!r:.60} are read as one word. Begin the completion with a space."
    )


def _problems_of(example: Example) -> Iterator[tuple[str, Level, str]]:
    """What the reading and most chat templates accept in an example, but should not be in it:
    (kind, level, text).
    """
    if REPLACED in example.text:
        yield (
            "broken characters",
            "warning",
            f"{REPLACED} stands for bytes that were no text. Was it UTF-8?",
        )
    for number, message in enumerate(example.messages):
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            if not _is_object(function.get("arguments", {})):
                text = (
                    f"turn {number + 1}: the arguments of {function['name']!r:.60} are no JSON "
                    "object. Correct them."
                )
                yield "tool call", "error", text
            elif example.tools and function["name"] not in (
                tool["function"]["name"] for tool in example.tools
            ):
                text = (
                    f"turn {number + 1}: a call of {function['name']!r:.60}, which is not in tools."
                )
                yield "tool call", "warning", text
    if order := _wrong_order(example):
        yield "order of turns", "warning", order


def _is_object(arguments: Any) -> bool:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)


def _wrong_order(example: Example) -> str | None:
    """The first turn that is out of order. A warning, as a template that cannot write it refuses
    the row itself.
    """
    calls = False  # whether a tool may answer
    before = ""
    for number, message in enumerate(example.messages, 1):
        role = message["role"]
        if role in ("system", "developer") and before not in ("", "system", "developer"):
            return f"turn {number}: a {role} turn that is not the first."
        if role == before and role in ("user", "assistant"):
            return f"turn {number}: two {role} turns in a row."
        if role == "tool" and not calls:
            return f"turn {number}: a tool turn without a tool call before it."
        calls = role == "tool" or bool(message.get("tool_calls"))
        before = role
    return (
        f"ends with a {before} turn, which is not trained on."
        if before not in ("", "assistant")
        else None
    )
