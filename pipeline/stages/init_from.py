"""`finetune_lora.init_from`: the adapter to continue from, and the state of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapters.config import LORA, AdapterConfig
from pipeline.adapters.folder import refuse_foreign
from pipeline.adapters.peft import StoredLora, read_lora
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.save import load_tensors
from pipeline.project.params.sections import data_files
from pipeline.stages.finetune import Continued
from pipeline.training.parallel.collectives import broadcast_object
from pipeline.training.saving import STATE

if TYPE_CHECKING:
    from pipeline.models.base import CausalLM
    from pipeline.project.runner import Job

# The settings on which the order of the batches depends, beside the data files.
ORDER = (
    "seed",
    "batch_size",
    "gradient_accumulation_steps",
    "window",
    "max_length",
    "columns",
    "chat_template",
    "eval_share",
    "retention_batch_size",
)


def read_init(
    job: Job, model: CausalLM, base_folder: Path, name: str
) -> tuple[StoredLora, Continued]:
    """The adapter `name` of `init_from`, and what continues of its run. Raises UserError."""
    key = f"{job.stage.name}.init_from"
    folder = job.path(name)
    if folder.resolve().is_relative_to(job.project.artifact(job.stage.name).resolve()):
        raise UserError(
            f"{key} is {name}, which this stage itself writes. Copy the folder to another place "
            "and name that."
        )
    config = AdapterConfig.read(folder)
    if config.kind != LORA:
        raise UserError(
            f"{key}: {config.path} is of type {config.kind}; only LoRA can be trained on. Name "
            "another one."
        )
    refuse_foreign(base_folder, folder)
    return read_lora(model, base_folder, config), _continued(job, folder)


def _continued(job: Job, folder: Path) -> Continued:
    if not (folder / STATE).is_file() or not (folder / artifact.MANIFEST).is_file():
        return Continued()
    manifest = artifact.read_manifest(folder)
    # a trial has no facts, and other ranks have none either
    same = broadcast_object(bool(job.input_facts) and _order(manifest) == _order(job.input_facts))
    return Continued(load_tensors(folder / STATE), manifest["optimizer"]["steps"] if same else 0)


def _order(manifest: Mapping[str, Any]) -> list[Any]:
    """What the order of a run's batches depends on; of a file its content, weight and columns."""
    params, inputs = manifest["params"], manifest["inputs"]
    data = params["data"] if isinstance(params["data"], str) else tuple(params["data"])
    files = [(inputs[file.path], file.weight, file.columns) for file in data_files(data)]
    others = [inputs.get(params[key]) for key in ("eval_data", "retention_data")]
    # the manifest of an earlier version has fewer keys
    return [files, others, *(params.get(key) for key in ORDER)]
