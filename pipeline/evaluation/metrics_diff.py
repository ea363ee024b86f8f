"""What the last evaluation changed: the numbers of metrics.json beside those of the last commit."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project import provenance


@dataclass(frozen=True)
class MetricChange:
    """A number of the evaluation before and after; None if it is missing there."""

    name: str
    before: float | None
    after: float | None


def metrics_since_commit(path: Path) -> list[MetricChange]:
    """Every number of `path` that differs from the last commit's in six digits.

    Further digits depend on the machine. Raises UserError if there is nothing to compare.
    """
    if not path.is_file():
        raise UserError("Nothing was evaluated yet.")
    committed = provenance.committed(path)
    if committed is None:
        raise UserError(f"{path.name} was never committed, so there is nothing to compare.")
    try:
        before = dict(_numbers(json.loads(committed)))
        after = dict(_numbers(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, OSError, OverflowError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read: {error}.") from None
    return [
        MetricChange(name, before.get(name), after.get(name))
        for name in before | after
        if _six_digits(before.get(name)) != _six_digits(after.get(name))
    ]


def _six_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested JSON objects, but not in lists, with its dotted name."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield prefix, float(tree)
