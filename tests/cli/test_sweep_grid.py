"""`lora finetune sweep --grid`: the grid as options."""

import json
from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.projects import refusal


@pytest.mark.slow
def test_options_make_the_grid_that_set_makes(cli: Lora, project: Path) -> None:
    brief = ("--set", "finetune_lora.epochs=1")
    code, out, err = cli(
        *("finetune", "sweep", "--grid", "r=1,2", "--grid", "lr=1e-3,2e-3", *brief), cwd=project
    )
    assert code == 0, err
    manifest = json.loads((project / "artifacts/sweep/manifest.json").read_text(encoding="utf-8"))
    assert manifest["params"]["grid"] == {"rank": [1, 2], "learning_rate": [1e-3, 2e-3]}
    assert "4 adapters" in out
    grid = "finetune_sweep.grid={rank: [1, 2], learning_rate: [1e-3, 2e-3]}"
    again = cli("finetune", "sweep", "--set", grid, *brief, cwd=project)
    assert again[0] == 0 and "taken from the cache" in again[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "rank"], "--grid takes a key once with its values, such as rank=4,8,16, got"),
        (["--grid", "rank="], "--grid takes a key once with its values"),
        (["--grid", "rank=[1"], "--grid takes a key once with its values"),
        (["--grid", "rank=1", "--grid", "rank=2"], "--grid takes a key once with its values"),
        (["--grid", "rank=1", "--grid", "r=2"], "--grid has rank under two names. Edit --grid."),
        (["--grid", "rank=0,4"], "--grid.rank must be at least 1, got 0. Edit --grid."),
        (["--grid", "nothing=4"], "--grid.nothing: adapters that train together can differ in"),
        (["--grid", "rank=4", "--over", "rank"], "--over, --grid and --set finetune_sweep.grid"),
        (["--grid", "r=4", "--set", "finetune_sweep.grid={rank: [1]}"], "each make the grid. Give"),
        (["--over", "rank", "--set", "grid={rank: [1]}"], "each make the grid. Give one"),
        (["--grid", "r=4", "--set", "grid={rank: [1]}"], "each make the grid. Give one of them."),
    ],
)
def test_a_grid_that_cannot_be_is_one_message(
    options: list[str], message: str, cli: Lora, project: Path
) -> None:
    assert message in refusal(cli("finetune", "sweep", *options, cwd=project))
