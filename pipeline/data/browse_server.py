"""Data files read in a process of their own, for the terminal UI.

`python -m pipeline.data.browse_server`. A hostile file costs this process time and memory, never
the screen. Every request names its `path`, `columns`, whether plain prompts are `templated`, `base`
(the folder of a model with the tokenizer, or null) and `max_length`; each runs in a thread, so that
a page is read while all rows are checked.
"""

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.browse import Entry, RowFile, as_json, copied, find
from pipeline.data.containers import Row, suffix_of
from pipeline.data.examples import Example
from pipeline.data.formats import example_of
from pipeline.errors import UserError, explain, first_line
from pipeline.files import worker
from pipeline.files.problems import without_location

if TYPE_CHECKING:
    from pipeline.data.tokenizers.word import Tokenizer

    # the tokenizer, the number of positions; without one, why
    Opened = tuple[Tokenizer | None, int | None, str]

Answer = worker.Answer
EVERY = 0.2  # seconds between two reports of progress
SUMMARY = 200  # characters of a row in a list
TOKENIZED = 50_000  # characters; longer rows in a list are only tokenized when they are opened
SHOWN = 12_000  # characters of a row: what a terminal wraps without delay
EDITABLE = 100_000  # characters; less than `browse.LONGEST`, so that no line is cut by being edited
FOUND = 1000  # rows that a search gives


class Request(worker.Request):
    """A request whose fields are read leniently: what is missing or wrong is empty."""

    def text(self, key: str) -> str:
        return str(self.fields.get(key) or "")

    def number(self, key: str) -> int:
        value = self.fields.get(key)
        return value if isinstance(value, int) and value > 0 else 0

    @property
    def columns(self) -> dict[str, str]:
        return dict(self.fields.get("columns") or {})

    @property
    def templated(self) -> bool:
        return bool(self.fields.get("templated"))

    def progress(self) -> Callable[[int], None]:
        """A function that reports a number of rows, not too often. It raises Cancelled."""
        last = 0.0

        def report(rows: int) -> None:
            nonlocal last
            self.check()
            if (now := time.monotonic()) - last >= EVERY:
                last = now
                self.send(event="rows", rows=rows)

        return report


class Browser:
    """Answers requests: each public method is one, and returns the last answer."""

    def __init__(self) -> None:
        self._file: tuple[object, RowFile] | None = None
        self._tokenizer: tuple[str, Tokenizer | None, int | None, str] | None = None
        self._opening, self._loading = threading.Lock(), threading.Lock()

    def answer(self, request: Request) -> Answer:
        if request.do not in (
            "index",
            "page",
            "row",
            "draft",
            "find",
            "locate",
            "check",
            "copy",
            "convert",
        ):
            raise UserError(f"unknown request {request.do!r}.")
        answer: Answer = getattr(self, request.do)(request)
        return answer

    def index(self, request: Request) -> Answer:
        """Count the rows."""
        file, report = self._open(request), request.progress()
        if not file.complete:
            for count in file.index(request.cancelled.is_set):
                report(count)
        return {"rows": file.count}

    def page(self, request: Request) -> Answer:
        """`count` rows from `first` on, then the lengths of those."""
        first, count = request.number("first"), min(request.number("count"), 500)
        entries = self._open(request).read(first, count, request.cancelled.is_set)
        request.check()
        examples, rows = self._summaries(request, enumerate(entries, first))
        request.send(event="page", rows=rows)
        return self._lengths(request, examples)

    def find(self, request: Request) -> Answer:
        """The rows that have `text` in them."""
        report, shown = request.progress(), 0
        for position, entry in find(
            self._open(request), request.text("text"), request.cancelled.is_set
        ):
            if entry is None:
                report(position)
                continue
            examples, rows = self._summaries(request, [(position, entry)])
            request.send(event="page", rows=rows)
            request.send(event="tokens", **self._lengths(request, examples))
            shown += 1
            if shown == FOUND:
                return {"complete": False}
        request.check()
        return {"complete": True}

    def locate(self, request: Request) -> Answer:
        """The position of a line or row by its number, or of the next one that is there."""
        position = self._open(request).position_of(request.number("row"), request.cancelled.is_set)
        request.check()
        return {"position": position}

    def row(self, request: Request) -> Answer:
        """One row, turn by turn. Sent without tokens first if the tokenizer has to be loaded."""
        entries = self._open(request).read(request.number("position"), 1, request.cancelled.is_set)
        request.check()
        if not entries:
            raise UserError(f"{request.text('path')}: no such row any more. The file has changed.")
        if self._is_loading(request):
            opened = None, None, "loading the tokenizer …"
            request.send(event="row", **self._turns(request, entries[0], opened))
        return self._turns(request, entries[0])

    def draft(self, request: Request) -> Answer:
        """A row that is being edited, as it would be read from the file."""
        record = json.loads(request.text("line"))
        return self._turns(request, Entry(Row(request.number("row") or 1, record)))

    def check(self, request: Request) -> Answer:
        """`lora data check` of the file."""
        from pipeline.data.check import check

        tokenizer, positions, _ = self._open_tokenizer(request)
        report = check(
            [(request.text("path"), request.columns)],
            tokenizer,
            max_length=request.number("max_length"),
            positions=positions if not request.number("window") else None,
            templated=request.templated,
            progress=request.progress(),
        )
        return report.as_json()

    def copy(self, request: Request) -> Answer:
        """Write all rows to the file `out`, the one at `position` as `line`."""
        from pipeline.files.artifact import write_file

        source, out, report = self._open(request), Path(request.text("out")), request.progress()
        if suffix_of(out) != (".jsonl", ""):
            raise UserError(f"{out}: the copy's name must end in .jsonl. Rename it.")
        if out.exists() and not request.fields.get("replace"):
            raise UserError(f"{out} exists. Name another file.")
        left_out = 0

        def pieces() -> Iterator[bytes]:
            nonlocal left_out
            changed = request.number("position"), request.text("line")
            for number, piece in enumerate(copied(source, *changed)):
                left_out += not piece
                report(number)
                yield piece

        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, pieces(), durable=True)
        return {"out": str(out), "left_out": left_out}

    def convert(self, request: Request) -> Answer:
        """`lora data convert`."""
        from pipeline.data.convert import convert

        done = convert(
            Path(request.text("path")),
            Path(request.text("out")),
            columns=request.columns,
            progress=request.progress(),
        )
        return {"rows": done.rows, "format": done.format, "notes": done.notes}

    def _open(self, request: Request) -> RowFile:
        """The file, which is opened again if it has changed."""
        name = request.text("path")
        path = Path(name)
        status = None
        with suppress(OSError, ValueError):
            status = path.stat()
        key = (name, status and (status.st_mtime_ns, status.st_size, status.st_ino))
        with self._opening:
            if self._file is None or self._file[0] != key:
                self._file = key, RowFile(path, name)
            return self._file[1]

    def _is_loading(self, request: Request) -> bool:
        """Whether the base's tokenizer is not here yet: importing the libraries takes seconds."""
        base, loaded = request.text("base"), self._tokenizer
        return bool(base) and (loaded is None or loaded[0] != base)

    def _open_tokenizer(self, request: Request) -> "Opened":
        """The tokenizer and the number of positions; without one, why."""
        base = request.text("base")
        if not base:
            return None, None, "no model yet"
        with self._loading:
            if self._tokenizer is None or self._tokenizer[0] != base:
                self._tokenizer = base, *_load(Path(base))
            return self._tokenizer[1:]

    def _summaries(
        self, request: Request, entries: Iterable[tuple[int, Entry]]
    ) -> tuple[dict[int, Example], list[Answer]]:
        examples, rows = dict[int, Example](), []
        for position, entry in entries:
            problem, text = entry.problem, entry.raw
            if not problem:
                try:
                    example = examples[position] = example_of(
                        entry.row, request.text("path"), request.columns, request.templated
                    )
                    text = _first_words(example)
                except UserError as error:
                    problem = without_location(error, request.text("path"), entry.row.number)
                    text = as_json(entry.row.value)
            rows.append(
                {
                    "position": position,
                    "row": entry.row.number,
                    "text": text[:SUMMARY],
                    "problem": problem[:SUMMARY],
                }
            )
        return examples, rows

    def _lengths(self, request: Request, examples: Mapping[int, Example]) -> Answer:
        """Position → [tokens, trained, cut] of the examples, or why one cannot be encoded."""
        from pipeline.data.masking import Encoder

        tokenizer, _, missing = self._open_tokenizer(request)
        short = {
            position: example
            for position, example in examples.items()
            if len(example.text) <= TOKENIZED and example.prompt != example.text
        }
        if tokenizer is None or not short:
            return {"lengths": {}, "problems": {}, "missing": missing}
        positions = {id(example): position for position, example in short.items()}
        lengths, problems = dict[int, tuple[int, int, int]](), dict[int, str]()

        def refuse(example: Example, error: UserError) -> None:
            problem = without_location(error, example.file, example.line)
            problems[positions[id(example)]] = problem[:SUMMARY]

        most = request.number("max_length")
        for example, encoded in Encoder(tokenizer).each(short.values(), refuse):
            request.check()
            tokens = len(encoded.ids)
            size = min(tokens, most or tokens)
            trained = sum(encoded.trained[1:size])
            lengths[positions[id(example)]] = (tokens, trained, tokens - size)
        return {"lengths": lengths, "problems": problems, "missing": ""}

    def _turns(self, request: Request, entry: Entry, opened: "Opened | None" = None) -> Answer:
        from pipeline.data.turns import View, view

        name, number = request.text("path"), entry.row.number
        line = entry.raw if entry.problem else as_json(entry.row.value)
        answer: Answer = {
            "row": number,
            "problem": entry.problem,
            "missing": "",
            "line": line if len(line) <= EDITABLE else "",
        }
        if entry.problem:
            return answer | _as_it_is(line)
        tokenizer, _, missing = opened or self._open_tokenizer(request)
        shown = View(())
        try:
            example = example_of(entry.row, name, request.columns, request.templated)
            shown = view(example)
            shown = view(example, tokenizer, request.number("max_length"))
        except UserError as error:
            answer["problem"] = without_location(error, name, number)
        if not shown.turns:
            return answer | _as_it_is(line)
        turns, hidden = _shortened(shown)
        return {
            **answer,
            "turns": turns,
            "hidden": hidden,
            "missing": missing,
            "template": tokenizer and tokenizer.has_template,
            "tokens": shown.tokens,
            "trained": shown.trained,
            "cut": shown.cut,
        }


def _load(base: Path) -> "Opened":
    from pipeline.data.tokenizers.word import load_tokenizer
    from pipeline.files.base_model import max_positions

    try:
        return load_tokenizer(base), max_positions(base), ""
    except (UserError, OSError) as error:
        return None, None, explain(error) if isinstance(error, OSError) else str(error)


def _as_it_is(line: str) -> Answer:
    turns = [("as it is", [("read", line[:SHOWN])])] if line else []
    return {"turns": turns, "hidden": max(0, len(line) - SHOWN)}


def _first_words(example: Example) -> str:
    users = (message["content"] for message in example.messages if message["role"] == "user")
    return next(filter(None, users), None) or example.text


def _shortened(shown: Any) -> tuple[list[tuple[str, list[tuple[str, str]]]], int]:
    """The turns, up to SHOWN characters, and how many more there are."""
    left, hidden = SHOWN, 0
    turns = []
    for turn in shown.turns:
        parts = []
        for kind, text in turn.parts:
            if left > 0:
                parts.append((kind, text[:left]))
            hidden += max(0, len(text) - max(0, left))
            left -= len(text)
        if parts:
            turns.append((turn.role, parts))
    return turns, hidden


def start() -> worker.Handle:
    """What answers the requests to one browser. A library's failure is an error message too."""
    browser = Browser()

    def handle(asked: worker.Request) -> Iterator[Answer]:
        request = Request(**vars(asked))
        try:
            yield {"event": "done", **browser.answer(request)}
        except (UserError, worker.Cancelled):
            raise
        except OSError as error:
            raise UserError(explain(error)) from None
        except Exception as error:  # whatever a damaged file makes a library raise
            traceback.print_exc()
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{request.text('path')}: cannot be read: {reason}") from None

    return handle


def main() -> None:
    worker.serve(start, parallel=True)


if __name__ == "__main__":
    main()
