"""The house stays one whose rooms can be guessed: few entries a folder, thirteen packages, no file
that is two, and nothing in it of what is built beside it.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.helpers.projects import ROOT

MOST = 15  # entries of a folder of code: as many as a reader takes in at a glance
PACKAGES = {"files", "project", "data", "calc", "models", "adapters"} | {
    *(
        "training",
        "inference",
        "weights",
        "evaluation",
        "stages",
        "export",
        "views",
        "fleet",
        "certify",
    )
}
MODULES = {"errors", "extensions"}  # beside them
CODE = ("lora_workbench", "cli", "tui", "pipeline", "bench")
# A section of a paper, behind its year: "Yang et al. 2024, §3.3".
CITED = re.compile(r"\b\d{4}[a-z]?, §\d[\d.]*(?:(?: and|,) §\d[\d.]*)*")
PRONOUNS = {"each", "it", "one", "own", "that", "them", "these", "this", "those"}
FOREIGN = re.compile(r"§ ?\d|\bthe document's|^\s*(?:from|import) lab\b", re.MULTILINE)


def entries(folder: Path) -> list[str]:
    """What a reader sees in it."""
    hidden = ("__init__.py", "__pycache__")
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in hidden and not path.name.startswith(".")
    )


def folders() -> Iterator[Path]:
    for top in ("lora_workbench", "cli", "tui", "pipeline"):
        yield from (path.parent for path in (ROOT / top).rglob("__init__.py"))


@pytest.mark.parametrize("folder", sorted(str(path.relative_to(ROOT)) for path in folders()))
def test_a_folder_of_code_has_few_entries(folder: str) -> None:
    assert len(entries(ROOT / folder)) <= (
        len(PACKAGES) + len(MODULES) if folder == "pipeline" else MOST
    )


def test_the_library_is_fifteen_packages_and_few_modules() -> None:
    found = set(entries(ROOT / "pipeline"))
    assert {name for name in found if (ROOT / "pipeline" / name).is_dir()} == PACKAGES
    assert {name.removesuffix(".py") for name in found if name.endswith(".py")} <= MODULES


@pytest.mark.parametrize("top", CODE)
def test_the_program_knows_no_extension_and_no_section_of_a_document(top: str) -> None:
    found = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        lines = re.sub(r"\n\s*(?:# )?", "\n", path.read_text(encoding="utf-8"))
        text = re.sub(r"(?<=\d,)\n(?=§)", " ", lines).replace("the\ndocument's", "the document's")
        name = path.relative_to(ROOT).as_posix()
        if words := FOREIGN.findall(CITED.sub("", text)):
            found[name] = words
    assert found == {}


def test_no_conditional_expression_stands_in_another() -> None:
    found = []
    for top in CODE:
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.IfExp)
                    and sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) > 1
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_no_variable_is_a_pronoun() -> None:
    found = []
    for path in chain((ROOT / "cli").rglob("*.py"), (ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store)
                and node.id in PRONOUNS
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.id}")
    assert found == []


DRAWS = re.compile(r"def (render|render_line|on_resize)\(|\.set_interval\(")


def test_screens_are_made_of_panes_and_draw_nothing_and_one_clock_ticks() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tui").rglob("*.py")}
    screens = {path: text for path, text in sources.items() if "screens" in path.parts}
    assert (
        len(screens) > 30 and [path for path, text in screens.items() if DRAWS.search(text)] == []
    )
    assert sum(text.count(".set_interval(") for text in sources.values()) == 1
    assert sum(text.count("(ScrollView") for text in sources.values()) == 1


LOADED = """
import atexit, sys
from cli.main import main

def count():
    files = (getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("pipeline."))
    print(*(file for file in files if file and not file.endswith("__init__.py")), sep="\\n", file=sys.stderr)

atexit.register(count)
sys.argv = ["lora", "finetune", "lora", "--force", "--set", "finetune_lora.epochs=1"]
main()
"""


def test_a_lora_run_loads_few_modules_of_the_library(houses: Path, tmp_path: Path) -> None:
    shutil.copytree(houses, tmp_path / "houses")
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=tmp_path / "houses",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stderr.splitlines() if line.endswith(".py")]
    assert len(loaded) <= 89, "\n".join(sorted(loaded))
    assert any("stages/finetune" in path for path in loaded)
