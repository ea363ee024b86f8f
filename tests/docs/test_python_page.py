"""docs/how-to/python.md and README.md: their Python runs from top to bottom on a tiny base."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import ROOT

HUB = '"Qwen/Qwen3-0.6B"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the base and the data that the pages name."""
    toy_checkpoint(tmp_path / "base", max_position_embeddings=256)
    rows = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(20)]
    write_jsonl(tmp_path / "tickets.jsonl", rows)
    return tmp_path


def run(code: str, folder: Path) -> list[str]:
    """The lines that code prints, with the tiny base in place of the hub's."""
    assert code.count(HUB) == 1
    done = subprocess.run(
        [sys.executable, "-c", code.replace(HUB, '"base"')],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_page_on_python_runs_from_top_to_bottom(folder: Path) -> None:
    page = (ROOT / "docs/how-to/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("\n## ")
    lines = run("\n".join(blocks), folder)
    assert "{'rank': (8, 4), 'alpha': (16.0, 8.0)}" in lines
    assert lines[-1].startswith("no-such-adapter")
    assert (folder / "merged/model.safetensors").is_file()
    assert (folder / "for-peft/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(folder: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^    import lora_workbench.*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)
    run(re.sub("^    ", "", block, flags=re.MULTILINE), folder)
    assert (folder / "run/artifacts/lora_adapter/adapter_model.safetensors").is_file()
