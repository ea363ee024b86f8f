"""Data files, read line by line in constant memory, and the shapes that a line of a .jsonl file may have.

Each shape is one file here with its `FORMAT`; they are asked in their order. Every problem is a UserError with file and
line.
"""

import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.examples import Example
from pipeline.errors import UserError

MAX_LINE_BYTES = 2**20  # a tokenizer needs up to about 350 bytes of memory per byte of text
Record = Mapping[str, Any]  # the JSON object of a line


class Format(NamedTuple):
    """`shape`: its keys, for messages. `detect`: whether a record is of this format, by its keys alone.

    `read(record, file, line)`: the example. Raises UserError with the line and the reason.
    """

    order: int
    shape: str
    detect: Callable[[Record], bool]
    read: Callable[[Record, str, int], Example]


def read_examples(path: Path, name: str) -> list[Example]:
    """All examples of a file. `name` is the path as the user wrote it. Raises UserError."""
    return list(iter_examples(path, name))


def iter_examples(path: Path, name: str, prompts: bool = False) -> Iterator[Example]:
    """The examples of a file, one per line, in constant memory: `.txt` holds texts, `.jsonl` any of the formats.

    Only a newline ends a line; all other white space belongs to the text.
    With `prompts`, a line may also be {"prompt"} alone, for the model itself to complete.
    Raises UserError with the file, the line and the reason.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"{name}: a data file must be .txt (one text per line) or .jsonl (one JSON object per line).")
    for number, line in _read_lines(path, name):
        example = Example(line, name, number) if path.suffix.lower() == ".txt" else _read_json(line, name, number)
        if example.prompt == example.text and not prompts:
            raise UserError(
                f'{example.location}: "prompt" needs a "completion". Add one, or use {{"text": …}} to train on the '
                "whole line. Only finetune_lora.retention_data takes prompts alone: the base model completes them."
            )
        yield example


def _read_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without line ends. Blank lines are allowed only at the end of the file."""
    blank = number = start = 0
    try:
        with path.open("rb") as file:
            # +2 for \r\n, +1 to detect more
            for at, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 3), b""), 1):
                # a long line cannot be cut before it is tokenized: the text behind the cut may change the tokens
                if len(raw.removesuffix(b"\n").removesuffix(b"\r")) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{name}:{at}: a line must have at most {MAX_LINE_BYTES:,} bytes, got more. "
                        "Split its text into several lines."
                    )
                # Windows editors end lines with \r\n. A \r anywhere else is part of the text.
                content = raw.removesuffix(b"\r\n" if raw.endswith(b"\r\n") else b"\n")
                try:
                    line = content.decode("utf-8" if start else "utf-8-sig")
                except UnicodeDecodeError as error:
                    byte = start + error.start
                    raise UserError(f"{name}:{at}: not UTF-8 (byte {byte}). Save the file as UTF-8.") from None
                start += len(raw)
                if not line.strip():
                    blank = blank or at
                    continue
                if blank:
                    raise UserError(
                        f"{name}:{blank}: blank line. Write one example per line, with no blank lines between them."
                    )
                number = at
                yield number, line
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name a file that exists.") from None
    if not number:
        raise UserError(f"{name}: the file is empty. Write one example per line.")


def _read_json(line: str, file: str, number: int) -> Example:
    """The example in a line of JSON. Raises UserError with the file, the line and the reason."""
    location, shapes = f"{file}:{number}", " or ".join([", ".join(SHAPES[:-1]), SHAPES[-1]])
    try:
        record = json.loads(line, object_pairs_hook=_reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)[:200]
        raise UserError(f"{location}: not JSON: {reason}. Write one JSON object per line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: must be a JSON object, {shapes}, got {describe_type(record)}.")
    for each in FORMATS:
        if each.detect(record):
            return each.read(record, file, number)
    raise UserError(f"{location}: the keys must be {shapes}, got {', '.join(map(repr, record)) or 'none'}.")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("duplicate key")
    return record


def read_string(record: Record, key: str, location: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{location}: {key} must be a string, got {describe_type(value)}.")
    if not value.strip():
        raise UserError(f"{location}: {key} is empty. Fill it in, or remove the line.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{location}: {key} contains an unpaired surrogate, which is not a character. Remove it."
        ) from None
    return value


def describe_type(value: Any) -> str:
    """The JSON type of a value; null, true, false, [] and {} as they are."""
    if value is None or isinstance(value, bool) or value in ([], {}):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


FORMATS: tuple[Format, ...] = tuple(  # last, as the modules import the names above
    sorted(
        (import_module(f"{__name__}.{module.name}").FORMAT for module in pkgutil.iter_modules(__path__)),
        key=lambda each: each.order,
    )
)
SHAPES = [each.shape for each in FORMATS]
