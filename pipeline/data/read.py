"""Data files, read line by line in constant memory."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.data.examples import Example
from pipeline.data.formats import read_line
from pipeline.errors import UserError

MAX_LINE_BYTES = 2**20  # a tokenizer needs up to about 350 bytes of memory per byte of text


def read_examples(path: Path, name: str, prompts: bool = False) -> list[Example]:
    """All examples of a file. `name` is the path as the user wrote it. Raises UserError."""
    return list(iter_examples(path, name, prompts))


def iter_examples(path: Path, name: str, prompts: bool = False) -> Iterator[Example]:
    """The examples of a file, one per line, in constant memory: `.txt` holds texts, `.jsonl` any of the formats.

    Only a newline ends a line; all other white space belongs to the text.
    With `prompts`, a line may also be {"prompt"} alone, for the model itself to complete.
    Raises UserError with the file, the line and the reason.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"{name}: a data file must be .txt (one text per line) or .jsonl (one JSON object per line).")
    for number, line in _read_lines(path, name):
        example = Example(line, name, number) if path.suffix.lower() == ".txt" else read_line(line, name, number)
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
