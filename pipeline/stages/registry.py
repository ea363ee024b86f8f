"""The product's stages. Those of fine-tuning methods are found: each file of
`pipeline/stages/methods/` has `STAGE`.

From a stage come the command, its DVC stage, its section of params.yaml and the form for it, its
model's name among the compared ones, its row and color in reports.

Reading the registry imports no torch: `lora --help`, the calculator and the terminal UI read it at
start, and to import torch alone takes ten times as long.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.adapters.config import OTHER_KINDS
from pipeline.calc.architecture import Architecture
from pipeline.calc.method import FinetuningMethod, trainable, with_options
from pipeline.calc.settings import options_of
from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.project import process
from pipeline.project.params.load import RUNNING, Params
from pipeline.project.params.sections import Evaluate, ExpandVocab, Import, Merge, Pretrain
from pipeline.project.stage_graph import Project, Stage, StageGraph


def _wrong_name(name: str, stage: Stage) -> str:
    """An extension's method has the name of its entry point, so that it cannot replace ours."""
    if (stage.method, stage.name) == (name, f"finetune_{name}"):
        return ""
    return f"its stage must be finetune_{name} and its method {name}, got {stage.name}."


# Methods are found, so that a new one is one file. No import statement names them: digests follow
# these, and whatever imports this module would depend on the code of every method. A stage's own
# digest starts at its method's file (`Stage.code`).
_FOUND = Registry[Stage]("method", order=lambda stage: (stage.order, stage.name), check=_wrong_name)
METHODS: Mapping[str, Stage] = {stage.method: stage for stage in _FOUND.values()}
COUNTED: Mapping[str, FinetuningMethod] = {  # as the calculator counts them, with default options
    name: sys.modules[stage.module].COUNTED
    for name, stage in METHODS.items()
    if hasattr(sys.modules.get(stage.module), "COUNTED")
}
# the adapters' package lies below and cannot import a method: it is told which module loads a kind
# of adapter
OTHER_KINDS.update({stage.peft_type: stage.module for stage in METHODS.values() if stage.peft_type})
MERGE = Stage(
    "merge",
    "pipeline.stages.merge",
    output="lora_merged",
    kind="checkpoint",
    method="merge",
    settings=Merge,
    needs=("expand_vocab", "finetune_lora"),
    data=("prompts",),
    summary="Merge the adapter into its base",
    title="LoRA, merged",
    variant="merged",
    order=METHODS["lora"].order + 0.5,
)
MODELS = (
    Stage(
        "import",
        "pipeline.stages.import_base",
        output="base",
        kind="checkpoint",
        method="import",
        settings=Import,
        summary="Import the base model",
        title="Base",
        variant="base",
    ),
    Stage(
        "pretrain",
        "pipeline.stages.pretrain",
        output="base",
        kind="checkpoint",
        method="pretrain",
        settings=Pretrain,
        data=("data", "eval_data"),
        summary="Train MiniGPT from scratch",
        title="Base",
        variant="base",
    ),
    Stage(
        "expand_vocab",
        "pipeline.stages.expand_vocab",
        output="expanded",
        kind="checkpoint",
        method="expand_vocab",
        settings=ExpandVocab,
        needs=("pretrain",),
        data=("data", "audit_data"),
        summary="Add rows for new words",
        title="Expanded base",
        variant="expanded",
    ),
    *sorted((*METHODS.values(), MERGE), key=lambda stage: stage.order),
)
EVALUATE = Stage(
    "evaluate",
    "pipeline.stages.evaluate",
    output="evaluation",
    kind="evaluation",
    method="evaluate",
    settings=Evaluate,
    needs=tuple(stage.name for stage in MODELS if stage.variant),
    data=("old_data", "new_data", "prompts", "tasks"),
    compares=True,
    loads=tuple(stage.module for stage in METHODS.values() if stage.kind == "adapter"),
    summary="Compare all variants",
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (*MODELS, EVALUATE)}
GRAPH = StageGraph(STAGES)


def open_project(params: Path, overrides: Sequence[str] = ()) -> Project:
    """Open the project of a params file with `section.key=value` overrides. Raises UserError.

    What this process computes from then on, it computes on the project's device.
    """
    project = Project.load(params, GRAPH, overrides)
    process.prefer(project.params.running.device, project.params.source(RUNNING, "device"))
    return project


def current_project() -> Project:
    """The project in the current folder; without a params file, a project with default settings."""
    params = Path("params.yaml")
    if params.is_file():
        return open_project(params)
    return Project(Path(), Params(kinds=GRAPH.sections), GRAPH)


def counted_stage(project: Project) -> Stage:
    """The stage that the calculator counts of a project: LoRA, unless it trains by other methods
    alone.
    """
    counted = [
        stage
        for stage in project.stages.values()
        if stage.method in COUNTED and stage.kind != "adapters"
    ]
    lora = METHODS["lora"]
    return lora if lora in counted or not counted else counted[0]


def model_source(project: Project) -> str:
    """The name or path that the calculator opens: a checkpoint that the pipeline made of the base,
    else the base.
    """
    from pipeline.files import artifact, base_model

    name = project.params.origin.base
    if not project.params.origin.imports:
        return "minigpt"
    base, expanded = map(project.artifact, ("import", "expand_vocab"))
    try:
        imported = artifact.read_manifest(base)
        if imported["params"]["base"] == base_model.shared_name(name):
            made_from = artifact.read_manifest(expanded)["inputs"] if expanded.is_dir() else {}
            is_current = made_from.get("artifacts/base") == artifact.sealed_digest(imported)
            return str(expanded if is_current else base)
    except (UserError, KeyError, TypeError, AttributeError):
        pass  # not made yet, or another tool's folder
    source = base_model.parse_source(name, project.home("import").root)
    return str(source.path) if source.is_local else source.hub_id


def options_of_stage(project: Project, stage: Stage) -> dict[str, Any]:
    """The calculator's options for a stage's settings, as its trainer runs them."""
    settings = project.params.section(stage.section)
    method = COUNTED[stage.method].with_params(settings)
    options = {key: getattr(method, key) for key in options_of(method)}
    if (
        getattr(settings, "train_embeddings", "") == "new_rows"
        and "expand_vocab" in project.readable
    ):
        options |= {"embeddings": "new_rows", "new_rows": _new_rows(project)}
    quantization = getattr(settings, "quantization", "none")
    longest = [tokens for tokens in (settings.window, settings.max_length) if tokens]
    return {
        **options,
        "precision": settings.precision if quantization == "none" else quantization,
        "adapter_precision": getattr(settings, "adapter_precision", None),
        "batch": settings.batch_size,
        "tokens_per_batch": settings.tokens_per_batch,
        "sequence": min(longest, default=None),  # None: the calculator's default for the model
        "checkpointing": settings.gradient_checkpointing,
        "optimizer": settings.optimizer,
        "neftune_alpha": settings.neftune_alpha,
        "loss": "chunked" if project.params.origin.imports else None,  # None: by method
    }


def _new_rows(project: Project) -> int:
    from pipeline.files import artifact

    try:
        start, stop = artifact.read_manifest(project.artifact("expand_vocab"))["new_rows"]
        return max(int(stop) - int(start), 1)
    except (UserError, KeyError, TypeError, ValueError):  # it has not run
        return 1


def note_targets(model: Architecture, method: FinetuningMethod) -> str:
    """What training would adapt where the calculator counts its own default targets; empty where it
    counts the same.
    """
    targets = (
        METHODS[method.name].settings.PRETRAINED.get("target_modules") if method.low_rank else None
    )
    if targets is None or model.style.ours or getattr(method, "targets", None) != ("attention",):
        return ""
    more = with_options({method.name: method}, targets=targets)[method.name]
    return (
        f"`lora train` takes --targets {', '.join(targets)}: {trainable(model, more):,} parameters"
    )
