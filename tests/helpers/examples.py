"""Training examples as they are read from a file."""

from pathlib import Path
from typing import Any

from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from tests.helpers.json_files import write_jsonl


def examples_of(folder: Path, *rows: object, **options: Any) -> list[Example]:
    """The examples in a file of these rows."""
    return read_examples(write_jsonl(folder / "d.jsonl", rows), "d", **options)
