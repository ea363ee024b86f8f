"""CONTRIBUTING.md: the method that it adds in one file works as it stands on the page."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.project.logs.run_log import epoch_means, read_steps
from tests.helpers.json_files import read_json
from tests.helpers.projects import BRIEF, ROOT

BLOCK = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A copy of the code, with the files that the page shows."""
    root = tmp_path / "code"
    for name in ("cli", "pipeline", "docs", "bench", "tests", "data"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.svg")
        )
    for name in ("pyproject.toml", "params.yaml"):
        shutil.copy(ROOT / name, root / name)
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert [*blocks] == [
        "pipeline/stages/methods/bitfit.py",
        "tests/pipeline/stages/test_bitfit.py",
    ]
    for name, text in blocks.items():
        assert not (ROOT / name).exists(), "the page adds a method that the project does not have"
        (root / name).write_text(text, encoding="utf-8")
    return root


LORA = """
import json, sys
from cli.main import main
for sys.argv in json.load(sys.stdin):
    try:
        main()
    except SystemExit as end:
        assert not end.code, sys.argv
"""


@pytest.mark.slow
def test_the_method_of_the_page_trains_is_evaluated_and_passes_its_test(
    overlay: Path, project: Path
) -> None:
    def run(*arguments: str, cwd: Path, said: str = "") -> str:
        """What Python prints with the copy of the code."""
        environment = {**os.environ, "PYTHONPATH": str(overlay), "TERMINAL_WIDTH": "100"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            input=said,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    params = project / "params.yaml"
    section = "\nfinetune_bitfit: {learning_rate: 0.02}\n"
    params.write_text(params.read_text(encoding="utf-8") + section, encoding="utf-8")
    given = [f"--set={each}" for each in BRIEF]
    commands = (
        ["finetune", "bitfit", *given],
        ["evaluate", *given],
        ["calc", "--model=gpt2", "--method=bitfit"],
    )
    printed = run(
        "-c", LORA, cwd=project, said=json.dumps([["lora", *command] for command in commands])
    )
    assert "artifacts/bitfit" in printed and "BitFit" in printed

    first, *_, last = epoch_means(read_steps(project / "artifacts/bitfit/loss.csv"))
    assert last < first - 0.5
    metrics = read_json(project / "artifacts/evaluation/metrics.json")
    assert metrics["bitfit"]["new_loss"] < metrics["expanded"]["new_loss"] - 0.5
    assert metrics["bitfit"]["trainable"] < metrics["lora"]["trainable"]
    assert "| BitFit |" in (project / "artifacts/evaluation/report.md").read_text(encoding="utf-8")

    files = ("pipeline/stages/methods/bitfit.py", "tests/pipeline/stages/test_bitfit.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", files[1], cwd=overlay)
    for tool in (("check",), ("format", "--check")):
        run("-m", "ruff", *tool, *files, cwd=overlay)
