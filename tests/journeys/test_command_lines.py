"""Some of the command lines that `python -m tests.journeys.command_lines` draws, in each run of the
tests.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.helpers.projects import BRIEF
from tests.journeys.command_lines import commands, drawn, outcomes, run, spoil, write_params


@pytest.fixture
def spoilt(brief: Path, tmp_path: Path) -> Path:
    """A copy of `brief` that trains as briefly without options, with broken folders beside what is
    good.
    """
    root = Path(shutil.copytree(brief, tmp_path / "project"))
    write_params(root / "params.yaml", BRIEF)
    spoil(root)
    return root


@pytest.mark.parametrize(("seed", "count"), [(1, 8), pytest.param(0, 200, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_no_command_line_ends_in_a_traceback_hangs_or_leaves_something_half_written(
    spoilt: Path, seed: int, count: int
) -> None:
    found = list(outcomes(spoilt, seed=seed, count=count))
    assert len(found) == count
    assert not [(one.wrong, one.words, one.errors[-500:]) for one in found if one.wrong]


def test_every_command_is_drawn_and_the_same_seed_draws_the_same() -> None:
    every = list(commands())
    lines = [drawn(random.Random(seed), every) for seed in range(2000)]
    assert lines == [drawn(random.Random(seed), every) for seed in range(2000)]
    named = {" ".join(path) for path, _ in every}
    assert len(named) >= 32
    assert all(any(" ".join(line).startswith(name) for line in lines) for name in named)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ValueError('a bug')", "a traceback"),
        (
            "import sys; sys.stderr.write('error: \\x1b[31m'); raise SystemExit(1)",
            "something that a terminal obeys",
        ),
        ("raise SystemExit(7)", "exit code 7"),
        ("raise SystemExit(1)", "failed and said nothing"),
        (
            "from pathlib import Path; Path('artifacts/.x.1.tmp').mkdir()",
            "artifacts/.x.1.tmp was left",
        ),
        (
            "from pathlib import Path; Path('artifacts/base/config.json').write_text('{}')",
            "half written: ",
        ),
        (
            "from pathlib import Path; Path('data/prompts.yaml').unlink()",
            "data/prompts.yaml is gone",
        ),
    ],
)
def test_each_kind_of_fault_is_noticed(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    """The command is replaced, in the process that runs it, by one with this fault."""
    (spoilt / "fault.py").write_text(fault)
    monkeypatch.setattr("tests.helpers.process._run", _faulty)
    outcome = run(spoilt, ["doctor"])
    assert outcome.wrong is not None and outcome.wrong.startswith(said), outcome


def _faulty(_command: list[str], cwd: str, errors: str, *_: object) -> None:
    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(cwd)
    exec(Path("fault.py").read_text())
