"""Extensions as pip installs them: a package in a folder, and its entry points beside it."""

import importlib
import os
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cli.main import ADDED, COMMANDS
from pipeline import extensions
from pipeline.extensions import Registry
from pipeline.project import provenance
from pipeline.project.stage_graph import StageGraph
from pipeline.stages.registry import GRAPH

# Stages that measure: two of a group, and one that reads both. `{name}` and `{order}` are filled in.
PROBE = '''
"""Measures nothing, and writes what a stage that measures may write."""

from pathlib import Path
from typing import Annotated

from pipeline.project.params.schema import File, Seed, Section
from pipeline.project.stage_graph import Stage


class Probe(Section, frozen=True, kw_only=True):
    """A probe of {name}."""

    texts: Annotated[File, "what is probed"] = "data/probe.txt"
    seed: Annotated[Seed, "of the probe"] = 0


STAGE = Stage(
    "probe_{name}",
    __name__,
    "probes/{name}",
    "probe",
    "{name}",
    Probe,
    needs=("expand_vocab",),
    data=("texts",),
    data_folder=str(Path(__file__).parent),
    skipped=lambda params: "probes are of MiniGPT." if params.origin.imports else "",
    summary="Probe {name}",
    title="Probe of {name}",
    order={order},
    typed="probe {name}",
)


def run(job):
    """Its table, its picture, its report."""
    from PIL import Image

    yield from ()
    seed = job.project.section(job.stage).seed
    (job.out / "values.csv").write_text(f"word,share\\nhund,0.123456\\nseed,{{seed}}\\n", "utf-8")
    Image.new("RGB", (40, 30), "teal").save(job.out / "picture.png")
    (job.out / "report.md").write_text(
        "# Probe of {name}\\n\\nThe {name} is 0.12.\\n\\n![What was probed](picture.png)\\n", "utf-8"
    )
    return {{"section": "about {name}", "tables": {{"values": {{"title": "Shares of words"}}}}}}
'''
OVERVIEW = '''
"""Reads all probes."""

from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage


class Overview(Section, frozen=True, kw_only=True):
    """What all probes found."""


STAGE = Stage(
    "overview",
    __name__,
    "overview",
    "overview",
    "overview",
    Overview,
    needs=("evaluate", "probe_norm", "probe_size"),
    compares=True,
    summary="Sum up the probes",
    title="All probes",
    order=100,
)


def run(job):
    from PIL import Image

    yield from ()
    Image.new("RGB", (40, 30), "navy").save(job.out / "shares.png")
    (job.out / "shares.csv").write_text("probe,share\\nnorm,0.5\\n", "utf-8")
    (job.out / "report.md").write_text("# All probes\\n\\nThere are two.\\n", "utf-8")
    about = {"title": "Shares", "place": "Figure 1", "shows": "half", "files": ["shares.png", "shares.csv"]}
    return {"figures": {"shares": about}}
'''
PROBE_COMMANDS = '''
"""`lora probe NAME` and `lora overview`."""

from cli.options import DEFAULT_PARAMS, ParamsOption, SetOption, group
from cli.stages import run_stage

app = group()


@app.command()
def probe(name: str, params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None) -> None:
    """Probe the expanded base."""
    run_stage(f"probe_{name}", params, overrides, force=False)


@app.command()
def overview(params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None) -> None:
    """Sum up the probes."""
    run_stage("overview", params, overrides, force=False)
'''
PROBES = ("probe_norm", "probe_size", "overview")  # its stages
PROBES_PARAMS = "".join(f"\n{name}: {{}}\n" for name in PROBES)


def install(
    folder: Path,
    points: Mapping[str, str],
    files: Mapping[str, str] = {},
    distribution: str = "fake-1.0",
) -> Path:
    """Write a package's files and entry points into `folder`, which is to be on sys.path."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    lines = [f"[{extensions.GROUP}]", *(f"{name} = {module}" for name, module in points.items())]
    path = folder / f"{distribution}.dist-info/entry_points.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


def install_probes(folder: Path) -> Path:
    """An extension that measures: `PROBES`, whose params are `PROBES_PARAMS`."""
    files = {
        "probes/__init__.py": "",
        "probes/norm.py": PROBE.format(name="norm", order=1),
        "probes/size.py": PROBE.format(name="size", order=2),
        "probes/overview.py": OVERVIEW,
        "probes/commands.py": PROBE_COMMANDS,
        "probes/data/probe.txt": "der hund\n",
    }
    points = {
        "stage.probe_norm": "probes.norm",
        "stage.probe_size": "probes.size",
        "stage.overview": "probes.overview",
        "command.probe": "probes.commands",
        "command.overview": "probes.commands",
    }
    return install(folder, points, files, "probes-1.0")


def add_probes(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install that extension for this process, and give a project its sections and data."""
    folder = install_probes(root.parent / "installed")
    load(monkeypatch, folder)
    with (root / "params.yaml").open("a", encoding="utf-8") as params:
        params.write(PROBES_PARAMS)
    shutil.copy(folder / "probes/data/probe.txt", root / "data")
    return folder


def environment(*folders: Path) -> dict[str, str]:
    """Variables with which a process has the extensions in these folders."""
    return {extensions.OFF: "", "PYTHONPATH": os.pathsep.join(map(str, folders))}


def load(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """This process has the extensions in these folders, and no others, until the test ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(extensions.OFF, raising=False)
        patch.setattr(sys, "path", [str(folder) for folder in folders])
        points = extensions.entry_points.__wrapped__()
    monkeypatch.setattr(extensions, "entry_points", lambda: points)
    for name in ("_problems", "_registries"):
        monkeypatch.setattr(extensions, name, {})
    uncached = getattr(provenance.code_files, "__wrapped__", provenance.code_files)
    monkeypatch.setattr(provenance, "code_files", cache(uncached))
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] in extensions.packages()]:
        monkeypatch.delitem(sys.modules, name)
    # The registries that are read when a command or a screen asks: as they would be made now.
    graph = StageGraph(GRAPH.product)
    commands = Registry[Any]("command", taken=COMMANDS.keys(), check=ADDED._check)
    for registry, fresh in (
        (GRAPH._stages, graph._stages),
        (GRAPH._sections, graph._sections),
        (ADDED, commands),
    ):
        monkeypatch.setattr(registry, "__dict__", vars(fresh))
