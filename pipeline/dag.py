"""The stages: what each reads, what it writes, the module it runs. dvc.yaml says the same to DVC; a test compares."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.params import Params, Pretrain, Section

ARTIFACTS, RUNS, CACHE = "artifacts", "runs", ".lora-cache"


def cache_folder(root: Path) -> Path:
    """Where results are kept by content: in the project, or where LORA_CACHE says, for all of a machine's projects."""
    shared = os.environ.get("LORA_CACHE")
    return Path(shared) if shared else root / CACHE


@dataclass(frozen=True)
class Stage:
    """One node. Its name is its DVC stage and its section of params.yaml."""

    name: str
    module: str
    output: str  # a folder below artifacts/
    kind: str  # checkpoint, adapter, adapters (a folder of them) or evaluation
    method: str
    needs: tuple[str, ...] = ()  # stages whose outputs it reads
    data: tuple[str, ...] = ()  # keys of its settings that name files
    settings: str = ""  # the section that says how it trains, if that is another stage's

    @property
    def section(self) -> str:
        """The section of params.yaml that says how it trains."""
        return self.settings or self.name

    @property
    def path(self) -> str:
        """Its output as users name it, such as artifacts/base."""
        return f"{ARTIFACTS}/{self.output}"


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "pipeline.stages.pretrain", "base", "checkpoint", "pretrain", data=("data",)),
        Stage(
            "expand_vocab",
            "pipeline.stages.expand_vocab",
            "expanded",
            "checkpoint",
            "expand_vocab",
            needs=("pretrain",),
            data=("data", "audit_data"),
        ),
        Stage(
            "scratch",
            "pipeline.stages.scratch",
            "from_scratch",
            "checkpoint",
            "scratch",
            needs=("expand_vocab",),
            data=("data",),
        ),
        *(
            Stage(
                f"finetune_{method}",
                "pipeline.stages.finetune",
                output,
                kind,
                method,
                needs=("expand_vocab",),
                data=("data", "retain") if method == "lora" else ("data",),
            )
            for method, output, kind in (
                ("full", "full_finetuned", "checkpoint"),
                ("freeze", "layer_frozen", "checkpoint"),
                ("lora", "lora_adapter", "adapter"),
                ("prefix", "prefix", "adapter"),
                ("prompt", "prompt", "adapter"),
            )
        ),
        Stage(
            "finetune_sweep",
            "pipeline.stages.sweep",
            "sweep",
            "adapters",
            "sweep",
            needs=("expand_vocab",),
            data=("data", "retain"),
            settings="finetune_lora",
        ),
        Stage(
            "merge",
            "pipeline.stages.merge",
            "lora_merged",
            "checkpoint",
            "merge",
            needs=("expand_vocab", "finetune_lora"),
            data=("prompts",),
        ),
        Stage(
            "evaluate",
            "pipeline.stages.evaluate",
            "evaluation",
            "evaluation",
            "evaluate",
            needs=(
                *("pretrain", "expand_vocab", "scratch", "finetune_full", "finetune_freeze", "finetune_lora", "merge"),
                *("finetune_prefix", "finetune_prompt"),
            ),
            data=("old_data", "new_data", "prompts"),
        ),
    )
}

# What `compare` and `evaluate` set side by side: name → (stage that made the model, stage that made its adapter).
VARIANTS: Mapping[str, tuple[str, str | None]] = {
    "base": ("pretrain", None),
    "expanded": ("expand_vocab", None),
    "scratch": ("scratch", None),
    "full": ("finetune_full", None),
    "freeze": ("finetune_freeze", None),
    "lora": ("expand_vocab", "finetune_lora"),
    "merged": ("merge", None),
    "prefix": ("expand_vocab", "finetune_prefix"),
    "prompt": ("expand_vocab", "finetune_prompt"),
}


@dataclass(frozen=True)
class Project:
    """A params file and the folder that it stands in; every path in it is relative to that folder."""

    root: Path
    params: Params

    def section(self, stage: Stage) -> Section:
        """The section of the stage's name."""
        section: Section = getattr(self.params, stage.name)
        return section

    def settings(self, stage: Stage) -> Section:
        """The section that says how it trains: its own, or another stage's, of which it makes variants."""
        section: Section = getattr(self.params, stage.section)
        return section

    def stage_params(self, stage: Stage) -> dict[str, Any]:
        """All of params.yaml that decides what the stage makes: the values of a sweep stand for its settings'."""
        own = asdict(self.section(stage))
        return {
            key: value for key, value in asdict(self.settings(stage)).items() if key not in own.get("grid", ())
        } | own

    def artifact(self, stage: str) -> Path:
        return self.root / STAGES[stage].path

    def run_folder(self, stage: str) -> Path:
        return self.root / RUNS / stage

    def data_files(self, stage: Stage) -> list[str]:
        """The data files a stage reads, as params.yaml names them; an imported base reads none."""
        section = self.settings(stage)
        if isinstance(section, Pretrain) and section.imports:
            return []
        values: list[Any] = [getattr(section, key) for key in stage.data]
        return [name for value in values for name in ((value,) if isinstance(value, str) else value) if name]

    def inputs(self, stage: Stage) -> dict[str, Path]:
        """Name → path of all that a stage reads: other stages' outputs, then data files."""
        outputs = {STAGES[need].path: self.artifact(need) for need in stage.needs}
        return outputs | {name: self.root / name for name in self.data_files(stage)}
