"""The difference between the last evaluation and the committed one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project import provenance


@dataclass(frozen=True)
class Change:
    """One number before and after; None if it is missing there."""

    name: str
    before: float | None
    after: float | None


def since_commit(path: Path) -> list[Change]:
    """Every number of `path` that differs from the last commit's in six digits; further digits depend on the machine.

    Raises UserError if there is nothing to compare.
    """
    if not path.is_file():
        raise UserError("Nothing was evaluated yet.")
    text = provenance.committed(path)
    if text is None:
        raise UserError(f"{path.name} was never committed, so there is nothing to compare.")
    try:
        before, after = (dict(_numbers(json.loads(document))) for document in (text, path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise UserError(f"{path.name} cannot be read: {error}.") from None
    names = [*before, *(name for name in after if name not in before)]
    return [Change(n, before.get(n), after.get(n)) for n in names if _format(before.get(n)) != _format(after.get(n))]


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _numbers(tree: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in the JSON tree with its dotted name."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield prefix, tree
