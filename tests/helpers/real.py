"""Toy transformers models as training sees them, the same weights in stock transformers, and
examples to learn.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import InMemoryDataset
from pipeline.models.base import CausalLM
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.project.logs.run_log import Step
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.training.batches import Batch, Batches
from pipeline.training.loop import steps
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.retention import RetentionLoss
from pipeline.training.step import Gradient, Learner, LossPath, gradients
from pipeline.training.task import TrainingTask, build_optimizer
from tests.helpers.families import FAMILIES, MIXTURES
from tests.helpers.projects import make_one

ROWS = 97


def toy(
    name: str, dtype: torch.dtype = torch.float32, std: float = 0.3, **settings: Any
) -> TransformersModel:
    """A family's toy with random weights, their logits far apart."""
    family = {**FAMILIES, **MIXTURES}[name]
    ids = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = {
        **family.config,
        **ids,
        "tie_word_embeddings": family.tied,
        "model_type": family.kind,
        **settings,
    }
    model = from_config(config, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std, generator=generator)
    return model.to(dtype)


def stock(model: TransformersModel) -> Any:
    """The same weights in transformers' own model, with its own attention written out."""
    config = AutoConfig.for_model(**model.describe())
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(model.dtype)
    # a tied head is in the model's own dict alone
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    return theirs.eval()


def loss_alone(theirs: Any, window: Window) -> torch.Tensor:
    """Sum of a sequence's cross-entropies, from all of its logits."""
    logits = theirs(input_ids=torch.tensor([window.ids])).logits[0].float()
    return F.cross_entropy(
        logits, torch.tensor(window.labels), ignore_index=IGNORED, reduction="sum"
    )


def windows_of(
    lengths: Sequence[int], asked: Callable[[int], int] = lambda _: 0, seed: int = 0
) -> list[Window]:
    """Random sequences of so many tokens; the labels of the first `asked(length)` do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, ROWS, (length + 1,), generator=generator).tolist()
        given = asked(length)
        found.append(Window(0, tuple(ids[:-1]), (IGNORED,) * given + tuple(ids[1 + given :])))
    return found


def listed(found: list[Window]) -> InMemoryDataset:
    return InMemoryDataset(found, [f"f.txt:{number}" for number in range(1, len(found) + 1)])


def with_lora(
    model: TransformersModel,
    dtype: torch.dtype | None = None,
    saved: bool = False,
    names: tuple[str, ...] = ("q_proj", "v_proj"),
    **spec: Any,
) -> TransformersModel:
    """The model with LoRA, on queries and values if no other names are given; A and B are no longer
    at zero.
    """
    torch.manual_seed(1)
    attach(
        model,
        AdapterSpec(3, 6.0, names, saved=model.embedding_and_head if saved else (), **spec),
        dtype,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    return model


def trained(
    model: CausalLM, batches: Batches, settings: Training, **task: Any
) -> tuple[list[Step], FlatOptimizer]:
    """Every step of the loop; the model is then as training leaves it."""
    optimizer = build_optimizer(model, settings)
    return list(steps_of(model, batches, settings, optimizer, **task)), optimizer


def steps_of(
    model: CausalLM, batches: Batches, settings: Training, optimizer: FlatOptimizer, **task: Any
) -> Iterator[Step]:
    task_ = TrainingTask.of_one(model.train(), batches, settings, FULL, **task)
    return (record for by_learner in steps(task_, optimizer) for record in by_learner.values())


def gradient_of(
    model: CausalLM,
    batches: list[Batch],
    optimizer: FlatOptimizer,
    retain: RetentionLoss | None = None,
) -> Gradient:
    """Backward through these batches as one step, collected in the optimizer."""
    learner = Learner(Training(), cast(Batches, [batches]), retain)
    return gradients(LossPath(model), [learner], [0], optimizer, 0)[0]


def notes(events: Sequence[Event]) -> str:
    return "\n".join(event.text for event in events)


def run_stage(root: Path, stage: str, overrides: Sequence[str], **options: Any) -> str:
    """Run a stage to its end; returns what it said."""
    return notes(make_one(root, stage, overrides, **options)[1])
