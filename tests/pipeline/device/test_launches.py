"""docs/explanation/launches.md holds what the CUDA device without numbers counts."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.cuda_environment import ROOT, run_with_cuda
from tests.helpers.launches import ANSWERS
from tests.helpers.stand_in import STAND_IN

PAGE = ROOT / "docs" / "explanation" / "launches.md"
ROW = re.compile(r"\| (\w+ (?:\| )?(?:none|full)|base|(?:two )?adapters?|nf4) \| (.+) \|")


def table() -> dict[str, list[int]]:
    """Method and checkpointing, or what answers → kernels of a block, of the rest, of 28 and of 36
    blocks, before."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if found := ROW.fullmatch(line):
            cells = found[2].replace(",", "").split(" | ")
            rows[found[1].replace(" | ", " ")] = [int(cell) for cell in cells]
    return rows


def test_the_tables_sums_are_right_and_its_goals_are_met() -> None:
    """In training a third less than before for LoRA, half for QLoRA; in answers 20 a block."""
    rows = table()
    assert len(rows) == 8 + len(ANSWERS)
    assert rows["base"][0] <= 20
    for block, rest, of_28, of_36, _ in rows.values():
        assert (of_28, of_36) == (28 * block + rest, 36 * block + rest)
    for checkpointing in ("none", "full"):
        *_, lora, before = rows[f"lora {checkpointing}"]
        assert lora <= before * 2 / 3
        *_, qlora, before = rows[f"qlora {checkpointing}"]
        assert qlora <= before / 2


@pytest.mark.slow
@pytest.mark.skipif(STAND_IN.type == "cuda", reason="it starts a process on cuda itself")
def test_a_step_and_a_token_launch_what_the_table_says(tmp_path: Path) -> None:
    done = run_with_cuda("-m", "tests.helpers.launches", build=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    found = dict[str, list[int]]()
    for case in table():
        if case in ANSWERS:
            two, three = (counts[f"{case} {blocks}"] for blocks in (2, 3))
            block = three[0] - two[0]
            found[case] = [block, two[0] - 2 * block]
            assert two[1:] == three[1:] == [1, 1], "copies to the device, and waits"
            continue
        (two, step), (three, _) = (counts[f"{case} liger {blocks}"] for blocks in (2, 3))
        block = three[0] - two[0]
        found[case] = [block, two[0] - 2 * block]
        assert two[1:] == three[1:] == [1, 0], "copies to the device, and waits"
        assert step[1:] == [0, 1]
    assert found == {case: row[:2] for case, row in table().items()}
