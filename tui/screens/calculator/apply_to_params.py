"""Convert between the calculator's form and the fine-tuning sections of a project's params.yaml."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pipeline.calc.architecture import Architecture
from pipeline.calc.method import ranks
from pipeline.calc.open_model import built_in, open_model
from pipeline.errors import UserError
from pipeline.files import artifact, base_model
from pipeline.project.params.load import Params
from pipeline.project.params.sections import Precision, Quantization
from pipeline.project.stage_graph import Project
from pipeline.stages.methods.freeze import Freeze
from pipeline.stages.methods.lora import Lora
from tui.screens.calculator.model import CalculatorQuery, Result

MINIGPT = "MiniGPT"


def query_from_project(project: Project) -> CalculatorQuery:
    """The query that describes `finetune_lora` as the trainer runs it. Raises UserError if the base is invalid."""
    lora, imports = project.params.finetune_lora, project.params.pretrain.imports
    # if empty, the calculator's default for the model applies
    longest = [tokens for tokens in (lora.window, lora.max_length) if tokens]
    return CalculatorQuery(
        model=_model_source(project),
        rank=str(lora.rank),
        alpha=f"{lora.alpha:g}",
        targets=", ".join(lora.target_modules),
        embeddings=lora.train_embeddings,
        new_rows=str(_new_rows(project)),
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
    return (
        (pretrain.base, open_model(_model_source(project)).shapes)
        if pretrain.imports
        else (MINIGPT, built_in("minigpt").shapes)
    )


def _model_source(project: Project) -> str:
    """The name or path that the calculator opens: a checkpoint that the pipeline made of the base, else the base."""
    pretrain = project.params.pretrain
    if not pretrain.imports:
        return "minigpt"
    for folder in _made_checkpoints(project):
        return str(folder)
    source = base_model.parse_source(pretrain.base, project.home("pretrain").root)
    return str(source.path) if source.is_local else source.hub_id


def _made_checkpoints(project: Project) -> Iterator[Path]:
    """The checkpoints that the pipeline made of the current base, the expanded one first."""
    base, expanded = map(project.artifact, ("pretrain", "expand_vocab"))
    try:
        imported = artifact.read_manifest(base)
        if imported["params"]["base"] != base_model.shared_name(project.params.pretrain.base):
            return
        made_from = artifact.read_manifest(expanded)["inputs"] if expanded.is_dir() else {}
        if made_from.get("artifacts/base") == artifact.sealed_digest(imported):
            yield expanded
        yield base
    except (UserError, KeyError, TypeError, AttributeError):  # another tool's folder
        return


def _new_rows(project: Project) -> int:
    """How many embedding rows expand_vocab added; 1 if it has not run."""
    try:
        start, stop = artifact.read_manifest(project.artifact("expand_vocab"))["new_rows"]
        return max(int(stop) - int(start), 1)
    except (UserError, KeyError, TypeError, ValueError):
        return 1


def params_from_result(
    query: CalculatorQuery, result: Result, params: Params, trained: tuple[str, Architecture]
) -> dict[str, Any]:
    """The params of a configuration as `section.key` → value. Raises UserError if this project cannot train it."""
    method, run = result.method, result.run
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
    if isinstance(method, Freeze):
        _check_last_blocks(method.last_blocks, params, trained)
        values |= {"last_blocks": method.last_blocks, "train_embeddings": method.train_embeddings}
    if isinstance(method, Lora):
        name, model = trained
        try:
            ranks(model, method)
        except UserError as error:
            raise UserError(f"{name}, the model of this project, does not have these targets. {error}") from None
        values |= {"rank": method.rank, "alpha": method.effective_alpha, "target_modules": list(method.targets)}
        values |= {"train_embeddings": method.embeddings, "adapter_precision": run.adapter_precision}
        values |= {"quantization": quantization}
    return {f"finetune_{method.name}.{key}": value for key, value in values.items()}


def _check_last_blocks(last_blocks: int, params: Params, trained: tuple[str, Architecture]) -> None:
    name, model = trained
    blocks = len(model.blocks) if params.pretrain.imports else params.pretrain.layers
    if last_blocks > blocks:
        key = "" if params.pretrain.imports else " (pretrain.layers)"
        raise UserError(f"last-blocks must be at most {blocks}, the blocks of {name}{key}, got {last_blocks}.")


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
