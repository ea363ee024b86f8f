"""stdout carries results, stderr carries progress and messages."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; `right` names the columns of numbers, which stay on one line where the terminal is wide enough."""
    built = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    widths = [max(map(len, cells)) + 2 for cells in zip(columns, *rows, strict=True)]
    needed = sum(width if column in right else min(width, 8) for column, width in zip(columns, widths, strict=True))
    for column in columns:
        number = column in right
        whole = number and needed <= stdout.width  # else digits go on below: a cut number would be a wrong one
        built.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        built.add_row(*map(Text, row))
    return built


def bar(share: float, width: int = 20) -> str:
    """A bar of eighth blocks for a share of 1."""
    eighths = round(share * width * 8)
    return str("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip()
