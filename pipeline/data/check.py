"""Data files checked in one pass: what would break or spoil a training, and how long examples are.

A row with an error is reported, and the pass goes on with the next one. In memory are 37 bytes per
example, no texts.
"""

import json
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
from pipeline.data.containers.rows import row_of_error
from pipeline.data.examples import (
    Example,
    content_digest,
    is_held_out,
    joins_words,
    row_digest,
)
from pipeline.data.formats import EmptyValue, iter_examples, notes
from pipeline.data.masking import Encoded, Encoder
from pipeline.data.preferences import Rejected, with_rejected
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
    """What is in data files. Lengths are in tokens, before a cut.

    Without a tokenizer, everything about tokens is None.
    """

    files: tuple[str, ...]
    formats: dict[str, int]  # name → rows
    rows: int  # of all files
    examples: int  # of the training set, as are turns, tokens and lengths
    evaluation: int  # examples held out of it, or in evaluation files
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
    problems: tuple[Problem, ...]  # the first of each kind
    groups: tuple[Group, ...]  # all of them, alike ones together
    templated: int  # plain prompts and completions that the chat template writes as turns
    rendered: str | None  # the first example as the model reads it, what is trained on in ⟦ ⟧

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
    """The report of data files in `root`. Never raises for what is in them.

    `columns`, as for `iter_examples`, count for files that have none of their own, `templated` for
    all. `max_length` above 0 truncates. Longer than the model's `positions` is an error, so pass
    them as `max_length` where examples are to be cut. `progress` gets the number of rows read so
    far.
    """
    checked = _Check(tokenizer, max_length, positions, progress, templated)
    for several, share in ((files, eval_share), (eval_files, 1.0)):
        for file in several:
            path, own_columns = file if isinstance(file, tuple) else (file, {})
            checked.read(root, str(path), own_columns or columns, share)
    return checked.report(eval_share)


@dataclass
class _Check:
    """The state of the pass: a few numbers per example."""

    tokenizer: Tokenizer | None
    max_length: int
    positions: int | None
    progress: Callable[[int], None] | None
    templated: bool

    def __post_init__(self) -> None:
        self._has_template = self.tokenizer is not None and self.tokenizer.has_template
        self._names: list[str] = []
        # of contents and of rows, 16 bytes per example
        self._contents, self._whole = bytearray(), bytearray()
        self._files, self._rows = array("i"), array("q")
        self._held_out = bytearray()
        self._lengths = array("q")  # of the training set
        self._longest = (0, "", "")  # its length, its location, the command that leaves it out
        # the command that writes the file read now without rows that are too long
        self._leave_out = ""
        self._formats: Counter[str] = Counter()
        self._extra_keys: Counter[str] = Counter()
        self._problems = Problems()
        # rows, blank lines, turns, tokens, labels, truncated, templated
        self._counts: Counter[str] = Counter()
        self._encoded = 0  # examples
        self._chosen_refused = False  # of the last pair
        self._rendered = ""

    def read(
        self, root: Path, name: str, columns: Mapping[str, str] | None, held_out: float
    ) -> None:
        """Read a file; the share `held_out` of its examples is for the evaluation."""
        self._names.append(name)
        self._leave_out = f"`{clean_command(name, columns or {})} --drop too-long`"
        self._encoded = len(self._rows)
        reading = Reading(self._refuse)
        read = iter_examples(
            root / name, name, columns=columns, reading=reading, templated=self.templated
        )
        examples = self._add_each(read, reading, held_out)
        try:
            if self.tokenizer is None:
                deque(examples, maxlen=0)
            else:
                encoder = Encoder(self.tokenizer)
                for example, encoded in encoder.each(with_rejected(examples), self._refuse_example):
                    self._add_tokens(example, encoded)
        except UserError as error:  # about the file, or what it holds from here on
            row = row_of_error(error, name)
            text = without_location(error, name, row)
            if self._rows and self._files[-1] == len(self._names) - 1:
                text += " Nothing behind it was read."
            self._add_problem("unreadable", "error", row, text)
        self._counts["blank"] += reading.blank
        self._extra_keys.update(reading.unused)
        for note in notes(name, reading):
            self._add_warning("notes", None, note.removeprefix(f"{name}: "))

    def _refuse(self, row: int, error: UserError) -> None:
        self._count_row()
        kind = "empty" if isinstance(error, EmptyValue) else "unreadable"
        self._add_problem(kind, "error", row, without_location(error, self._names[-1], row))

    def _add_problem(self, kind: str, level: Level, row: int | None, text: str) -> None:
        problem = Problem(row, self._names[-1], shortened(text), level)
        self._problems.add(kind, level, len(self._names) - 1, problem)

    def _add_warning(self, kind: str, row: int | None, text: str) -> None:
        self._add_problem(kind, "warning", row, text)

    def _count_row(self) -> None:
        self._counts["rows"] += 1
        rows = self._counts["rows"]
        if self.progress and rows % PROGRESS_ROWS == 0:
            self.progress(rows)

    def _add_each(
        self, examples: Iterable[Example], reading: Reading, share: float
    ) -> Iterator[Example]:
        """The examples, each counted as it is read."""
        for example in examples:
            self._count_row()
            digest = content_digest(example)
            held_out = is_held_out(digest, share)
            self._contents += digest[:16]
            self._whole += row_digest(example)[:16]
            self._files.append(len(self._names) - 1)
            self._rows.append(example.line)
            self._held_out.append(held_out)
            self._formats[reading.format] += 1
            self._counts["turns"] += 0 if held_out else len(example.messages)
            self._counts["templated"] += example.templated and self._has_template
            for kind, level, text in _problems_of(example):
                self._add_problem(kind, level, example.line, text)
            if self._joins_words(example):
                self._add_warning("joined words", example.line, _joined(example))
            yield example

    def _joins_words(self, example: Example) -> bool:
        # without a model, a template may still part them
        if example.templated and (self._has_template or self.tokenizer is None):
            return False
        return example.prompt is not None and joins_words(example.prompt, example.completion)

    def _refuse_example(self, example: Example, error: UserError) -> None:
        if isinstance(example, Rejected):
            if self._chosen_refused:  # the row is counted already
                return
        else:
            self._encoded += 1
            self._chosen_refused = True
        text = without_location(error, example.file, example.line)
        self._add_problem("not tokenized", "error", example.line, text)

    def _add_tokens(self, example: Example, encoded: Encoded) -> None:
        length, row = len(encoded.ids), example.line
        kept = min(length, self.max_length or length)
        if isinstance(example, Rejected):
            # the length of a pair is that of its longer answer; its labels are the chosen one's
            if not self._chosen_refused and not self._held_out[self._encoded - 1]:
                # once for a pair: not if its chosen answer is cut too
                self._counts["truncated"] += self._lengths[-1] <= kept < length
                self._lengths[-1] = max(self._lengths[-1], length)
                self._keep_longest(example, length)
            if kept < length:
                text = f"rejected answer: truncated from {length:,} to {kept:,} tokens."
                self._add_warning("truncated", row, text)
            if self._exceeds_positions(kept):
                text = f"rejected answer: {self._too_long(kept)}"
                self._add_warning("rejected too long", row, text)
            return
        held_out = self._held_out[self._encoded]
        self._encoded += 1
        self._chosen_refused = False
        labels = sum(encoded.trained[1:kept])
        if not held_out:
            self._lengths.append(length)
            self._counts["tokens"] += kept
            self._counts["labels"] += labels
            self._counts["truncated"] += kept < length
            self._keep_longest(example, length)
            if labels and not self._rendered and self.tokenizer:
                self._rendered = rendered(example, self.tokenizer, self.max_length)
        if self._exceeds_positions(kept):
            self._add_problem("too long", "error", row, self._too_long(kept))
        self._check_labels(example, encoded, kept, labels)

    def _exceeds_positions(self, length: int) -> bool:
        return self.positions is not None and length > self.positions

    def _too_long(self, length: int) -> str:
        return (
            f"{length:,} tokens with the end token, more than the model's {self.positions:,} "
            f"positions. Leave it out with {self._leave_out}, or cut it with max_length."
        )

    def _keep_longest(self, example: Example, length: int) -> None:
        if length > self._longest[0]:
            self._longest = length, example.location, self._leave_out

    def _check_labels(self, example: Example, encoded: Encoded, kept: int, labels: int) -> None:
        row, length = example.line, len(encoded.ids)
        lost = sum(encoded.trained[max(1, kept) :])
        if labels and kept < length:
            what = f"{lost:,} of {labels + lost:,} labels are lost" if lost else "no label is lost"
            self._add_warning(
                "truncated", row, f"truncated from {length:,} to {kept:,} tokens; {what}."
            )
        if labels:
            return
        if example.desirable is False:
            text = "labelled false: only finetune_dpo with the loss kto trains on it."
            self._add_warning("labelled false", row, text)
        elif lost:
            # a warning, as max_length is meant to spare the few that are much longer than others
            text = (
                f"left out of training: all labels are behind the cut at {kept:,} of {length:,} "
                "tokens."
            )
            self._add_warning("nothing to train on", row, text)
        else:
            text = "nothing to train on: no token has a label."
            self._add_problem("nothing to train on", "error", row, text)

    def report(self, eval_share: float) -> DataReport:
        """Called once, after the last file."""
        duplicates, overlap = self._find_repeated()
        held_out = sum(self._held_out)
        examples = len(self._rows) - held_out
        if eval_share and not (examples and held_out):
            change = "Decrease" if held_out else "Increase"
            text = (
                f"eval_share {eval_share:g} selects {held_out:,} of {examples + held_out:,} "
                f"examples (the split is by hash). {change} it, or set it to 0."
            )
            self._of_all("evaluation", "error", text)
        lengths = np.sort(np.frombuffer(self._lengths, np.int64))
        quantiles = suggested = None
        if len(lengths):
            quantiles = {
                key: int(lengths[ceil(share * len(lengths)) - 1])
                for key, share in QUANTILES.items()
            }
            p99, longest = quantiles["p99"], quantiles["max"]
            suggested = suggest_max_length(p99, longest, self.positions)
            if longest > OUTLIER * p99:
                _, location, leave_out = self._longest
                text = (
                    f"the longest example, {location}, has {longest:,} tokens, 99 % have at most "
                    f"{p99:,}. Memory is needed for the longest: set max_length, or leave it out "
                    f"with {leave_out}."
                )
                self._of_all("outlier", "warning", text)
            if self.max_length and not self._counts["labels"]:
                text = f"no example has a label within max_length {self.max_length:,}. Raise it."
                self._of_all("nothing to train on", "error", text)
        counts = self._counts
        known = self.tokenizer is not None
        return DataReport(
            files=tuple(self._names),
            formats=dict(self._formats),
            rows=counts["rows"],
            examples=examples,
            evaluation=held_out,
            turns=counts["turns"],
            tokens=counts["tokens"] if known else None,
            trained_tokens=counts["labels"] if known else None,
            shortest=int(lengths[0]) if len(lengths) else None,
            quantiles=quantiles,
            lengths=_histogram(lengths),
            truncated=counts["truncated"] if known else None,
            duplicates=duplicates,
            overlap=overlap,
            blank_lines=counts["blank"],
            extra_keys=dict(self._extra_keys.most_common()),
            suggested_max_length=suggested,
            errors=self._problems.levels["error"],
            warnings=self._problems.levels["warning"],
            counts=dict(self._problems.counts),
            problems=self._problems.in_order(),
            groups=self._problems.groups(),
            templated=counts["templated"],
            rendered=self._rendered or None,
        )

    def _of_all(self, kind: str, level: Level, text: str) -> None:
        self._problems.add(kind, level, -1, Problem(None, ", ".join(self._names), text, level))

    def _find_repeated(self) -> tuple[int, int]:
        """(examples that repeat an earlier one of their set, evaluated ones trained on)."""
        held_out = np.frombuffer(self._held_out, bool)
        asked, same = _earliest(self._contents), _earliest(self._whole)
        leaked = held_out & ~held_out[asked]
        repeated = (same != np.arange(len(same))) & ~leaked
        for kind, text, examples, first in (
            ("overlap", "also in the training set:", leaked, asked),
            ("duplicate", "the same as", repeated, same),
        ):
            for number in np.flatnonzero(examples):
                file, earlier = self._files[number], first[number]
                other_file, other_row = self._files[earlier], self._rows[earlier]
                where = f"{self._names[other_file]}:{other_row}"
                if other_file == file:
                    where = f"row {other_row}"
                row = self._rows[number]
                problem = Problem(row, self._names[file], f"{text} {where}.", "warning")
                self._problems.add(kind, "warning", file, problem)
        return int(repeated.sum()), int(leaked.sum())


def _earliest(digests: bytearray) -> npt.NDArray[np.int64]:
    """For each example the number of the first one with the same digest."""
    _, earliest, groups = np.unique(
        np.frombuffer(digests, "S16"), return_index=True, return_inverse=True
    )
    return earliest[groups]


def _histogram(lengths: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Exact up to 2 × FINE; above, in FINE bins for each doubling."""
    shifts = np.maximum(0, np.frexp(lengths)[1] - FINE.bit_length())
    bins, counts = np.unique(lengths >> shifts << shifts, return_counts=True)
    return tuple(zip(bins.tolist(), counts.tolist(), strict=True))


def suggest_max_length(p99: int, longest: int, positions: int | None = None) -> int:
    """The 99 % quantile, or the longest example if it is near.

    As a multiple of 64, and at most the model's positions.
    """
    length = -(-(longest if longest <= NEAR * p99 else p99) // STEP) * STEP
    return min(length, positions or length)


def rendered(example: Example, tokenizer: Tokenizer, max_length: int = 0) -> str:
    """An example as the model reads it, what is trained on in ⟦ ⟧, up to the cut."""
    pieces = []
    for turn in view(replace(example, rejected=None), tokenizer, max_length).turns:
        for kind, text in turn.parts:
            if kind == "trained":
                pieces.append(f"⟦{text}⟧")
            elif kind != "cut":
                pieces.append(text)
    return "".join(pieces)


def _joined(example: Example) -> str:
    first, second = (example.prompt or "").split()[-1], example.completion.split()[0]
    words = f"{first!r:.60} and {second!r:.60}"
    return f"{words} are read as one word. Begin the completion with a space."


def _problems_of(example: Example) -> Iterator[tuple[str, Level, str]]:
    """(kind, level, text) of what is accepted in an example, but should not be in it."""
    if REPLACED in example.text:
        text = f"{REPLACED} stands for bytes that were no text. Was it UTF-8?"
        yield "broken characters", "warning", text
    tools = [tool["function"]["name"] for tool in example.tools]
    for number, message in enumerate(example.messages, 1):
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            called = f"{function['name']!r:.60}"
            if not _is_object(function.get("arguments", {})):
                text = f"turn {number}: the arguments of {called} are no JSON object. Correct them."
                yield "tool call", "error", text
            elif tools and function["name"] not in tools:
                text = f"turn {number}: a call of {called}, which is not in tools."
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
    """The first turn that is out of order, which most templates write all the same."""
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
    if before in ("", "assistant"):
        return None
    return f"ends with a {before} turn, which is not trained on."
