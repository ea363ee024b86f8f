"""A fixed share of the soak, which `make soak` runs in full."""

from pathlib import Path

import pytest

from pipeline.export.formats import FORMATS
from pipeline.stages.registry import GRAPH
from tests.journeys import soak

SHARE = (
    *("finetune_lora", "expand_vocab", "merge", "cache prune"),
    *(
        "export peft",
        "export gguf",
        "adapters combine",
        "data convert .jsonl",
        "new",
        "serve",
        "inference process",
    ),
)


def test_all_commands_are_known_by_one_name_each() -> None:
    names = [command.name for command in soak.commands()]
    assert len(set(names)) == len(names)
    assert set(GRAPH.stages) | {f"export {name}" for name in FORMATS} <= set(names)


def test_a_result_in_part_is_found() -> None:
    old, new = {"a/x": "1", "a/y": "1", "b": "1"}, {"a/x": "2", "a/y": "2", "b": "2"}
    for fine in (
        old,
        new,
        {"b": "1"},
        {**new, ".a.12-3.tmp/x": "?"},
        {"a/x": "1", "a/y": "1", "b": "2"},
    ):
        assert soak.damage(old, fine, new, ["a"]) == []
    assert soak.damage(old, {"a/x": "1", "a/y": "2", "b": "1"}, new, ["a"]) == ["a is in part"]
    assert soak.damage(old, {"a/x": "1", "b": "1"}, new, ["a"]) == ["a is in part"]
    assert soak.damage(old, {"b": "3"}, new, ["a"]) == ["b is changed"]
    assert soak.damage(old, {}, new, ["a"]) == ["b is missing"]
    found = soak.differences({"x": "1", "y": "1"}, {"y": "2", "z": "1"})
    assert found == ["x is left over", "y is changed", "z is missing"]


@pytest.mark.slow
def test_killed_anywhere_commands_end_with_the_same_bytes(tmp_path: Path) -> None:
    rows = soak.run(tmp_path, 24, 0, SHARE)
    assert [problem for row in rows for problem in row.all_problems] == []
    assert sum(len(row.kills) for row in rows) == 24
