"""JSON files as tests read, write and change them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, **values: object) -> None:
    """Set values of an object."""
    write_json(path, read_json(path) | values)


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """A row a line; returns `path`."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """A text a row."""
    return write_jsonl(path, ({"text": text} for text in texts))
