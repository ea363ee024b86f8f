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
from pipeline.project.params.load import TOP_LEVEL, TRAINING, parse
from pipeline.project.stage_graph import Project, Stage, StageGraph

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
    _check_folder(folder)
    source = (params or DEFAULTS / PARAMS).resolve()
    if methods is not None:
        _check_methods(methods, graph, folder, params)
    base = _base_relative_to(folder, base) if base else None
    exists = (folder / PARAMS).is_file()
    required = {"base": base} if base else {}
    defaults = _pretrained(graph) if base and base != MINIGPT and not params else {}
    new_text = _render_params(folder, graph, source, required, defaults, methods) if params or not exists else ""
    text = _read_existing(folder, graph, base) if exists else new_text
    project = _project(folder, graph, text, folder / PARAMS)
    data = _data_sources(project, source.parent)
    rendered = dvc_yaml.HEADER + dvc_yaml.render(project)
    result = CreateResult()
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in data.items():
        _copy(folder / name, path, name, result)
    for name, content in ((PARAMS, text), (".dvcignore", IGNORED_BY_DVC), (".gitignore", IGNORED_BY_GIT)):
        _write(folder, name, content, result)
    _write(folder, "dvc.yaml", rendered, result)
    _write_generated(folder, dvc_yaml.CODE_FILE, dvc_yaml.code_file(project), result)
    _init_dvc(folder, result)
    if params:
        differing = [name for name, path in data.items() if (folder / name).read_bytes() != path.read_bytes()]
        result.notes.extend(_kept_note(folder / name, data[name]) for name in differing)
    if new_text and text != new_text:
        result.notes.append(_kept_note(folder / PARAMS, source))
    if _load_yaml(folder / "dvc.yaml") != yaml.safe_load(rendered):
        result.notes.append(_kept_note(folder / "dvc.yaml", folder / PARAMS))
    return result


def _kept_note(path: Path, source: Path) -> str:
    return f"{path} is kept, although {source} would give a different one. To replace it, remove it and run this again."


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name another folder.")
    if folder.resolve() == HERE:
        raise UserError(f"{folder} is the program's own repository, which is already a project. Name another folder.")
    is_project = (folder / PARAMS).is_file() or (folder / ".dvc").is_dir()
    if folder.is_dir() and any(folder.iterdir()) and not is_project:
        raise UserError(f"{folder} has files, but no {PARAMS}: it is not a project. Name a new folder.")


def _methods(graph: StageGraph) -> dict[str, Stage]:
    """The fine-tuning methods by name, in the DAG's order."""
    return {stage.method: stage for stage in graph.stages.values() if stage.look}


def _check_methods(methods: Sequence[str], graph: StageGraph, folder: Path, params: Path | None) -> None:
    if params or (folder / PARAMS).is_file():
        raise UserError("--methods is for a new project; here the sections of the params file determine the methods.")
    if unknown := [name for name in methods if name not in _methods(graph)]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(_methods(graph))}.")


def _pretrained(graph: StageGraph) -> dict[str, Any]:
    """`section.key` → value on a pretrained base, for every method."""
    own = {f"{s.name}.{key}": value for s in graph.stages.values() for key, value in s.pretrained.items()}
    return {**PRETRAINED, **own}


def _project(folder: Path, graph: StageGraph, text: str, path: Path) -> Project:
    """The project in `folder` with this params text. Raises UserError."""
    return Project.of(folder / PARAMS, parse(text, path, (), graph.sections), graph)


def _render_params(
    folder: Path,
    graph: StageGraph,
    source: Path,
    required: Mapping[str, Any],
    defaults: Mapping[str, Any],
    methods: Sequence[str] | None,
) -> str:
    """The text of the new params file, with the `required` values and every key that dvc.yaml refers to.

    `defaults` apply to the sections that the file has.
    """
    text = _read(source)
    parse(text, source, (), graph.sections)
    if methods is not None:
        text = _select_methods(text, graph, methods)
    text = _add_needed_sections(text, graph)
    written = parse(text, source, (), graph.sections).written
    known = {TRAINING, *written}
    text = edit.set_values(text, {**required, **{k: v for k, v in defaults.items() if k.partition(".")[0] in known}})
    return edit.set_values(text, _missing_keys(text, _project(folder, graph, text, source)))


def _select_methods(text: str, graph: StageGraph, methods: Sequence[str]) -> str:
    """The text with the sections of exactly these methods; missing sections are added with their defaults."""
    sections = {method: stage.name for method, stage in _methods(graph).items()}
    written = parse(text, Path(PARAMS), (), graph.sections).written
    for name in [name for method, name in sections.items() if method not in methods and name in written]:
        text = edit.remove_section(text, name)
    if "lora" not in methods:  # merge needs the LoRA adapter
        text = edit.remove_section(text, "merge")
    for name in [sections[method] for method in methods if sections[method] not in written]:
        text = f"{text.rstrip()}\n\n{edit.section_text(name, graph.sections[name])}"
    return text


def _add_needed_sections(text: str, graph: StageGraph) -> str:
    """The text with default sections added for stages that its own stages need."""
    project = Project(Path(), parse(text, Path(PARAMS), (), graph.sections), graph)
    stages = project.stages.values()
    needs = {need for stage in stages for need in (*project.needs(stage), stage.section, *stage.extra_sections)}
    missing = [
        name for name, s in graph.stages.items() if name in needs - project.params.written and not s.is_measurement
    ]
    if not missing:
        return text
    added = [edit.section_text(name, graph.sections[name]) for name in missing]
    return _add_needed_sections("\n\n".join([text.rstrip(), *added]), graph)


def _read_existing(folder: Path, graph: StageGraph, base: str | None) -> str:
    """The text of the existing params file. Raises UserError if its base is another or it lacks keys."""
    path = folder / PARAMS
    text = _read(path)
    project = _project(folder, graph, text, path)
    if base and base != project.params.pretrain.base:
        raise UserError(f"base is {project.params.pretrain.base} in {path}, not {base}. Edit it there.")
    missing = _missing_keys(text, project)
    if missing:
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


def _base_relative_to(folder: Path, base: str) -> str:
    """A base given relative to the current folder, relative to the project's folder. Raises UserError."""
    source = resolve(base, Path.cwd())
    return os.path.relpath(source.path.resolve(), folder.resolve()) if source.is_local else base


def _data_sources(project: Project, source_folder: Path) -> dict[str, Path]:
    """Name of each data file → the file to copy it from: beside the source params, or packaged. Raises UserError."""
    sources: dict[str, Path] = {}
    for stage in project.stages.values():
        for key, name in dvc_yaml.files(project, stage).items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if key != "base" and inside and (source_folder / name).is_file():
                sources[name] = source_folder / name
            elif inside and (packaged := _packaged_file(stage, name)) and not (project.root / name).is_file():
                sources[name] = packaged
            elif key != "base" and not (project.root / name).is_file():
                raise UserError(
                    f"{stage.name}.{key} names {name}, which is not a file in {source_folder}. "
                    "Put it there, or edit the params file."
                )
    return sources


def _packaged_file(stage: Stage, name: str) -> Path | None:
    """The packaged data file for a stage of the document, if there is one."""
    folders = (DOCUMENT, DEFAULTS) if stage.is_measurement else ()
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _copy(path: Path, source: Path, name: str, result: CreateResult) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        result.added.append(name)


def _write(folder: Path, name: str, text: str, result: CreateResult) -> None:
    if not (folder / name).exists():
        (folder / name).write_text(text, encoding="utf-8")
        result.added.append(name)


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        return None


def _write_generated(folder: Path, name: str, text: str, result: CreateResult) -> None:
    """Write a generated file, overwriting an older version."""
    path = folder / name
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        result.added.append(name)


def _init_dvc(folder: Path, result: CreateResult) -> None:
    """Run `dvc init --no-scm` in the folder, even inside another repository. Raises UserError."""
    if (folder / ".dvc").is_dir():
        return
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"`dvc init` failed in {folder}: {' '.join(done.stderr.split())}. Try `dvc init --no-scm` there."
        )
    (folder / ".dvc/config").write_text(DVC_CONFIG, encoding="utf-8")
    result.added.append(".dvc")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: {reason}. Name a params file with --params.") from None
