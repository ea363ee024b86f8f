"""Creates a project folder: the params file, the data files that it names, and DVC's files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.files.base_model import MINIGPT, resolve
from pipeline.project import dvc_yaml, provenance
from pipeline.project.params import edit
from pipeline.project.params.load import TOP_LEVEL, TRAINING, parse, read_text
from pipeline.project.stage_graph import Project, StageGraph

PARAMS = "params.yaml"
HERE = provenance.ROOT  # a clone of the repository, or the folder of the installed packages
DEFAULTS = HERE if (HERE / PARAMS).is_file() else HERE / "lora_workbench_defaults"
DOCUMENT = DEFAULTS / "document"  # the document's data, packaged with the program
IGNORED_BY_DVC = "# What no stage reads.\nruns\n.lora-cache\n__pycache__\n"
IGNORED_BY_GIT = "/artifacts/\n/runs/\n/.lora-cache/\n/dvc_plots/\n*.gguf\n"
DVC_CONFIG = """\
[core]
    no_scm = True
    analytics = false
    check_update = false
    autostage = false
[cache]
    type = "reflink,hardlink,copy"
"""
# Defaults on a pretrained model, unlike MiniGPT's: whole examples, few epochs. Rates and sizes are the methods' own.
PRETRAINED: Mapping[str, Any] = {
    **{"training.epochs": 3, "training.window": 0, "training.schedule": "linear", "training.max_grad_norm": 1.0},
    "study_knowledge_correction.data": "",  # none by default: the user has to state a fact
    "merge.max_logit_difference": 1.0,  # merging into a 16-bit base rounds; the certificate has the difference
}


@dataclass(frozen=True)
class CreateResult:
    """The files that `create` wrote, and notes on existing files that it would have written differently."""

    added: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def create(
    folder: Path,
    graph: StageGraph,
    params: Path | None = None,
    base: str | None = None,
    methods: Sequence[str] | None = None,
) -> CreateResult:
    """Make `folder` a project, or add missing files. Existing files are not overwritten.

    `params`: the file to start from; the default is the program's, adapted to a pretrained `base`. `base`: the model to
    write into it, a path relative to the current folder. `methods`: fine-tuning methods instead of the file's. Raises
    UserError before anything is written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name another folder.")
    if folder.resolve() == HERE:
        raise UserError(f"{folder} is the program's own repository, which is already a project. Name another folder.")
    exists = (folder / PARAMS).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not exists and not (folder / ".dvc").is_dir():
        raise UserError(f"{folder} has files, but no {PARAMS}: it is not a project. Name a new folder.")
    if methods is not None and (params or exists):
        raise UserError("--methods is for a new project; here the sections of the params file determine the methods.")
    source = (params or DEFAULTS / PARAMS).resolve()
    if base and (model := resolve(base, Path.cwd())).is_local:  # given relative to where we are, not to the project
        base = os.path.relpath(model.path.resolve(), folder.resolve())
    new_text = "" if exists and not params else _new_params(folder, graph, source, base, params is None, methods)
    text = _existing_params(folder, graph, base) if exists else new_text
    project = _project(folder, graph, text, folder / PARAMS)
    data = _data_sources(project, source.parent)
    rendered = dvc_yaml.HEADER + dvc_yaml.render(project)
    result = CreateResult()
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in data.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            result.added.append(name)
    files = {PARAMS: text, ".dvcignore": IGNORED_BY_DVC, ".gitignore": IGNORED_BY_GIT, "dvc.yaml": rendered}
    for name, content in {**files, dvc_yaml.CODE_FILE: dvc_yaml.code_file(project)}.items():
        path = folder / name
        generated = name == dvc_yaml.CODE_FILE  # renewed where it differs
        if not path.exists() or (generated and path.read_text(encoding="utf-8") != content):
            path.write_text(content, encoding="utf-8")
            result.added.append(name)
    if not (folder / ".dvc").is_dir():
        _init_dvc(folder)
        result.added.append(".dvc")
    kept = {}
    if params:
        kept = {name: path for name, path in data.items() if (folder / name).read_bytes() != path.read_bytes()}
    if new_text and text != new_text:
        kept[PARAMS] = source
    try:
        same = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8")) == yaml.safe_load(rendered)
    except (yaml.YAMLError, ValueError):
        same = False
    if not same:
        kept["dvc.yaml"] = folder / PARAMS
    result.notes.extend(
        f"{folder / name} is kept, although {other} would give a different one. To replace it, remove it and run this "
        "again."
        for name, other in kept.items()
    )
    return result


def _project(folder: Path, graph: StageGraph, text: str, path: Path) -> Project:
    """The project in `folder` with this params text. Raises UserError."""
    return Project.of(folder / PARAMS, parse(text, path, (), graph.sections), graph)


def _new_params(
    folder: Path, graph: StageGraph, source: Path, base: str | None, adapt: bool, methods: Sequence[str] | None
) -> str:
    """The text of the new params file: `source` with the base and the methods, the sections that its stages need, and
    every key that dvc.yaml refers to.

    `adapt`: whether its values become those for a pretrained base. Raises UserError.
    """
    text = read_text(source)
    parse(text, source, (), graph.sections)
    if methods is not None:
        text = _select_methods(text, graph, methods)
    text = _add_needed_sections(text, graph)
    values: dict[str, Any] = {"base": base} if base else {}
    if adapt and base and base != MINIGPT:
        own = {f"{s.name}.{key}": value for s in graph.stages.values() for key, value in s.pretrained.items()}
        sections = {TRAINING, *parse(text, source, (), graph.sections).written}
        values |= {key: value for key, value in {**PRETRAINED, **own}.items() if key.partition(".")[0] in sections}
    text = edit.set_values(text, values)
    return edit.set_values(text, _missing_keys(text, _project(folder, graph, text, source)))


def _select_methods(text: str, graph: StageGraph, methods: Sequence[str]) -> str:
    """The text with the sections of exactly these methods; missing sections are added with their defaults."""
    sections = {stage.method: stage.name for stage in graph.stages.values() if stage.look}
    if unknown := [name for name in methods if name not in sections]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(sections)}.")
    written = parse(text, Path(PARAMS), (), graph.sections).written
    removed = {name for method, name in sections.items() if method not in methods}
    for name in (removed & written) | ({"merge"} if "lora" not in methods else set()):  # merge needs the LoRA adapter
        text = edit.remove_section(text, name)
    for name in [sections[method] for method in methods if sections[method] not in written]:
        text = f"{text.rstrip()}\n\n{edit.section_text(name, graph.sections[name])}"
    return text


def _add_needed_sections(text: str, graph: StageGraph) -> str:
    """The text with default sections added for stages that its own stages need, and for those that these need."""
    while True:
        project = Project(Path(), parse(text, Path(PARAMS), (), graph.sections), graph)
        needs = {need for s in project.stages.values() for need in (*project.needs(s), s.section, *s.extra_sections)}
        missing = [s.name for s in graph.stages.values() if s.name in needs - project.params.written]
        missing = [name for name in missing if not graph.stages[name].is_measurement]
        if not missing:
            return text
        text = "\n\n".join([text.rstrip(), *(edit.section_text(name, graph.sections[name]) for name in missing)])


def _existing_params(folder: Path, graph: StageGraph, base: str | None) -> str:
    """The text of the existing params file. Raises UserError if its base is another or it lacks keys."""
    path = folder / PARAMS
    text = read_text(path)
    project = _project(folder, graph, text, path)
    if base and base != project.params.pretrain.base:
        raise UserError(f"base is {project.params.pretrain.base} in {path}, not {base}. Edit it there.")
    if missing := _missing_keys(text, project):
        raise UserError(f"{path} lacks {', '.join(missing)}, to which dvc.yaml refers. Add it there.")
    return text


def _missing_keys(text: str, project: Project) -> dict[str, Any]:
    """`section.key` → value, for the keys that dvc.yaml refers to and the text lacks."""
    tree = yaml.safe_load(text)
    missing: dict[str, Any] = {
        key: getattr(project.params.section(section), key)
        for key, section in TOP_LEVEL.items()
        if section in project.params.written and key not in tree
    }
    for stage in project.stages.values():
        for file_key in dvc_yaml.files(project, stage):
            name = file_key.partition("[")[0]
            if name in TOP_LEVEL:
                continue
            section, key = name.split(".") if "." in name else (stage.section, name)
            if section in project.params.written and key not in (tree.get(section) or {}):
                missing[f"{section}.{key}"] = project.setting(stage, name)
    return missing


def _data_sources(project: Project, source_folder: Path) -> dict[str, Path]:
    """Name of each data file → the file to copy it from: beside the source params, or packaged. Raises UserError."""
    sources: dict[str, Path] = {}
    for stage in project.stages.values():
        packages = (DOCUMENT, DEFAULTS) if stage.is_measurement else ()
        for key, name in dvc_yaml.files(project, stage).items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if key != "base" and inside and (source_folder / name).is_file():
                sources[name] = source_folder / name
            elif (project.root / name).is_file() or key == "base":
                continue
            elif inside and (packaged := [folder / name for folder in packages if (folder / name).is_file()]):
                sources[name] = packaged[0]
            else:
                raise UserError(
                    f"{stage.name}.{key} names {name}, which is not a file in {source_folder}. "
                    "Put it there, or edit the params file."
                )
    return sources


def _init_dvc(folder: Path) -> None:
    """Run `dvc init --no-scm` in the folder, even inside another repository. Raises UserError."""
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"`dvc init` failed in {folder}: {' '.join(done.stderr.split())}. Try `dvc init --no-scm` there."
        )
    (folder / ".dvc/config").write_text(DVC_CONFIG, encoding="utf-8")
