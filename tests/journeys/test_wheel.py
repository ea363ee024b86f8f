"""What is released: the wheel's files and metadata, and the first commands of a user who has no
clone.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import uuid
import venv
import zipfile
from collections.abc import Mapping
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import ROOT
from tests.helpers.tmux import Terminal, needs_tmux

pytestmark = pytest.mark.slow
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEFAULTS = "lora_workbench_defaults"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it, of the files that git knows or would add."""
    folder = tmp_path_factory.mktemp("built")
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in subprocess.run(
        listing, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "source" / name)
    build = (
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    )
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(
    built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, str]]:
    """The programs of an environment with the wheel, and the variables of a user with an empty
    home.

    Its other libraries are those of this environment, behind the wheel on the path: to install them
    takes minutes.
    """
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    bin_folder, python = folder / "venv/bin", folder / "venv/bin/python"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    )
    subprocess.run([*pip, str(built[1])], check=True)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (folder / "home").mkdir()
    keep = {
        name: os.environ[name]
        for name in ("LANG", "TMPDIR", "OMP_NUM_THREADS")
        if name in os.environ
    }
    return bin_folder, {
        **keep,
        "HOME": str(folder / "home"),
        "PATH": f"{bin_folder}:/usr/local/bin:/usr/bin:/bin",
    }


def run(installed: tuple[Path, Mapping[str, str]], folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=installed[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_program_its_defaults_and_every_page_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    info = f"lora_workbench-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {
        "lora_workbench",
        "cli",
        "tui",
        "pipeline",
        DEFAULTS,
        info,
    }
    in_git = subprocess.run(
        ("git", "ls-files", "-z", "lora_workbench", "cli", "tui", "pipeline"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert {name for name in in_git.stdout.split("\0") if name and (ROOT / name).exists()} <= set(
        names
    )
    pages = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if "decisions" not in path.parts
    }
    docs = {
        name.removeprefix(f"{DEFAULTS}/") for name in names if name.startswith(f"{DEFAULTS}/docs/")
    }
    assert docs == pages
    assert {
        f"{DEFAULTS}/params.yaml",
        f"{info}/licenses/LICENSE",
    } <= {*names}
    assert built[1].stat().st_size < 4_000_000


def test_its_metadata_is_the_projects(built: tuple[Path, Path]) -> None:
    about = metadata(built[1])
    assert (about["Name"], about["Version"]) == ("lora-workbench", PROJECT["version"])
    assert (about["Requires-Python"], about["License-Expression"]) == (
        PROJECT["requires-python"],
        "MIT",
    )
    assert set(about.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    required = [one for one in about.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert len(required) == len(PROJECT["dependencies"])


def test_the_sdist_builds_the_same_wheel_as_the_tree(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "tests/journeys/test_wheel.py").exists() and not (source / ".venv").exists()
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "wheels",
    )
    tree = built[0].parents[1] / "source"
    subprocess.run([*pip, str(tree)], cwd=tmp_path, check=True)
    (again,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(built[1]) as one, zipfile.ZipFile(again) as other:
        assert {item.filename: item.CRC for item in one.infolist()} == {
            item.filename: item.CRC for item in other.infolist()
        }


def test_without_a_clone_a_project_is_made_and_trained(
    installed: tuple[Path, Mapping[str, str]], tmp_path: Path
) -> None:
    assert run(installed, tmp_path, "lora", "--version") == f"lora {PROJECT['version']}\n"
    assert run(installed, tmp_path, "lora-tui", "--version") == f"lora-tui {PROJECT['version']}\n"
    place = run(
        installed,
        tmp_path,
        str(installed[0] / "python"),
        "-c",
        "import cli, pipeline; print(pipeline.__path__[0])",
    )
    assert "site-packages" in place and str(ROOT) not in place
    assert "demo: added" in run(installed, tmp_path, "lora", "new", "demo")
    assert (tmp_path / "demo/data/pretrain.de.txt").exists()

    toy_checkpoint(tmp_path / "toy", max_position_embeddings=256)
    rows = [{"prompt": f"Who has key {n}?", "completion": f"Marta has key {n}."} for n in range(12)]
    write_jsonl(tmp_path / "keys.jsonl", rows)
    options = ("--base", "toy", "--data", "keys.jsonl", "--out", "run", "--set", "epochs=1")
    said = run(installed, tmp_path, "lora", "train", *options)
    assert "lora: answers to held-out examples: " in said
    assert re.search(r"Next: cd run; lora report .*\n +\S*dvc repro +after an edit", said)
    assert (tmp_path / "run/artifacts/lora_adapter/adapter_model.safetensors").exists()
    assert "lora" in run(installed, tmp_path / "run", "lora", "report")
    run(
        installed,
        tmp_path / "run",
        "lora",
        "export",
        "artifacts/lora_adapter",
        "--format",
        "peft",
        "--out",
        "out",
    )
    assert "qwen3-8b" in run(installed, tmp_path, "lora", "calc", "--model", "qwen3-8b").lower()
    doctor = json.loads(run(installed, tmp_path, "lora", "doctor", "--json"))
    assert doctor["lora-workbench"] == PROJECT["version"]


@needs_tmux
def test_without_a_clone_the_demo_opens_and_its_palette_finds_the_pages(
    installed: tuple[Path, Mapping[str, str]], tmp_path: Path
) -> None:
    screen = Terminal(f"lora-{uuid.uuid4().hex[:8]}")
    program = f"env -u COLUMNS -u LINES -u PYTHONPATH {installed[0] / 'lora-tui'} --demo"
    try:
        screen.open(
            f"{program}; echo ended; sleep 3600",
            tmp_path,
            (120, 40),
            {**installed[1], "LANG": "C.UTF-8"},
        )
        screen.see("1 Pipe", "expand_vocab", seconds=120)
        screen.keys("C-p")
        screen.type("docs: install")
        screen.see("Docs: Install", seconds=60)
    finally:
        screen.close()
