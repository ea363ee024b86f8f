"""Creates a project folder: the params file, the data files that it names, and DVC's files.

dvc.yaml is rendered from the stage graph and the params, so that all three say the same.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.files.artifact import digest, is_temporary, write_file, writing
from pipeline.files.base_model import parse_source, resolve
from pipeline.files.home import expand
from pipeline.project import provenance
from pipeline.project.logs.run_log import LOSS
from pipeline.project.params import edit
from pipeline.project.params.load import TOP_LEVEL, TRAINING, key_path, parse, read_text
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Project, Stage, StageGraph

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
CODE_FILE = "code.yaml"
PARTS = (
    "finetuning_comparison.png",
    "manifest.json",
    "predictions.json",
    "report.md",
    "samples.json",
)  # the evaluation's, for DVC
METRICS = "metrics.json"  # the only part tracked by git
# of a project before its params: the base, fetched data
UNFINISHED = {"artifacts", "runs", ".lora-cache", "data"}
HEADER = """\
# What DVC must know of each stage, as `lora new` wrote it; it counts the files in the lists of params.yaml.
# To write it anew, remove it and run `lora new .` here.
"""
CODE_HEADER = (
    "# The code that each stage runs. `lora new .` renews this; `dvc repro` then runs what it "
    "concerns.\n"
)


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
    exists = (folder / PARAMS).is_file()
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
    new_text = "" if exists and not params else _new_params(folder, graph, source, base, methods)
    text = _existing_params(folder, graph, base) if exists else new_text
    project = _project(folder, graph, text, folder / PARAMS)
    data = _data_sources(project, source.parent)
    added = copy_data(folder, data) + write_project(project, text)
    # What was there may be the user's own work: where it differs, it is named and not replaced.
    kept = {}
    if params:
        kept = {name: path for name, path in data.items() if digest(folder / name) != digest(path)}
    if new_text and text != new_text:
        kept[PARAMS] = source
    try:
        same = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8")) == yaml.safe_load(
            render_dvc_yaml(project)
        )
    except (yaml.YAMLError, ValueError):
        same = False
    if not same:
        kept["dvc.yaml"] = folder / PARAMS
    return added, [
        f"{folder / name} is kept, although {other} would give a different one. To replace it, "
        "remove it and run this "
        "again."
        for name, other in kept.items()
    ]


def refuse_folder(folder: Path) -> None:
    """Raises UserError for a folder that is no project and cannot become one; an unfinished one
    can.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name another folder.")
    if folder.resolve() == HERE:
        raise UserError(
            f"{folder} is the program's own repository, which is already a project. Name another "
            "folder."
        )
    found = folder.iterdir() if folder.is_dir() else ()
    # a killed `lora new` may have left one
    files = {path.name for path in found if not is_temporary(path.name)}
    if files - UNFINISHED and not files & {PARAMS, ".dvc"}:
        raise UserError(
            f"{folder} has files, but no {PARAMS}: it is not a project. Name a new folder."
        )


def copy_data(folder: Path, data: Mapping[str, Path]) -> list[str]:
    """Copy the data files (name → the file to copy) that the folder lacks. Returns their names."""
    added = []
    for name, path in data.items():
        if not (folder / name).exists():
            # Whole or not at all: half a file, left by a kill, would be taken for the user's own
            # the next time.
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # a data set of save_to_disk
                with writing(folder / name) as out:
                    shutil.copytree(path, out, dirs_exist_ok=True)
            else:
                with path.open("rb") as file:
                    write_file(folder / name, iter(lambda: file.read(BLOCK), b""))
            added.append(name)
    return added


def write_project(project: Project, text: str) -> list[str]:
    """Write what the project's folder lacks: `text`, the params file's, and DVC's files. Returns
    what was written.

    The params file comes last: where it is, a project is complete.
    """
    folder, added = project.root, dict[str, str]()
    folder.mkdir(parents=True, exist_ok=True)
    rendered = HEADER + render_dvc_yaml(project)
    files = {
        PARAMS: text,
        ".dvcignore": IGNORED_BY_DVC,
        ".gitignore": IGNORED_BY_GIT,
        "dvc.yaml": rendered,
    }
    for name, content in {**files, CODE_FILE: render_code_yaml(project)}.items():
        path = folder / name
        generated = name == CODE_FILE  # renewed where it differs
        if not path.exists() or (generated and path.read_text(encoding="utf-8") != content):
            added[name] = content
    has_dvc = (folder / ".dvc").is_dir()
    if not has_dvc:
        _init_dvc(folder)
    for name, content in reversed(added.items()):
        write_file(folder / name, content)
    return [*added, *([] if has_dvc else [".dvc"])]


def _project(folder: Path, graph: StageGraph, text: str, path: Path) -> Project:
    """The project in `folder` with this params text. Raises UserError."""
    return Project.of(folder / PARAMS, parse(text, path, graph.sections), graph)


def _new_params(
    folder: Path, graph: StageGraph, source: Path, base: str | None, methods: Sequence[str] | None
) -> str:
    """The text of the new params file: `source` with the base and the methods, the sections that
    its stages need, and every key that dvc.yaml refers to. Raises UserError.
    """
    text = read_text(source)
    parse(text, source, graph.sections)
    if base:  # first, as a new section depends on it
        text = edit.set_values(text, {"base": base})
    if methods is not None:
        text = _select_methods(text, graph, methods)
    text = _add_needed_sections(text, graph)
    return edit.set_values(text, _missing_keys(text, _project(folder, graph, text, source)))


def _select_methods(text: str, graph: StageGraph, methods: Sequence[str]) -> str:
    """The text with the sections of exactly these methods; missing sections are added with their
    defaults.
    """
    sections = {stage.method: stage.name for stage in graph.stages.values() if stage.look}
    if unknown := [name for name in methods if name not in sections]:
        raise UserError(f"--methods: unknown method {unknown[0]}. Known: {', '.join(sections)}.")
    params = parse(text, Path(PARAMS), graph.sections)
    written, imports = params.written, params.origin.imports
    removed = {name for method, name in sections.items() if method not in methods}
    # merge needs the LoRA adapter
    for name in (removed & written) | ({"merge"} if "lora" not in methods else set()):
        text = edit.remove_section(text, name)
    for name in [sections[method] for method in methods if sections[method] not in written]:
        text = f"{text.rstrip()}\n\n{edit.section_text(name, graph.sections[name], imports)}"
    return text


def _add_needed_sections(text: str, graph: StageGraph) -> str:
    """The text with default sections added for stages that its own stages need, and for those that
    these need.
    """
    while True:
        project = Project(Path(), parse(text, Path(PARAMS), graph.sections), graph)
        needs = {
            need
            for s in project.stages.values()
            for need in (*project.needs(s), s.section, *s.extra_sections)
        }
        if not project.params.origin.imports and any(
            "expand_vocab" in s.needs for s in project.stages.values()
        ):
            needs.add("expand_vocab")  # MiniGPT knows the words of its own data alone
        missing = [
            s.name for s in graph.stages.values() if s.name in needs - project.params.written
        ]
        missing = [name for name in missing if not graph.stages[name].is_measurement]
        if not missing:
            return text
        imports = project.params.origin.imports
        added = (edit.section_text(name, graph.sections[name], imports) for name in missing)
        text = "\n\n".join([text.rstrip(), *added])


def _existing_params(folder: Path, graph: StageGraph, base: str | None) -> str:
    """The text of the existing params file. Raises UserError if its base is another or it lacks
    keys.
    """
    path = folder / PARAMS
    text = read_text(path)
    project = _project(folder, graph, text, path)
    if base and base != project.params.origin.base:
        raise UserError(
            f"base is {project.params.origin.base} in {path}, not {base}. Edit it there."
        )
    if missing := _missing_keys(text, project):
        raise UserError(
            f"{path} lacks {', '.join(missing)}, to which dvc.yaml refers. Add it there."
        )
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
        for file_key in _files(project, stage):
            name = file_key.partition("[")[0]
            if name in TOP_LEVEL:
                continue
            section, key = name.split(".") if "." in name else (stage.section, name)
            if section in project.params.written and key not in (tree.get(section) or {}):
                missing[f"{section}.{key}"] = project.setting(stage, name)
    return missing


def _data_sources(project: Project, source_folder: Path) -> dict[str, Path]:
    """Name of each data file → the file to copy it from: beside the source params, or packaged.
    Raises UserError.
    """
    sources: dict[str, Path] = {}
    for stage in project.stages.values():
        packages = (Path(stage.data_folder), DEFAULTS) if stage.data_folder else ()
        for key, name in _files(project, stage).items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if key != "base" and inside and (source_folder / name).exists():
                sources[name] = source_folder / name
            elif (project.root / name).exists() or key == "base":
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
    """What `dvc init --no-scm` makes, with our config, even inside another repository. Raises
    UserError.
    """
    # with --quiet it does not say why it failed
    command = [sys.executable, "-m", "dvc", "init", "--no-scm"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    with writing(folder / ".dvc") as out:
        done = subprocess.run(
            command, cwd=out, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.splitlines()
            reason = next(
                (line for line in said if line.startswith("ERROR: ")), " ".join(said)
            ).removeprefix("ERROR: ")
            raise UserError(
                f"`dvc init` failed in {folder}: {reason}. Try `dvc init --no-scm` there."
            )
        (out / ".dvcignore").unlink(missing_ok=True)
        for path in (out / ".dvc").iterdir():
            path.rename(out / path.name)
        (out / ".dvc").rmdir()
        (out / "config").write_text(DVC_CONFIG, encoding="utf-8")
        (out / ".gitignore").write_text(IGNORED_IN_DVC, encoding="utf-8")


def render_dvc_yaml(project: Project, code: str | None = None) -> str:
    """The text of dvc.yaml.

    `code`: a folder of code that DVC tracks, relative to the project's; None if the code is
    installed elsewhere, in which case DVC tracks the digests in `CODE_FILE`.
    """
    stages = {name: _stage(project, stage, code) for name, stage in project.stages.items()}
    plots = _plots(project)
    return "\n".join([_dump({"stages": stages}), *([_dump({"plots": plots})] if plots else [])])


def renew_code_yaml(project: Project) -> None:
    """Write `CODE_FILE` again if the project has one and the code has changed since: only then does
    DVC see that.
    """
    path = project.root / CODE_FILE
    if path.is_file() and path.read_text(encoding="utf-8") != (text := render_code_yaml(project)):
        write_file(path, text)


def render_code_yaml(project: Project) -> str:
    """The text of `CODE_FILE`, a DVC params file: stage → digest of the modules that it runs."""
    stages = project.graph.stages.values()
    return CODE_HEADER + _dump(
        {stage.name: provenance.code_digest(*stage.code) for stage in stages}
    )


def _files(project: Project, stage: Stage) -> dict[str, str]:
    """All that DVC must watch beside other stages' outputs: `project.file_keys`, and the base if it
    is a local one.
    """
    if stage.name == "import":
        base = project.params.origin.base
        return {"base": base} if parse_source(base, project.root).is_local else {}
    return project.file_keys(stage)


def _stage(project: Project, stage: Stage, code: str | None) -> dict[str, Any]:
    written = project.params.written
    deps = [_dependency(stage, key, name, written) for key, name in _files(project, stage).items()]
    deps += [*map(project.artifact_name, project.needs(stage)), *([code] if code else [])]
    sections = list(filter(None, (stage.name, stage.settings_from, *stage.extra_sections)))
    inherited = [name for name in sections if name not in written]
    above = [
        key for key, section in TOP_LEVEL.items() if section in sections and section in written
    ]
    if any(issubclass(project.params.kinds[name], Training) for name in sections):
        above += [TRAINING] if TRAINING in project.params.tree else []
        inherited += [TRAINING] if project.parent and TRAINING in project.parent.params.tree else []
    outputs: dict[str, Any] = {"outs": [stage.path]}
    if stage.kind == "evaluation":
        outputs["outs"] = [f"{stage.path}/{part}" for part in PARTS]
        outputs["metrics"] = [{f"{stage.path}/{METRICS}": {"cache": False}}]
    return {
        "cmd": stage.command,
        "params": [
            *above,
            *(name for name in sections if name in project.params.named),
            *([{project.params.project: inherited}] if inherited and project.parent else []),
            *([] if code else [{CODE_FILE: [stage.name]}]),
        ],
        **({"deps": deps} if deps else {}),
        **outputs,
    }


def _dependency(stage: Stage, key: str, name: str, written: Collection[str]) -> str:
    """A file as ${section.key} if params.yaml has the key, so that DVC follows it. ~ is expanded,
    as DVC does not.
    """
    if name.startswith("~"):
        return str(expand(name))
    path = key if "." in key.partition("[")[0] else key_path(stage.section, key)
    return f"${{{path}}}" if path in TOP_LEVEL or path.partition(".")[0] in written else name


def _plots(project: Project) -> list[Any]:
    """One plot of all training losses, and evaluate's comparison.

    A sweep's losses are not included: DVC takes no folder of logs, and the adapters' names depend
    on the grid.
    """
    trained = [
        stage for stage in project.readable.values() if stage.look and stage.kind != "adapters"
    ]
    curves = {f"{project.artifact_name(stage.name)}/{LOSS}": "loss" for stage in trained}
    axes = {
        "title": "Training loss",
        "x": "step",
        "x_label": "step",
        "y_label": "loss (nats per token)",
    }
    compared = [
        f"{stage.path}/{PARTS[0]}"
        for stage in project.stages.values()
        if stage.kind == "evaluation"
    ]
    return [*([{"training_loss": {**axes, "y": curves}}] if curves else []), *compared]


class _Indented(yaml.SafeDumper):
    """Indents lists below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _dump(value: Mapping[str, Any]) -> str:
    # a deep copy without shared objects, which YAML would write as anchors
    plain = json.loads(json.dumps(value))
    text: str = yaml.dump(
        plain, Dumper=_Indented, sort_keys=False, allow_unicode=True, width=10_000
    )
    return text
