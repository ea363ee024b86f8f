"""The stages: what each reads, what it writes, the module it runs. dvc.yaml says the same to DVC; a test compares."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.project.params.sections import Params, Section

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
    kind: str  # checkpoint, adapter, adapters (a folder of them), evaluation, study, figures or claims
    method: str
    needs: tuple[str, ...] = ()  # stages whose outputs it reads
    data: tuple[str, ...] = ()  # keys of its settings that name files, or section.key of other sections
    settings_from: str = ""  # the section that says how it trains, if that is another stage's
    extra_sections: tuple[str, ...] = ()  # further sections that decide what it makes
    minigpt_only: bool = False  # whether it asks what the document does of MiniGPT, and means nothing on another base

    @property
    def section(self) -> str:
        """The section of params.yaml that says how it trains."""
        return self.settings_from or self.name

    @property
    def is_measurement(self) -> bool:
        """Whether it measures statements, after all that the pipeline makes, and makes no model."""
        return self.kind in ("study", "figures", "claims")

    @property
    def path(self) -> str:
        """Its output as users name it, such as artifacts/base."""
        return f"{ARTIFACTS}/{self.output}"


def _study(
    name: str,
    data: tuple[str, ...],
    needs: tuple[str, ...] = ("pretrain", "expand_vocab"),
    extra_sections: tuple[str, ...] = (),
    minigpt_only: bool = True,
) -> Stage:
    """A study of the document's statements: §2 to §10 as they are measured."""
    stage, output = f"study_{name}", f"studies/{name}"
    return Stage(
        stage, f"pipeline.document.studies.{name}", output, "study", name, needs, data, "", extra_sections, minigpt_only
    )


MADE_FROM_EXPANDED = (
    "scratch",
    "finetune_full",
    "finetune_freeze",
    "finetune_lora",
    "finetune_prefix",
    "finetune_prompt",
)
TUNED = MADE_FROM_EXPANDED[1:]


def _taught(sections: tuple[str, ...]) -> tuple[str, ...]:
    """The keys that name what these stages learn from."""
    return (*(f"{section}.data" for section in sections), "finetune_lora.retain")


MEASURED: Mapping[str, Stage] = {  # all that the claims are held against
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
            settings_from="finetune_lora",
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
        _study("fact_correction", ("data", "retain", "prompts", "document")),
        _study(
            "knowledge_correction",
            ("data", "retain", "prompts", "old_data"),
            extra_sections=("finetune_lora",),
            minigpt_only=False,
        ),
        _study("trajectory", ("data", "document")),
        _study("methods", ("old_data", "new_data", *_taught(MADE_FROM_EXPANDED)), extra_sections=MADE_FROM_EXPANDED),
        _study("rank", ("old_data", "new_data")),
        _study("spectrum", ("old_data", "new_data")),
        _study("intrinsic_dimension", ("data", "document")),
        _study(
            "quantization", ("data", "document", "pretrain.data"), needs=("pretrain",), extra_sections=("pretrain",)
        ),
        _study("forgetting", ("old_data", "new_data", *_taught(TUNED)), extra_sections=TUNED),
        Stage(
            "figures",
            "pipeline.document.figures.registry",
            "figures",
            "figures",
            "figures",
            needs=("pretrain", "expand_vocab", "finetune_full", "finetune_freeze", "finetune_lora"),
            data=("study_trajectory.data", "study_trajectory.document"),
            extra_sections=("study_trajectory",),
            minigpt_only=True,
        ),
    )
}

STAGES: Mapping[str, Stage] = {
    **MEASURED,
    "claims": Stage(
        "claims",
        "pipeline.document.claims.stage",
        "claims",
        "claims",
        "claims",
        needs=tuple(MEASURED),
        data=(
            *("data", "pretrain.data", "finetune_lora.data", "finetune_lora.retain"),
            *("study_fact_correction.data", "study_knowledge_correction.data"),
        ),
        minigpt_only=True,
    ),
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
            **{key: value for key, value in asdict(self.settings(stage)).items() if key not in own.get("grid", ())},
            **own,
            **{
                f"{name}.{key}": v
                for name in stage.extra_sections
                for key, v in asdict(getattr(self.params, name)).items()
            },
        }

    def setting(self, stage: Stage, key: str) -> Any:
        """The value of a key of its settings, or of section.key."""
        section, _, name = key.rpartition(".")
        return getattr(getattr(self.params, section or stage.section), name)

    @property
    def stages(self) -> dict[str, Stage]:
        """Those that mean something for its base and have data, by name, in the DAG's order."""
        imports = self.params.pretrain.imports
        return {
            name: stage
            for name, stage in STAGES.items()
            if self._has_data(stage) and not (stage.minigpt_only and imports)
        }

    def _has_data(self, stage: Stage) -> bool:
        return stage.kind != "study" or bool(getattr(self.section(stage), "data", True))

    def artifact(self, stage: str) -> Path:
        return self.root / STAGES[stage].path

    def run_folder(self, stage: str) -> Path:
        return self.root / RUNS / stage

    def data_files(self, stage: Stage) -> list[str]:
        """The data files a stage reads, as params.yaml names them; an imported base reads none."""
        if stage.name == "pretrain" and self.params.pretrain.imports:
            return []
        values: list[Any] = [self.setting(stage, key) for key in stage.data]
        return [name for value in values for name in ((value,) if isinstance(value, str) else value) if name]

    def needs(self, stage: Stage) -> list[str]:
        """The stages whose outputs it reads, of those that the project has."""
        stages = self.stages
        return [need for need in stage.needs if need in stages]

    def inputs(self, stage: Stage) -> dict[str, Path]:
        """Name → path of all that a stage reads: other stages' outputs, then data files."""
        outputs = {STAGES[need].path: self.artifact(need) for need in self.needs(stage)}
        return outputs | {name: self.root / name for name in self.data_files(stage)}
