"""A project in a folder of its own: params, the data that they name, and what DVC needs to run it there."""

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
from pipeline.project.params.sections import SECTIONS, TOP_LEVEL, parse
from pipeline.project.stage_graph import Project, Stage, StageGraph

PARAMS = "params.yaml"
HERE = provenance.ROOT  # a clone of the repository, or where the packages are installed
DEFAULTS = HERE if (HERE / PARAMS).is_file() else HERE / "lora_workbench_defaults"
DOCUMENT = DEFAULTS / "document"  # the document's own data, which comes with the program
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
# What a pretrained model wants otherwise than MiniGPT: whole examples, few and small steps, embeddings left alone.
PRETRAINED: dict[str, Any] = {
    "finetune_full.learning_rate": 2e-5,
    "finetune_freeze.learning_rate": 1e-4,
    "finetune_freeze.train_embeddings": False,
    "finetune_lora.learning_rate": 2e-4,
    "finetune_lora.precision": "bf16",
    "finetune_lora.rank": 8,
    "finetune_lora.alpha": 16.0,
    "finetune_lora.target_modules": ["attention"],  # whatever the family calls them
    "finetune_lora.train_embeddings": "new_rows",
    "finetune_prefix.learning_rate": 1e-2,
    "finetune_prompt.learning_rate": 3e-2,
    "study_knowledge_correction.data": "",  # a fact of one's own, where there is one
    "merge.max_logit_difference": 1.0,  # a 16-bit base rounds what is added to it; the certificate says how far
}
METHODS = ("full", "freeze", "lora", "prefix", "prompt", "sweep", "scratch")
PRETRAINED |= {  # its shape with random weights: that the stage runs, not that it learns
    f"train_from_scratch.{key}": value
    for key, value in {"epochs": 1, "window": 0, "schedule": "linear", "max_grad_norm": 1.0}.items()
}
PRETRAINED |= {
    f"finetune_{method}.{key}": value
    for method in ("prefix", "prompt")
    for key, value in {"precision": "bf16", "virtual_tokens": 20}.items()
}
PRETRAINED |= {
    f"finetune_{method}.{key}": value
    for method in ("full", "freeze", "lora", "prefix", "prompt")
    for key, value in {"epochs": 3, "window": 0, "schedule": "linear", "max_grad_norm": 1.0}.items()
}


@dataclass(frozen=True)
class Made:
    """What `create` did: files that it wrote, and what it left as it was but would have written otherwise."""

    added: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def create(
    folder: Path,
    graph: StageGraph,
    params: Path | None = None,
    base: str | None = None,
    methods: Sequence[str] | None = None,
) -> Made:
    """Make `folder` a project, or add what it lacks. Nothing that is there is overwritten.

    `params` is the file to begin with, default the program's own, changed to what a pretrained `base` needs; `base`
    goes into its base, a path being relative to the caller's folder. `methods`: the fine-tuning methods that
    it gets instead of the file's. Raises UserError before anything is written.
    """
    _refuse_other_folder(folder)
    source = (params or DEFAULTS / PARAMS).resolve()
    if methods is not None:
        _check_methods(methods, folder, params)
    base = _seen_from(folder, base) if base else None
    standing = (folder / PARAMS).is_file()
    given = {"base": base} if base else {}
    wanted = PRETRAINED if base and base != MINIGPT and not params else {}
    fresh = _fresh(folder, graph, source, given, wanted, methods) if params or not standing else ""
    text = _standing(folder, graph, base) if standing else fresh
    project = _project(folder, graph, text, folder / PARAMS)
    data = _data(project, source.parent)
    rendered = dvc_yaml.HEADER + dvc_yaml.render(project)
    made = Made()
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in data.items():
        _copy(folder / name, path, name, made)
    for name, content in ((PARAMS, text), (".dvcignore", IGNORED_BY_DVC), (".gitignore", IGNORED_BY_GIT)):
        _write(folder, name, content, made)
    _write(folder, "dvc.yaml", rendered, made)
    _renew(folder, dvc_yaml.CODE_FILE, dvc_yaml.code_file(project), made)
    _begin_dvc(folder, made)
    if params:
        other = [name for name, path in data.items() if (folder / name).read_bytes() != path.read_bytes()]
        made.notes.extend(_kept(folder / name, data[name]) for name in other)
    if fresh and text != fresh:
        made.notes.append(_kept(folder / PARAMS, source))
    if _parsed(folder / "dvc.yaml") != yaml.safe_load(rendered):
        made.notes.append(_kept(folder / "dvc.yaml", folder / PARAMS))
    return made


def _kept(path: Path, source: Path) -> str:
    return f"{path} is kept, though {source} would give another. Remove it and run this again to have that."


def _refuse_other_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name another folder.")
    if folder.resolve() == HERE:
        raise UserError(f"{folder} is the program's own repository, a project already. Name another folder.")
    known = (folder / PARAMS).is_file() or (folder / ".dvc").is_dir()
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise UserError(f"{folder} holds files, but no {PARAMS}: it is not a project. Name a new folder.")


def _check_methods(methods: Sequence[str], folder: Path, params: Path | None) -> None:
    if params or (folder / PARAMS).is_file():
        raise UserError("--methods is for a new project: the sections of a params file say which methods it has.")
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(METHODS)}.")


def _project(folder: Path, graph: StageGraph, text: str, path: Path) -> Project:
    """The project that `folder` is with this params file. Raises UserError."""
    return Project.of(folder / PARAMS, parse(text, path, (), graph.sections), graph)


def _fresh(
    folder: Path,
    graph: StageGraph,
    source: Path,
    given: Mapping[str, Any],
    wanted: Mapping[str, Any],
    methods: Sequence[str] | None,
) -> str:
    """The params file's text as it is to be written, with these values and every key that dvc.yaml names.

    Of `wanted` those of the sections that it has.
    """
    text = _read(source)
    parse(text, source, (), graph.sections)
    if methods is not None:
        text = _with_methods(text, graph, methods)
    text = _with_needs(text, graph)
    written = parse(text, source, (), graph.sections).written
    text = edit.changed(text, {**given, **{k: v for k, v in wanted.items() if k.partition(".")[0] in written}})
    return edit.changed(text, _missing(text, _project(folder, graph, text, source)))


def _with_methods(text: str, graph: StageGraph, methods: Sequence[str]) -> str:
    """The file's text with the sections of these methods alone, those that it lacks with every default."""
    sections = {method: "train_from_scratch" if method == "scratch" else f"finetune_{method}" for method in METHODS}
    written = parse(text, Path(PARAMS), (), graph.sections).written
    for name in [name for method, name in sections.items() if method not in methods and name in written]:
        text = edit.without(text, name)
    if "lora" not in methods:  # what is merged is an adapter of LoRA
        text = edit.without(text, "merge")
    for name in [sections[method] for method in methods if sections[method] not in written]:
        text = f"{text.rstrip()}\n\n{edit.section_text(name, SECTIONS[name]())}"
    return text


def _with_needs(text: str, graph: StageGraph) -> str:
    """The file's text with defaults for each section that its stages need and it lacks."""
    project = Project(Path(), parse(text, Path(PARAMS), (), graph.sections), graph)
    stages = project.stages.values()
    needs = {need for stage in stages for need in (*project.needs(stage), stage.section, *stage.extra_sections)}
    lacks = [name for name in graph.stages if name in needs - project.params.written and name in SECTIONS]
    if not lacks:
        return text
    added = [edit.section_text(name, SECTIONS[name]()) for name in lacks]
    return _with_needs("\n\n".join([text.rstrip(), *added]), graph)


def _standing(folder: Path, graph: StageGraph, base: str | None) -> str:
    """The text of the params file that is there. Raises UserError if it is not one for what was asked."""
    path = folder / PARAMS
    text = _read(path)
    project = _project(folder, graph, text, path)
    if base and base != project.params.pretrain.base:
        raise UserError(f"base is {project.params.pretrain.base} in {path}, not {base}. Edit it there.")
    missing = _missing(text, project)
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, which dvc.yaml names. Write it there.")
    return text


def _missing(text: str, project: Project) -> dict[str, Any]:
    """`section.key` → default value of all that DVC would look for in vain."""
    tree = yaml.safe_load(text)
    found: dict[str, Any] = {}
    for stage in project.stages.values():
        for place in dvc_yaml.files(project, stage):
            name = place.partition("[")[0]
            if name in TOP_LEVEL:
                continue
            section, key = name.split(".") if "." in name else (stage.section, name)
            if section in project.params.written and key not in (tree.get(section) or {}):
                found[f"{section}.{key}"] = project.setting(stage, name)
    return found


def _seen_from(folder: Path, base: str) -> str:
    """A base that its user named from the current folder, as the project names it. Raises UserError."""
    source = resolve(base, Path.cwd())
    return os.path.relpath(source.path.resolve(), folder.resolve()) if source.is_local else base


def _data(project: Project, beside: Path) -> dict[str, Path]:
    """Name → file beside the params that it is copied from, of each data file. Raises UserError."""
    found: dict[str, Path] = {}
    for stage in project.stages.values():
        for place, name in dvc_yaml.files(project, stage).items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if place != "base" and inside and (beside / name).is_file():
                found[name] = beside / name
            elif inside and (ours := _of_the_program(stage, name)) and not (project.root / name).is_file():
                found[name] = ours
            elif place != "base" and not (project.root / name).is_file():
                raise UserError(
                    f"{stage.name}.{place} names {name}, which is not a file in {beside}. "
                    "Put it there, or edit the params file."
                )
    return found


def _of_the_program(stage: Stage, name: str) -> Path | None:
    """A data file of the document's that comes with the program."""
    folders = (DOCUMENT, DEFAULTS) if stage.is_measurement else ()
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _copy(path: Path, source: Path, name: str, made: Made) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        made.added.append(name)


def _write(folder: Path, name: str, text: str, made: Made) -> None:
    if not (folder / name).exists():
        (folder / name).write_text(text, encoding="utf-8")
        made.added.append(name)


def _parsed(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        return None


def _renew(folder: Path, name: str, text: str, made: Made) -> None:
    """Write a file that is the program's own."""
    path = folder / name
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        made.added.append(name)


def _begin_dvc(folder: Path, made: Made) -> None:
    """DVC in a folder of its own, whatever repository it lies in. Raises UserError."""
    if (folder / ".dvc").is_dir():
        return
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"DVC cannot begin in {folder}: {' '.join(done.stderr.split())}. Try `dvc init --no-scm` there."
        )
    (folder / ".dvc/config").write_text(DVC_CONFIG, encoding="utf-8")
    made.added.append(".dvc")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: {reason}. Name a params file with --params.") from None
