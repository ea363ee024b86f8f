"""dvc.yaml as text, from what pipeline/project/stage_graph.py and the params say of each stage."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.files.base_model import parse_source
from pipeline.project import provenance
from pipeline.project.logs.run_log import LOSS
from pipeline.project.params.sections import TOP_LEVEL, key_path
from pipeline.project.stage_graph import Project, Stage

CODE_FILE = "code.yaml"
PARTS = ("finetuning_comparison.png", "manifest.json", "predictions.json", "report.md")  # of evaluation, for DVC
METRICS = "metrics.json"  # the one part that git keeps
HEADER = """\
# What DVC must know of each stage, as `lora new` wrote it; it counts the files in the lists of params.yaml.
# To write it anew, remove it and run `lora new .` here.
"""
CODE_HEADER = "# The code that each stage runs. `lora new .` renews this; `dvc repro` then runs what it concerns.\n"


def render(project: Project, code: str | None = None) -> str:
    """The text of dvc.yaml.

    `code`: a folder of code for DVC to watch, relative to the project's; None where the code is installed
    elsewhere: then `CODE_FILE` stands for it.
    """
    stages = {name: _stage(project, stage, code) for name, stage in project.stages.items()}
    plots = _plots(project)
    return "\n".join([_dumped({"stages": stages}), *([_dumped({"plots": plots})] if plots else [])])


def code_file(project: Project) -> str:
    """The text of `CODE_FILE`: stage → digest of the modules that it runs, as a params file of DVC."""
    return CODE_HEADER + _dumped({name: provenance.code_digest(s.module) for name, s in project.graph.stages.items()})


def files(project: Project, stage: Stage) -> dict[str, str]:
    """Key of its section, such as data[0], or section.key → the file that it names; what is left empty is left out."""
    base = project.params.pretrain
    if stage.name == "pretrain" and base.imports:
        return {"base": base.base} if parse_source(base.base, project.root).is_local else {}
    found: dict[str, str] = {}
    for key in stage.data:
        value = project.setting(stage, key)
        names = {key: value} if isinstance(value, str) else {f"{key}[{i}]": name for i, name in enumerate(value)}
        found |= {place: name for place, name in names.items() if name and name not in found.values()}
    return found


def command(stage: Stage) -> str:
    """finetune_lora is `lora finetune lora`, expand_vocab `lora expand-vocab`."""
    if stage.kind == "study":
        return f"lora study {stage.method}"
    return "lora " + stage.name.replace("finetune_", "finetune ").replace("_", "-")


def _stage(project: Project, stage: Stage, code: str | None) -> dict[str, Any]:
    own = project.params.written
    deps = [_dependency(stage, place, name, own) for place, name in files(project, stage).items()]
    deps += [*map(project.artifact_name, project.needs(stage)), *([code] if code else [])]
    sections = list(filter(None, (stage.name, stage.settings_from, *stage.extra_sections)))
    theirs = [name for name in sections if name not in own]
    above = [key for key, section in TOP_LEVEL.items() if section in sections and section in own]
    return {
        "cmd": command(stage),
        "params": [
            *above,
            *(name for name in sections if name in own),
            *([{project.params.project: theirs}] if theirs and project.parent else []),
            *([] if code else [{CODE_FILE: [stage.name]}]),
        ],
        **({"deps": deps} if deps else {}),
        **_outputs(stage),
    }


def _dependency(stage: Stage, key: str, name: str, written: Collection[str]) -> str:
    """A file by its key where params.yaml has that, so that DVC follows it. DVC does not know what ~ is."""
    if name.startswith("~"):
        return str(Path(name).expanduser())
    path = key if "." in key else key_path(stage.section, key)
    return f"${{{path}}}" if path in TOP_LEVEL or path.partition(".")[0] in written else name


def _outputs(stage: Stage) -> dict[str, Any]:
    if stage.kind != "evaluation":
        return {"outs": [stage.path]}
    return {
        "outs": [f"{stage.path}/{part}" for part in PARTS],
        "metrics": [{f"{stage.path}/{METRICS}": {"cache": False}}],
    }


def _plots(project: Project) -> list[Any]:
    """The trained variants' losses in one picture, and the comparison as evaluate drew it.

    A sweep's are not among them: DVC takes no folder of logs, and its adapters have the names that the grid gives.
    """
    single = (stage for stage in project.readable.values() if stage.kind != "adapters")
    trained = [stage for stage in single if stage.name == "train_from_scratch" or stage.name.startswith("finetune_")]
    curves = {f"{project.artifact_name(stage.name)}/{LOSS}": "loss" for stage in trained}
    axes = {"title": "Training loss", "x": "step", "x_label": "step", "y_label": "loss (nats a token)"}
    compared = [f"{stage.path}/{PARTS[0]}" for stage in project.stages.values() if stage.kind == "evaluation"]
    return [*([{"training_loss": {**axes, "y": curves}}] if curves else []), *compared]


class _Indented(yaml.SafeDumper):
    """Lists stand further in than their key, as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _dumped(value: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(value))  # no two places share an object: YAML would write one as a reference
    text: str = yaml.dump(plain, Dumper=_Indented, sort_keys=False, allow_unicode=True, width=10_000)
    return text
