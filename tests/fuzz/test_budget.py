"""The page of the threat model says what the tests hold: its lines name tests, its numbers are
theirs.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.fuzz import EXAMPLES
from tests.helpers.projects import ROOT

PAGE = ROOT / "docs/explanation/threat-model.md"
TABLES = PAGE.read_text(encoding="utf-8").split("\n## ")
THREATS = [
    line
    for section in TABLES
    if "| what could happen |" in section
    for line in section.splitlines()
    if line.startswith("| ") and not line.startswith("| input |")
]
REFERENCE = re.compile(r"\[`(tests/[\w/]+\.py)::(\w+)`\]\(\.\./\.\./(tests/[\w/]+\.py)\)")


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(each.name for each in tree.body if isinstance(each, kinds))


@pytest.mark.parametrize("line", THREATS, ids=range(len(THREATS)))
def test_each_line_of_the_threat_model_names_a_test(line: str) -> None:
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert len(cells) == 4 and all(cells[1:]), line
    named = REFERENCE.findall(cells[3])
    assert named and REFERENCE.sub("", cells[3]).strip("; ") == "", line
    for path, function, target in named:
        assert path == target
        assert function in functions(ROOT / path), f"{path} has no {function}"


def test_the_threats_are_many() -> None:
    assert len(THREATS) > 35


def test_every_reader_is_fuzzed_and_the_page_states_the_counts() -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "tests/fuzz").glob("test_fuzz_*.py"))
    ]
    used = [
        name for text in texts for name in re.findall(r'^@fuzz\(\s*"([^"]+)"', text, re.MULTILINE)
    ]
    assert sorted(used) == sorted(EXAMPLES)
    said = (
        f"`make test-slow` gives {sum(EXAMPLES.values()):,} changed files and requests to "
        f"{len(EXAMPLES)} readers"
    )
    assert said in PAGE.read_text(encoding="utf-8")
