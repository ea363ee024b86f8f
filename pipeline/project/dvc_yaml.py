"""What DVC must know of each stage: dvc.yaml and code.yaml, rendered from the stage graph.

DVC knows a stage's command, what the stage reads (`params` and `deps`) and what it writes (`outs`).
`lora new` writes both files; a test compares the repository's own dvc.yaml with this module.
What a stage needs and reads is declared in its `Stage`: in stages/registry.py, and of a method in
its file in stages/methods.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.files.artifact import write_file
from pipeline.files.base_model import parse_source
from pipeline.files.home import expand
from pipeline.project import provenance
from pipeline.project.logs.run_log import LOSS
from pipeline.project.params.load import TOP_LEVEL, TRAINING, key_path
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Project, Stage

HEADER = """\
# What DVC must know of each stage, as pipeline/project/dvc_yaml.py renders it for `lora new`.
# It counts the files in lists of params.yaml: remove it and run `lora new .` to write it anew.
"""
CODE_FILE = "code.yaml"
CODE_HEADER = (
    "# The code that each stage runs. `lora new .` renews this; `dvc repro` then runs what it "
    "concerns.\n"
)
COMPARISON = "finetuning_comparison.png"
# an evaluation's outputs
PARTS = (COMPARISON, "manifest.json", "predictions.json", "report.md", "samples.json")
METRICS = "metrics.json"  # the only part tracked by git


def render_dvc_yaml(project: Project, code: str | None = None) -> str:
    """The text of dvc.yaml.

    `code`: a folder of code that DVC tracks, relative to the project's; None if the code is
    installed elsewhere, in which case DVC tracks the digests in `CODE_FILE`.
    """
    stages = {name: _entry(project, stage, code) for name, stage in project.stages.items()}
    text = _dump({"stages": stages})
    if plots := _plots(project):
        text += "\n" + _dump({"plots": plots})
    return text


def render_code_yaml(project: Project) -> str:
    """The text of `CODE_FILE`, a DVC params file: stage → digest of the modules that it runs."""
    stages = project.graph.stages.values()
    digests = {stage.name: provenance.code_digest(*stage.code) for stage in stages}
    return CODE_HEADER + _dump(digests)


def renew_code_yaml(project: Project) -> None:
    """Write the project's `CODE_FILE` again if the code has changed: only then does DVC see it."""
    path = project.root / CODE_FILE
    if not path.is_file():
        return
    text = render_code_yaml(project)
    if not is_current(path, text):
        write_file(path, text)


def is_current(path: Path, text: str) -> bool:
    """Whether the file has this text; it may not be UTF-8."""
    return path.read_text(encoding="utf-8", errors="replace") == text


def watched_files(project: Project, stage: Stage) -> dict[str, str]:
    """Key → name of each file that a stage reads beside other stages' outputs.

    These are the data files (`Project.file_keys`), and the base if it is a local one.
    """
    if stage.name != "import":
        return project.file_keys(stage)
    base = project.params.origin.base
    return {"base": base} if parse_source(base, project.root).is_local else {}


def _entry(project: Project, stage: Stage, code: str | None) -> dict[str, Any]:
    """A stage as dvc.yaml has it."""
    entry: dict[str, Any] = {"cmd": stage.command, "params": _params(project, stage, code)}

    files = watched_files(project, stage)
    deps = [_dependency(project, stage, key, name) for key, name in files.items()]
    deps += map(project.artifact_name, project.needs(stage))
    if code:
        deps.append(code)
    if deps:
        entry["deps"] = deps

    entry["outs"] = [stage.path]
    if stage.kind == "evaluation":
        entry["outs"] = [f"{stage.path}/{part}" for part in PARTS]
        entry["metrics"] = [{f"{stage.path}/{METRICS}": {"cache": False}}]
    return entry


def _params(project: Project, stage: Stage, code: str | None) -> list[Any]:
    """What a stage depends on: keys and sections, here and in the parent, and its code's digest."""
    params, parent = project.params, project.parent
    sections = [name for name in (stage.name, stage.settings_from, *stage.extra_sections) if name]
    trains = any(issubclass(params.kinds[name], Training) for name in sections)

    written = params.written.intersection(sections)
    names: list[Any] = [key for key, section in TOP_LEVEL.items() if section in written]
    if trains and TRAINING in params.tree:
        names.append(TRAINING)
    names += [name for name in sections if name in params.named]
    names = list(dict.fromkeys(map(params.as_written, names)))

    if parent:
        inherited = [name for name in sections if name not in params.written]
        if trains and TRAINING in parent.params.tree:
            inherited.append(TRAINING)
        if inherited:
            names.append({params.project: list(map(parent.params.as_written, inherited))})
    if not code:
        names.append({CODE_FILE: [stage.name]})
    return names


def _dependency(project: Project, stage: Stage, key: str, name: str) -> str:
    """A file as ${section.key} if params.yaml has the key, so that DVC follows it."""
    if name.startswith("~"):  # which DVC does not expand
        return str(expand(name))
    names_section = "." in key.partition("[")[0]
    path = key if names_section else key_path(stage.section, key)
    is_written = path in TOP_LEVEL or path.partition(".")[0] in project.params.written
    path, bracket, index = path.partition("[")
    return f"${{{project.params.as_written(path)}{bracket}{index}}}" if is_written else name


def _plots(project: Project) -> list[Any]:
    """One plot of all training losses, and evaluate's comparison.

    A sweep's losses are not included: DVC takes no folder of logs, and the adapters' names depend
    on the grid.
    """
    plots: list[Any] = []
    curves = {
        f"{project.artifact_name(stage.name)}/{LOSS}": "loss"
        for stage in project.readable.values()
        if stage.look and stage.kind != "adapters"
    }
    if curves:
        axes = {
            "title": "Training loss",
            "x": "step",
            "x_label": "step",
            "y_label": "loss (nats per token)",
        }
        plots.append({"training_loss": {**axes, "y": curves}})
    for stage in project.stages.values():
        if stage.kind == "evaluation":
            plots.append(f"{stage.path}/{COMPARISON}")
    return plots


class _Indented(yaml.SafeDumper):
    """Indents lists below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _dump(value: Mapping[str, Any]) -> str:
    text: str = yaml.dump(
        value, Dumper=_Indented, sort_keys=False, allow_unicode=True, width=10_000
    )
    return text
