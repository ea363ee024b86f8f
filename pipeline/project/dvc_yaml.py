"""Renders dvc.yaml from the stage graph and the params."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.files.base_model import parse_source
from pipeline.project import provenance
from pipeline.project.logs.run_log import LOSS
from pipeline.project.params.load import TOP_LEVEL, TRAINING, key_path
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Project, Stage

CODE_FILE = "code.yaml"
PARTS = ("finetuning_comparison.png", "manifest.json", "predictions.json", "report.md")  # the evaluation's, for DVC
METRICS = "metrics.json"  # the only part tracked by git
HEADER = """\
# What DVC must know of each stage, as `lora new` wrote it; it counts the files in the lists of params.yaml.
# To write it anew, remove it and run `lora new .` here.
"""
CODE_HEADER = "# The code that each stage runs. `lora new .` renews this; `dvc repro` then runs what it concerns.\n"


def render(project: Project, code: str | None = None) -> str:
    """The text of dvc.yaml.

    `code`: a folder of code that DVC tracks, relative to the project's; None if the code is installed elsewhere, in
    which case DVC tracks the digests in `CODE_FILE`.
    """
    stages = {name: _stage(project, stage, code) for name, stage in project.stages.items()}
    plots = _plots(project)
    return "\n".join([_dump({"stages": stages}), *([_dump({"plots": plots})] if plots else [])])


def code_file(project: Project) -> str:
    """The text of `CODE_FILE`, a DVC params file: stage → digest of the modules that it runs."""
    stages = project.graph.stages.values()
    return CODE_HEADER + _dump({stage.name: provenance.code_digest(*stage.code) for stage in stages})


def files(project: Project, stage: Stage) -> dict[str, str]:
    """Key of the stage's section (such as data[0]) or section.key → file name; empty values are omitted."""
    base = project.params.pretrain
    if stage.name == "pretrain" and base.imports:
        return {"base": base.base} if parse_source(base.base, project.root).is_local else {}
    files: dict[str, str] = {}
    for key in stage.data:
        value = project.setting(stage, key)
        names = {key: value} if isinstance(value, str) else {f"{key}[{i}]": name for i, name in enumerate(value)}
        files |= {k: name for k, name in names.items() if name and name not in files.values()}
    return files


def _stage(project: Project, stage: Stage, code: str | None) -> dict[str, Any]:
    written = project.params.written
    deps = [_dependency(stage, key, name, written) for key, name in files(project, stage).items()]
    deps += [*map(project.artifact_name, project.needs(stage)), *([code] if code else [])]
    sections = list(filter(None, (stage.name, stage.settings_from, *stage.extra_sections)))
    inherited = [name for name in sections if name not in written]
    above = [key for key, section in TOP_LEVEL.items() if section in sections and section in written]
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
            *(name for name in sections if name in written),
            *([{project.params.project: inherited}] if inherited and project.parent else []),
            *([] if code else [{CODE_FILE: [stage.name]}]),
        ],
        **({"deps": deps} if deps else {}),
        **outputs,
    }


def _dependency(stage: Stage, key: str, name: str, written: Collection[str]) -> str:
    """A file as ${section.key} if params.yaml has the key, so that DVC follows it. ~ is expanded, as DVC does not."""
    if name.startswith("~"):
        return str(Path(name).expanduser())
    path = key if "." in key else key_path(stage.section, key)
    return f"${{{path}}}" if path in TOP_LEVEL or path.partition(".")[0] in written else name


def _plots(project: Project) -> list[Any]:
    """One plot of all training losses, and evaluate's comparison.

    A sweep's losses are not included: DVC takes no folder of logs, and the adapters' names depend on the grid.
    """
    trained = [stage for stage in project.readable.values() if stage.look and stage.kind != "adapters"]
    curves = {f"{project.artifact_name(stage.name)}/{LOSS}": "loss" for stage in trained}
    axes = {"title": "Training loss", "x": "step", "x_label": "step", "y_label": "loss (nats per token)"}
    compared = [f"{stage.path}/{PARTS[0]}" for stage in project.stages.values() if stage.kind == "evaluation"]
    return [*([{"training_loss": {**axes, "y": curves}}] if curves else []), *compared]


class _Indented(yaml.SafeDumper):
    """Indents lists below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _dump(value: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(value))  # a deep copy without shared objects, which YAML would write as anchors
    text: str = yaml.dump(plain, Dumper=_Indented, sort_keys=False, allow_unicode=True, width=10_000)
    return text
