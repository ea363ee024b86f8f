"""Counts what was tried: each reader gets the examples that its line of the budget promises, and
the run says so.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.fuzz import EXAMPLES, tried


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    before = dict(tried)
    yield
    for reader, count in tried.items():
        if new := count - before.get(reader, 0):
            record_property("fuzzed", (reader, new))
            assert new >= EXAMPLES[reader], (
                f"{reader}: {new} examples instead of {EXAMPLES[reader]}"
            )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        report for group in ("passed", "failed") for report in terminalreporter.stats.get(group, ())
    ]
    counts = [
        value for report in reports for key, value in report.user_properties if key == "fuzzed"
    ]
    if counts:
        each = ", ".join(f"{reader} {count:,}" for reader, count in sorted(set(map(tuple, counts))))
        terminalreporter.write_line(
            f"fuzzed {sum(count for _, count in counts):,} examples: {each}"
        )
