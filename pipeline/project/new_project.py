"""Creates a project folder: the params file, the data files that it names, and DVC's files.

`dvc_yaml.py` renders dvc.yaml from the stage graph and the params, so that all three say the same.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import digest, is_temporary, write_file, writing
from pipeline.files.base_model import resolve
from pipeline.files.home import expand
from pipeline.project import provenance
from pipeline.project.dvc_yaml import (
    CODE_FILE,
    HEADER,
    is_current,
    render_code_yaml,
    render_dvc_yaml,
    watched_files,
)
from pipeline.project.params import edit
from pipeline.project.params.load import TOP_LEVEL, parse, read_text
from pipeline.project.stage_graph import Project, StageGraph

PARAMS = "params.yaml"
BLOCK = 2**20  # bytes that are copied at a time
HERE = provenance.ROOT  # a clone of the repository, or the folder of the installed packages
DEFAULTS = HERE if (HERE / PARAMS).is_file() else HERE / "lora_workbench_defaults"
IGNORED_BY_DVC = "# What no stage reads.\nruns\n.lora-cache\n__pycache__\n"
# Of the artifacts git has the metrics alone: `dvc exp show` reads those of an experiment from its
# commit.
IGNORED_BY_GIT = """\
/artifacts/*
!/artifacts/evaluation/
/artifacts/evaluation/*
!/artifacts/evaluation/metrics.json
/runs/
/.lora-cache/
/dvc_plots/
*.gguf
"""
IGNORED_IN_DVC = "/config.local\n/tmp\n/cache\n"  # as `dvc init` writes it where there is git
# no_scm: DVC must not look for the git repository that a project may lie in. type: links, or a real
# model takes its space twice, in artifacts/ and in DVC's cache.
DVC_CONFIG = """\
[core]
    no_scm = True
    analytics = false
    check_update = false
    autostage = false
[cache]
    type = "reflink,hardlink,copy"
"""
# what a project has before its params file: the base, fetched data
UNFINISHED = {"artifacts", "runs", ".lora-cache", "data"}


def create(
    folder: Path,
    graph: StageGraph,
    params: Path | None = None,
    base: str | None = None,
    methods: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Make `folder` a project, or add missing files. Existing files are not overwritten.

    Returns the files that it wrote, and notes on existing ones that it would have written
    differently.

    `params`: the file to start from; the default is the program's. `base`: the model to write into
    it, a path relative to the current folder. `methods`: fine-tuning methods instead of the file's.
    Raises UserError before anything is written.
    """
    refuse_folder(folder)
    path = folder / PARAMS
    exists = path.is_file()
    if methods is not None and (params or exists):
        raise UserError(
            "--methods is for a new project; here the sections of the params file determine the "
            "methods."
        )

    # All that can be wrong is found before the first file is written.
    source = (params or DEFAULTS / PARAMS).resolve()
    # given relative to where we are, not to the project
    if base and (model := resolve(base, Path.cwd())).is_local:
        base = os.path.relpath(model.path.resolve(), folder.resolve())
    would_write = ""
    if params or not exists:
        would_write = _new_params(folder, graph, source, base, methods)
    text = _existing_params(folder, graph, base) if exists else would_write
    project = _project(folder, graph, text, path)
    data = _data_sources(project, source.parent)
    added = copy_data(folder, data) + write_project(project, text)

    # What was there may be the user's own work: where it differs, it is named and not replaced.
    different = {}
    if params:
        different = {
            name: original
            for name, original in data.items()
            if digest(folder / name) != digest(original)
        }
    if would_write and text != would_write:
        different[PARAMS] = source
    if not _same_yaml(folder / "dvc.yaml", render_dvc_yaml(project)):
        different["dvc.yaml"] = path
    notes = [
        f"{folder / name} is kept, although {other} would give a different one. To replace it, "
        "remove it and run this again."
        for name, other in different.items()
    ]
    return added, notes


def _same_yaml(path: Path, text: str) -> bool:
    from pipeline.files import strict_yaml

    try:
        return bool(strict_yaml.load(path.read_text(encoding="utf-8")) == strict_yaml.load(text))
    except ValueError:
        return False


def refuse_folder(folder: Path) -> None:
    """Raises UserError for a folder that cannot become a project; an unfinished project can."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name another folder.")
    if folder.resolve() == HERE:
        raise UserError(
            f"{folder} is the program's own repository, which is already a project. Name another "
            "folder."
        )
    paths = folder.iterdir() if folder.is_dir() else ()
    # a killed `lora new` may have left temporary files
    names = {path.name for path in paths if not is_temporary(path.name)}
    if names - UNFINISHED and not names & {PARAMS, ".dvc"}:
        raise UserError(
            f"{folder} has files, but no {PARAMS}: it is not a project. Name a new folder."
        )


def copy_data(folder: Path, data: Mapping[str, Path]) -> list[str]:
    """Copy the data files (name → original) that the folder lacks. Returns their names."""
    missing = [name for name in data if not (folder / name).exists()]
    for name in missing:
        original, target = data[name], folder / name
        # Whole or not at all: half a file, left by a kill, would be taken for the user's own the
        # next time.
        target.parent.mkdir(parents=True, exist_ok=True)
        if original.is_dir():  # a data set of save_to_disk
            with writing(target) as out:
                shutil.copytree(original, out, dirs_exist_ok=True)
        else:
            with original.open("rb") as file:
                write_file(target, iter(lambda: file.read(BLOCK), b""))
    return missing


def write_project(project: Project, text: str) -> list[str]:
    """Write the params file's `text` and DVC's files where they are missing. Returns their names.

    The params file comes last: where it is, a project is complete.
    """
    folder = project.root
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        PARAMS: text,
        ".dvcignore": IGNORED_BY_DVC,
        ".gitignore": IGNORED_BY_GIT,
        "dvc.yaml": HEADER + render_dvc_yaml(project),
        CODE_FILE: render_code_yaml(project),
    }
    added = [name for name in files if not (folder / name).exists()]
    # the only file that is renewed
    if CODE_FILE not in added and not is_current(folder / CODE_FILE, files[CODE_FILE]):
        added.append(CODE_FILE)
    has_dvc = (folder / ".dvc").is_dir()
    if not has_dvc:
        _init_dvc(folder)
    for name in reversed(added):
        write_file(folder / name, files[name])
    return added if has_dvc else [*added, ".dvc"]


def _project(folder: Path, graph: StageGraph, text: str, path: Path) -> Project:
    """The project in `folder` with the params `text`, which `path` has. Raises UserError."""
    return Project.of(folder / PARAMS, parse(text, path, graph.sections), graph)


def _new_params(
    folder: Path, graph: StageGraph, source: Path, base: str | None, methods: Sequence[str] | None
) -> str:
    """The text of the new params file. Raises UserError.

    It is `source` with the base and the methods, the sections that its stages need, and every key
    that dvc.yaml refers to.
    """
    text = read_text(source)
    params = parse(text, source, graph.sections)
    if base:  # first, as a new section depends on it
        text = edit.set_values(text, {"base": base}, params.as_written)
    if methods is not None:
        text = _select_methods(text, graph, methods)
    text = _add_needed_sections(text, graph)
    project = _project(folder, graph, text, source)
    return edit.set_values(text, _missing_keys(project), project.params.as_written)


def _select_methods(text: str, graph: StageGraph, methods: Sequence[str]) -> str:
    """The text with the sections of exactly these methods; new sections have their defaults."""
    sections = {stage.method: stage.name for stage in graph.stages.values() if stage.look}
    if unknown := [name for name in methods if name not in sections]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(sections)}.")
    params = parse(text, Path(PARAMS), graph.sections)
    selected = list(dict.fromkeys(sections[method] for method in methods))

    removed = params.written.intersection(sections.values()).difference(selected)
    if "lora" not in methods:
        removed |= {"merge"}  # which needs LoRA's adapter
    for name in removed:
        text = edit.remove_section(text, params.as_written(name))
    added = [name for name in selected if name not in params.written]
    return _append_sections(text, graph, added, params.origin.imports)


def _append_sections(text: str, graph: StageGraph, names: Sequence[str], imports: bool) -> str:
    """The text with sections added, which have their defaults."""
    for name in names:
        section = edit.section_text(name, graph.sections[name], imports)
        text = f"{text.rstrip()}\n\n{section}"
    return text


def _add_needed_sections(text: str, graph: StageGraph) -> str:
    """The text with the sections that its stages need, and those that these need in turn."""
    while True:
        project = Project(Path(), parse(text, Path(PARAMS), graph.sections), graph)
        imports = project.params.origin.imports
        needs = set[str]()
        for stage in project.stages.values():
            needs.update(project.needs(stage), [stage.section], stage.extra_sections)
            if "expand_vocab" in stage.needs and not imports:
                needs.add("expand_vocab")  # MiniGPT knows the words of its own data alone
        needs -= project.params.written
        missing = [
            stage.name
            for stage in graph.stages.values()
            if stage.name in needs and not stage.is_measurement
        ]
        if not missing:
            return text
        text = _append_sections(text, graph, missing, imports)


def _existing_params(folder: Path, graph: StageGraph, base: str | None) -> str:
    """The text of the folder's params file.

    Raises UserError if its base is another, or if it lacks keys that dvc.yaml refers to.
    """
    path = folder / PARAMS
    text = read_text(path)
    project = _project(folder, graph, text, path)
    if base and base != project.params.origin.base:
        raise UserError(
            f"base is {project.params.origin.base} in {path}, not {base}. Edit it there."
        )
    if missing := _missing_keys(project):
        raise UserError(
            f"{path} lacks {', '.join(missing)}, to which dvc.yaml refers. Add it there."
        )
    return text


def _missing_keys(project: Project) -> dict[str, Any]:
    """`section.key` → value, for the keys that dvc.yaml refers to and the params file lacks."""
    params = project.params
    missing: dict[str, Any] = {
        key: getattr(params.section(section), key)
        for key, section in TOP_LEVEL.items()
        if section in params.written and key not in params.sources
    }
    for stage in project.stages.values():
        for file_key in watched_files(project, stage):
            name = file_key.partition("[")[0]
            if name in TOP_LEVEL:
                continue
            section, key = name.split(".") if "." in name else (stage.section, name)
            if section in params.written and f"{section}.{key}" not in params.sources:
                missing[f"{section}.{key}"] = project.setting(stage, name)
    return missing


def _data_sources(project: Project, source_folder: Path) -> dict[str, Path]:
    """Name of each data file → the file to copy it from. Raises UserError.

    The original lies beside the source params, or comes with the program where a stage of an
    extension names a `data_folder`.
    """
    sources: dict[str, Path] = {}
    for stage in project.stages.values():
        packages = (Path(stage.data_folder), DEFAULTS) if stage.data_folder else ()
        for key, name in watched_files(project, stage).items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if key != "base" and inside and (source_folder / name).exists():
                sources[name] = source_folder / name
            elif (project.root / expand(name)).exists() or key == "base":
                continue
            elif inside and (
                packaged := [folder / name for folder in packages if (folder / name).is_file()]
            ):
                sources[name] = packaged[0]
            else:
                raise UserError(
                    f"{stage.name}.{key} names {name}, which is not a file in {source_folder}. "
                    "Put it there, or edit the params file."
                )
    return sources


def _init_dvc(folder: Path) -> None:
    """What `dvc init --no-scm` makes, with our config, even inside another repository.

    Raises UserError.
    """
    # with --quiet it does not say why it failed
    command = [sys.executable, "-m", "dvc", "init", "--no-scm"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    with writing(folder / ".dvc") as out:
        done = subprocess.run(
            command, cwd=out, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.splitlines()
            errors = [line for line in lines if line.startswith("ERROR: ")]
            reason = errors[0].removeprefix("ERROR: ") if errors else " ".join(lines)
            raise UserError(
                f"`dvc init` failed in {folder}: {reason}. Try `dvc init --no-scm` there."
            )
        (out / ".dvcignore").unlink(missing_ok=True)
        for path in (out / ".dvc").iterdir():
            path.rename(out / path.name)
        (out / ".dvc").rmdir()
        (out / "config").write_text(DVC_CONFIG, encoding="utf-8")
        (out / ".gitignore").write_text(IGNORED_IN_DVC, encoding="utf-8")
