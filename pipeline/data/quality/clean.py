"""A data file without the rows that spoil a training: a report of what was dropped, and why."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline.data.containers import Reading
from pipeline.data.convert import Conversion, convert
from pipeline.data.examples import Example, row_digest
from pipeline.data.formats import EmptyValue, iter_examples
from pipeline.data.masking import Encoder
from pipeline.data.preferences import with_rejected
from pipeline.data.quality.near_duplicates import MinHashes, ShingleCounts, shingles, words
from pipeline.data.quality.personal import personal_data
from pipeline.errors import UserError
from pipeline.files.problems import shortened, without_location

REASONS = ("empty", "duplicates", "near-duplicates", "too-long", "leaks", "personal")
SHOWN = 3  # rows of each reason in the report
LONGEST = 200  # characters of a row there
PROGRESS_ROWS = 256


@dataclass(frozen=True)
class Dropped:
    """A row that is left out: its number, why, and its text as far as it is shown."""

    row: int
    why: str
    text: str


@dataclass(frozen=True)
class Cleaned:
    """What was dropped from a file, and what is written."""

    rows: int  # of the file
    kept: int  # rows written
    dropped: dict[str, int]  # reason → rows
    examples: dict[str, list[Dropped]]  # the first of each reason
    personal: dict[str, int]  # kind of likely personal data → rows with some, of those written
    personal_rows: dict[str, list[int]]  # the first of each kind
    conversion: Conversion  # its `skipped`: rows that no reason drops and that cannot be written

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def clean(
    source: Path,
    out: Path,
    drop: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    leaks: "Leaks | None" = None,
    encoder: Encoder | None = None,
    max_length: int = 0,
    templated: bool = True,
    force: bool = False,
    skip_invalid: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Cleaned:
    """Write the rows of `source` that no reason of `drop` leaves out to `out`, as `convert` does.

    `leaks`: what must not be trained on. `encoder` and `max_length`: how tokens are counted, and
    how many a row may have. Of rows that are alike, the first stays. Raises UserError.
    """
    cleaning = _Cleaning(
        source, drop, columns, leaks, encoder, max_length, templated, skip_invalid, progress
    )
    cleaning.read()
    if not cleaning.kept:
        counts = ", ".join(
            f"{reason}: {rows:,}" for reason, rows in cleaning.dropped.items() if rows
        )
        raise UserError(f"{source}: no row is left ({counts}). Drop for fewer reasons with --drop.")
    keep = cleaning.kept.__contains__
    done = convert(
        source,
        out,
        columns=columns,
        force=force,
        skip_invalid=skip_invalid,
        keep=keep,
        progress=progress,
    )
    return Cleaned(
        cleaning.rows,
        done.rows,
        dict(cleaning.dropped),
        cleaning.examples,
        dict(cleaning.personal),
        cleaning.personal_rows,
        done,
    )


class Leaks:
    """What an evaluation asks: its examples, and the prompts of its tasks, by their words."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], str] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, text: str, location: str) -> None:
        if key := tuple(words(text)):
            self._known.setdefault(key, location)

    def add_file(self, path: Path, name: str, columns: Mapping[str, str] | None) -> None:
        """The questions of a file's examples; of plain texts the texts. Raises UserError."""
        for example in iter_examples(path, name, prompts=True, columns=columns):
            self.add(_question(example), example.location)

    def location(self, example: Example) -> str | None:
        """Where the evaluation asks what the example teaches, its last question or all of it."""
        texts = (_question(example), example.text)
        places = (self._known.get(tuple(words(text))) for text in texts)
        return next(filter(None, places), None)


def _question(example: Example) -> str:
    """The last turn of a user, or the prompt; of a text all of it."""
    asked = [message["content"] or "" for message in example.messages if message["role"] == "user"]
    if asked:
        return asked[-1]
    return example.text if example.prompt is None else example.prompt


@dataclass
class _Cleaning:
    """Which rows are kept, by their numbers, and why the others are not."""

    source: Path
    drop: Sequence[str]
    columns: Mapping[str, str] | None
    leaks: Leaks | None
    encoder: Encoder | None
    max_length: int
    templated: bool
    skip_invalid: bool
    progress: Callable[[int], None] | None
    kept: set[int] = field(default_factory=set)
    rows: int = 0

    def __post_init__(self) -> None:
        self.dropped: Counter[str] = Counter(dict.fromkeys(self.drop, 0))
        self.examples: dict[str, list[Dropped]] = {}
        self.personal: Counter[str] = Counter()
        self.personal_rows: dict[str, list[int]] = {}

    def read(self) -> None:
        near = "near-duplicates" in self.drop
        counts, seen = ShingleCounts(), dict[bytes, int]()
        for example in self._encoded(self._examples()):
            if reason := self._reason(example, seen):
                self._leave_out(example, *reason)
                continue
            self.kept.add(example.line)
            if near:
                counts.add(shingles(example.text))
        if near:
            self._drop_near(counts)
        for example in self._again():
            for kind in set(personal_data(example.text)):
                self.personal[kind] += 1
                _append(self.personal_rows.setdefault(kind, []), example.line)

    def _examples(self) -> Iterator[Example]:
        for example in self._iter_examples(Reading(self._refuse)):
            self._count_row()
            yield example

    def _again(self) -> Iterator[Example]:
        """The examples that are still kept."""
        examples = self._iter_examples(Reading(lambda *_: None))
        return (example for example in examples if example.line in self.kept)

    def _iter_examples(self, reading: Reading) -> Iterator[Example]:
        return iter_examples(
            self.source,
            str(self.source),
            columns=self.columns,
            reading=reading,
            templated=self.templated,
        )

    def _count_row(self) -> None:
        self.rows += 1
        if self.progress and self.rows % PROGRESS_ROWS == 0:
            self.progress(self.rows)

    def _refuse(self, row: int, error: UserError) -> None:
        is_empty = "empty" in self.drop and isinstance(error, EmptyValue)
        if not is_empty and not self.skip_invalid:
            raise error
        self._count_row()
        why = without_location(error, str(self.source), row)
        self._note("empty" if is_empty else "invalid", Dropped(row, shortened(why), ""))

    def _encoded(self, examples: Iterator[Example]) -> Iterator[Example]:
        """The examples, without rows of which an answer is too long."""
        if "too-long" not in self.drop or self.encoder is None:
            yield from examples
            return

        refused = set[int]()  # rows

        def refuse(answer: Example, error: UserError) -> None:
            if not self.skip_invalid:
                raise error
            if answer.line not in refused:
                refused.add(answer.line)
                why = without_location(error, answer.file, answer.line)
                self._leave_out(answer, "invalid", why)

        encoded = self.encoder.each(with_rejected(examples), refuse)
        # a row is whole when the next one begins: what is refused of it is known by then
        for row, answers in groupby(encoded, lambda each: each[0].line):
            sizes = [(len(tokens.ids), answer) for answer, tokens in answers]
            if row in refused:
                continue
            longest, answer = max(sizes, key=itemgetter(0))
            if longest > self.max_length:
                why = f"{longest:,} tokens, more than {self.max_length:,}"
                self._leave_out(answer, "too-long", why)
            else:
                yield sizes[0][1]

    def _reason(self, example: Example, seen: dict[bytes, int]) -> tuple[str, str] | None:
        if "leaks" in self.drop and self.leaks and (place := self.leaks.location(example)):
            return "leaks", f"asked in {place}"
        if "personal" in self.drop and (kinds := sorted(set(personal_data(example.text)))):
            return "personal", ", ".join(kinds)
        if "duplicates" not in self.drop and "near-duplicates" not in self.drop:
            return None
        first = seen.setdefault(row_digest(example)[:16], example.line)
        if first == example.line:
            return None
        reason = "duplicates" if "duplicates" in self.drop else "near-duplicates"
        return reason, f"the same as row {first}"

    def _drop_near(self, counts: ShingleCounts) -> None:
        hashes, rows = MinHashes(), array("q")
        for example in self._again():
            of_text = shingles(example.text)
            if len(of_text):
                hashes.add(counts.distinctive(of_text))
                rows.append(example.line)
        earlier = {rows[other]: rows[first] for other, first in hashes.earlier_ones().items()}
        for example in self._again():
            if (first := earlier.get(example.line)) is not None:
                self._leave_out(example, "near-duplicates", f"nearly the same as row {first}")
        self.kept -= earlier.keys()

    def _leave_out(self, example: Example, reason: str, why: str) -> None:
        parts = (example.prompt or "", example.completion)
        text = " ".join(" ".join(part[: 2 * LONGEST] for part in parts).split())
        self._note(reason, Dropped(example.line, why, text[:LONGEST]))

    def _note(self, reason: str, dropped: Dropped) -> None:
        self.dropped[reason] += 1
        _append(self.examples.setdefault(reason, []), dropped)


def _append(values: list[Any], value: Any) -> None:
    """Up to the number that is shown."""
    if len(values) < SHOWN:
        values.append(value)
