"""The product's stages with their inputs and outputs, and `Project`: its stages and the parent's that it reads.

dvc.yaml contains the same graph for DVC; a test compares them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project.params.sections import Params, Section, inherit, load

ARTIFACTS, RUNS, CACHE = "artifacts", "runs", ".lora-cache"


def cache_folder(root: Path) -> Path:
    """The cache's folder: in the project, or LORA_CACHE, which several projects can share."""
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
    settings_from: str = ""  # the section with its training settings, if that is another stage's
    extra_sections: tuple[str, ...] = ()  # further sections that affect its output
    minigpt_only: bool = False  # whether it measures statements about MiniGPT, so not on other bases
    compares: bool = False  # whether it reads only those of `needs` that the project has

    @property
    def section(self) -> str:
        """The section of params.yaml with its training settings."""
        return self.settings_from or self.name

    @property
    def is_measurement(self) -> bool:
        """Whether it measures the document's statements and makes no model."""
        return self.kind in ("study", "figures", "claims")

    @property
    def path(self) -> str:
        """Its output relative to the project, such as artifacts/base."""
        return f"{ARTIFACTS}/{self.output}"


STAGES: Mapping[str, Stage] = {  # of the product: a project has those with a section in its params.yaml
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
            "train_from_scratch",
            "pipeline.stages.train_from_scratch",
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
                data=("data", "retention_data") if method == "lora" else ("data",),
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
            data=("data", "retention_data"),
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
                *(
                    "pretrain",
                    "expand_vocab",
                    "train_from_scratch",
                    "finetune_full",
                    "finetune_freeze",
                    "finetune_lora",
                    "merge",
                ),
                *("finetune_prefix", "finetune_prompt"),
            ),
            data=("old_data", "new_data", "prompts"),
            compares=True,
        ),
    )
}

# What `compare` and `evaluate` compare: name → (stage that made the model, stage that made its adapter).
VARIANTS: Mapping[str, tuple[str, str | None]] = {
    "base": ("pretrain", None),
    "expanded": ("expand_vocab", None),
    "scratch": ("train_from_scratch", None),
    "full": ("finetune_full", None),
    "freeze": ("finetune_freeze", None),
    "lora": ("expand_vocab", "finetune_lora"),
    "merged": ("merge", None),
    "prefix": ("expand_vocab", "finetune_prefix"),
    "prompt": ("expand_vocab", "finetune_prompt"),
}


@dataclass(frozen=True)
class StageGraph:
    """The stages that a project may have, in the DAG's order.

    `sections`: those of stages that are not the product's, by name; read where a file has one that the product has not.
    """

    stages: Mapping[str, Stage]
    sections: Callable[[], Mapping[str, type]] = dict


PRODUCT = StageGraph(STAGES)


@dataclass(frozen=True)
class Project:
    """A params file and its folder; all paths in it are relative to that folder.

    `parent`: the project that the params file names under `project`. Stages and sections that a project does not have
    itself are read from its parent.
    """

    root: Path
    params: Params
    graph: StageGraph = PRODUCT
    parent: "Project | None" = None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = (), graph: StageGraph = PRODUCT) -> "Project":
        """The project of a params file, and its parent. Raises UserError."""
        return cls.of(path, load(path, overrides, graph.sections), graph)

    @classmethod
    def of(cls, path: Path, params: Params, graph: StageGraph = PRODUCT) -> "Project":
        """The project whose params file at `path` holds `params`. Raises UserError if its parent cannot be read."""
        root = path.resolve().parent
        if not params.project:
            return cls(root, params, graph)
        source = root / params.project
        try:
            parent_params = load(source, (), graph.sections)
        except UserError as error:
            raise UserError(f"{path}: project: {error}") from None
        if parent_params.project:
            raise UserError(
                f"{path}: project {params.project} itself builds on {parent_params.project}. Name that one here."
            )
        parent = cls(source.resolve().parent, parent_params, graph)
        prefix = os.path.relpath(parent.root, root)
        return cls(root, inherit(params, parent_params, _file_keys(graph), prefix), graph, parent)

    def section(self, stage: Stage) -> Section:
        """The section with the stage's name."""
        return self.params.section(stage.name)

    def settings(self, stage: Stage) -> Section:
        """The section with the stage's training settings: its own, or another stage's of which it trains variants."""
        return self.params.section(stage.section)

    def stage_params(self, stage: Stage) -> dict[str, Any]:
        """All params that affect the stage's output. The keys of a sweep's grid replace those of its settings."""
        section = asdict(self.section(stage))
        return {
            **{key: value for key, value in asdict(self.settings(stage)).items() if key not in section.get("grid", ())},
            **section,
            **{
                f"{name}.{key}": value
                for name in stage.extra_sections
                for key, value in asdict(self.params.section(name)).items()
            },
        }

    def setting(self, stage: Stage, key: str) -> Any:
        """The value of a key of the stage's settings, or of section.key."""
        section, _, name = key.rpartition(".")
        return getattr(self.params.section(section or stage.section), name)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Its own stages by name, in the DAG's order: those with a section in its params file and with data,
        except those that do not apply to its base."""
        imports = self.params.pretrain.imports
        return {
            name: stage
            for name in self.graph.stages
            if name in self.params.written
            and self._has_data(stage := self.graph.stages[name])
            and not (stage.minigpt_only and imports)
        }

    def _has_data(self, stage: Stage) -> bool:
        return stage.kind != "study" or bool(getattr(self.section(stage), "data", True))

    @cached_property
    def readable(self) -> dict[str, Stage]:
        """Its own and its parent's stages, whose artifacts it can read, by name, in the DAG's order."""
        inherited = self.parent.stages if self.parent else {}
        names = (name for name in self.graph.stages if name in self.stages or name in inherited)
        return {name: self.graph.stages[name] for name in names}

    def stage(self, name: str) -> Stage:
        """One of its own stages. Raises UserError if it does not have it."""
        if name in self.stages:
            return self.stages[name]
        if self.parent and name in self.parent.stages:
            raise UserError(f"{name} is a stage of {self.params.project}. Run it in {self.parent.root}.")
        raise UserError(self._missing_stage_message(self.graph.stages[name]))

    def _missing_stage_message(self, stage: Stage) -> str:
        """Why the project does not have a stage, and what to do."""
        file, base = self.params.file, self.params.pretrain.base
        if stage.name not in self.params.written:
            return (
                f"{stage.name} is not a stage of this project: {file} has no such section. "
                f"Add `{stage.name}: {{}}` to it; for `dvc repro`, remove dvc.yaml and run `lora new .`."
            )
        if not self._has_data(stage):
            return f"{stage.name}.data names no file. Name one in {file}."
        return f"{stage.name} measures what the document says of MiniGPT; base is {base}."

    @property
    def variants(self) -> dict[str, tuple[str, str | None]]:
        """The VARIANTS whose stages it can read."""
        readable = self.readable
        return {name: pair for name, pair in VARIANTS.items() if all(stage in readable for stage in pair if stage)}

    def home(self, name: str) -> "Project":
        """The project that has a stage: itself, or its parent."""
        is_parents = self.parent and name not in self.stages and name in self.parent.stages
        return self.parent if self.parent and is_parents else self

    def artifact(self, stage: str) -> Path:
        return self.home(stage).root / self.graph.stages[stage].path

    def artifact_name(self, stage: str) -> str:
        """The artifact's path relative to the project's folder: artifacts/base, or ../artifacts/base."""
        return Path(os.path.relpath(self.artifact(stage), self.root)).as_posix()

    def run_folder(self, stage: str) -> Path:
        return self.home(stage).root / RUNS / stage

    @property
    def params_path(self) -> Path:
        return self.root / self.params.file

    @property
    def cache(self) -> Path:
        """The cache's folder, shared with the parent."""
        return cache_folder(self.parent.root if self.parent else self.root)

    def data_files(self, stage: Stage) -> list[str]:
        """The data files that a stage reads, as named in params.yaml; none for an imported base."""
        if stage.name == "pretrain" and self.params.pretrain.imports:
            return []
        values: list[Any] = [self.setting(stage, key) for key in stage.data]
        return [name for value in values for name in ((value,) if isinstance(value, str) else value) if name]

    def needs(self, stage: Stage) -> list[str]:
        """The stages whose outputs it reads; for a stage that compares, only those that the project has."""
        return [need for need in stage.needs if need in self.readable or not stage.compares]

    def inputs(self, stage: Stage) -> dict[str, Path]:
        """Name → path of everything that a stage reads: other stages' outputs, then data files."""
        outputs = {self.artifact_name(need): self.artifact(need) for need in self.needs(stage)}
        return outputs | {name: self.root / name for name in self.data_files(stage)}


def _file_keys(graph: StageGraph) -> dict[str, set[str]]:
    """Section → its keys that name data files."""
    keys: dict[str, set[str]] = {}
    for stage in graph.stages.values():
        keys.setdefault(stage.section, set()).update(key for key in stage.data if "." not in key)
    return keys
