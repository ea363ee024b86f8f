"""Convert between the calculator's form and the fine-tuning sections of a project's params.yaml."""

from typing import Any, get_args

from pipeline.calc.architecture import Architecture
from pipeline.calc.parameters import ranks
from pipeline.calc.sources.open_model import built_in, open_model
from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.project.params.sections import Params, Precision, Quantization
from pipeline.project.stage_graph import STAGES, Project
from tui.screens.calculator.query import CalculatorQuery, Result


def query_from_project(project: Project) -> CalculatorQuery:
    """The query that describes `finetune_lora` as the trainer runs it. Raises UserError if the base is invalid."""
    lora, imports = project.params.finetune_lora, project.params.pretrain.imports
    try:
        start, stop = artifact.read_manifest(project.artifact("expand_vocab"))["new_rows"]
        new_rows = max(int(stop) - int(start), 1)
    except (UserError, KeyError, TypeError, ValueError):  # it has not run
        new_rows = 1
    # if empty, the calculator's default for the model applies
    longest = [tokens for tokens in (lora.window, lora.max_length) if tokens]
    return CalculatorQuery(
        model=_model_source(project),
        rank=str(lora.rank),
        alpha=f"{lora.alpha:g}",
        targets=", ".join(lora.target_modules),
        embeddings=lora.train_embeddings,
        new_rows=str(new_rows),
        precision=lora.precision if lora.quantization == "none" else lora.quantization,
        adapter_precision=lora.adapter_precision,
        batch=str(lora.batch_size),
        sequence=str(min(longest)) if longest else "",
        checkpointing=lora.gradient_checkpointing,
        optimizer="adam-flat",
        loss="chunked" if imports else "full",
    )


def trained_model(project: Project) -> tuple[str, Architecture]:
    """The model that this project trains: its name in messages, and its shapes. Reads files. Raises UserError."""
    pretrain = project.params.pretrain
    if not pretrain.imports:
        return "MiniGPT", built_in("minigpt").shapes
    return pretrain.base, open_model(_model_source(project)).shapes


def _model_source(project: Project) -> str:
    """The name or path that the calculator opens: a checkpoint that the pipeline made of the base, else the base."""
    name = project.params.pretrain.base
    if not project.params.pretrain.imports:
        return "minigpt"
    base, expanded = map(project.artifact, ("pretrain", "expand_vocab"))
    try:
        imported = artifact.read_manifest(base)
        if imported["params"]["base"] == base_model.shared_name(name):
            made_from = artifact.read_manifest(expanded)["inputs"] if expanded.is_dir() else {}
            is_current = made_from.get(STAGES["pretrain"].path) == artifact.sealed_digest(imported)
            return str(expanded if is_current else base)
    except (UserError, KeyError, TypeError, AttributeError):
        pass  # not made yet, or another tool's folder
    source = base_model.parse_source(name, project.home("pretrain").root)
    return str(source.path) if source.is_local else source.hub_id


def params_from_result(
    query: CalculatorQuery, result: Result, params: Params, trained: tuple[str, Architecture]
) -> dict[str, Any]:
    """The params of a configuration as `section.key` → value. Raises UserError if this project cannot train it."""
    method, run, (name, model) = result.method, result.run, trained
    if query.method not in ("full", "freeze", "lora", "qlora"):
        raise UserError(f"{query.method} is not trainable here yet. Choose lora, qlora, freeze or full.")
    quantization = run.precision if run.precision in get_args(Quantization) else "none"
    # the calculator assumes bf16 for what is not quantized
    precision = "bf16" if quantization != "none" else run.precision
    if precision not in get_args(Precision):
        choices = "fp32, bf16, fp16, int8, nf4 or nf4-dq"
        raise UserError(f"{run.precision} weights are not trainable here yet. Choose {choices}.")
    values: dict[str, Any] = {
        "batch_size": run.batch,
        "precision": precision,
        "gradient_checkpointing": run.checkpointing,
    }
    if method.kind == "freeze":
        # MiniGPT has as many blocks as params.yaml says, which may not be trained yet.
        blocks = len(model.blocks) if params.pretrain.imports else params.pretrain.layers
        if method.last_blocks > blocks:
            key = "" if params.pretrain.imports else " (pretrain.layers)"
            raise UserError(
                f"last-blocks must be at most {blocks}, the blocks of {name}{key}, got {method.last_blocks}."
            )
        values |= {"last_blocks": method.last_blocks, "train_embeddings": method.train_embeddings}
    if method.kind == "lora":
        try:
            ranks(model, method)
        except UserError as error:
            raise UserError(f"{name}, the model of this project, does not have these targets. {error}") from None
        values |= {"rank": method.rank, "alpha": method.alpha, "target_modules": list(method.targets)}
        values |= {"train_embeddings": method.embeddings, "adapter_precision": run.adapter_precision}
        values |= {"quantization": quantization}
    return {f"finetune_{method.kind}.{key}": value for key, value in values.items()}


def differences(params: Params, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`section.key` → (current value, new value) of the values that differ."""
    changes = {}
    for key, new in values.items():
        section, _, name = key.partition(".")
        old = getattr(getattr(params, section), name)
        old = list(old) if isinstance(old, tuple) else old
        if old != new:
            changes[key] = (old, new)
    return changes
