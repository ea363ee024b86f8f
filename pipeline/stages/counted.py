"""What a project trains, in the calculator's terms: its model, and a section's settings as options."""

from __future__ import annotations

from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.method import FinetuningMethod, trainable, with_options
from pipeline.calc.settings import options_of
from pipeline.errors import UserError
from pipeline.project.stage_graph import Project, Stage
from pipeline.stages.registry import COUNTED, METHODS


def counted_stage(project: Project) -> Stage:
    """The stage that the calculator counts of a project: LoRA, unless it trains by other methods alone."""
    own = [stage for stage in project.stages.values() if stage.method in COUNTED and stage.kind != "adapters"]
    lora = METHODS["lora"]
    return lora if lora in own or not own else own[0]


def model_source(project: Project) -> str:
    """The name or path that the calculator opens: a checkpoint that the pipeline made of the base, else the base."""
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
    if getattr(settings, "train_embeddings", "") == "new_rows" and "expand_vocab" in project.readable:
        options |= {"embeddings": "new_rows", "new_rows": _new_rows(project)}
    quantization = getattr(settings, "quantization", "none")
    longest = [tokens for tokens in (settings.window, settings.max_length) if tokens]
    return {
        **options,
        "precision": settings.precision if quantization == "none" else quantization,
        "adapter_precision": getattr(settings, "adapter_precision", None),
        "batch": settings.batch_size,
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
    """What training would adapt where the calculator counts the document's targets; empty where it counts the same."""
    targets = METHODS[method.name].settings.PRETRAINED.get("target_modules") if method.low_rank else None
    if targets is None or model.style.ours or getattr(method, "targets", None) != ("attention",):
        return ""
    more = with_options({method.name: method}, targets=targets)[method.name]
    return f"`lora train` takes --targets {', '.join(targets)}: {trainable(model, more):,} parameters"
