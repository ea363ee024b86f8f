"""TRL's trainers on the batches of our preference losses: their losses, rewards and gradients
beside ours.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from pipeline.adapters.attach import disable_adapter, tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.data.examples import IGNORED, Window
from pipeline.models.transformers_model import TransformersModel
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.training.preferences.batches import Answers, answer_batch, batch_of
from pipeline.training.preferences.losses import likelihood, preference

TOKENS = 60  # of a tokenizer that the trainers ask for, and whose ids no batch has


def answers_of(windows: Sequence[Window], **more: Any) -> Answers:
    return Answers(
        windows, lambda n: f"f.jsonl:{n + 1}", ((range(len(windows) // 2), 1.0),), **more
    )


def reference_of(model: TransformersModel, answers: Answers) -> Tensor:
    with torch.no_grad(), disable_adapter(model):
        return likelihood(model, batch_of(answers, range(len(answers.windows)))).summed


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{n}": n for n in range(TOKENS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t1", pad_token="t1", bos_token="t0"
    )


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def ids_of(window: Window) -> list[int]:
    return [*window.ids, window.labels[-1]]


def mask_of(window: Window) -> list[int]:
    return [0, *(int(label != IGNORED) for label in window.labels)]


def inputs_of(windows: Sequence[Window], prefix: str = "") -> dict[str, Tensor]:
    """TRL's batch: padded, with a mask of the answers."""
    return {
        f"{prefix}input_ids": padded([ids_of(one) for one in windows], 1),
        f"{prefix}attention_mask": padded([[1] * len(ids_of(one)) for one in windows], 0),
        f"{prefix}completion_mask": padded([mask_of(one) for one in windows], 0),
    }


def trainer_of(
    kind: Any, config: Any, model: Any, folder: Path, rows: dict[str, list[Any]], **options: Any
) -> Any:
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = config(str(folder / "trl"), **plain, **options)
    trainer = kind(
        model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer()
    )
    if "ref" in model.peft_config:  # a copy of the adapter; without it, the reference is the base
        model.delete_adapter("ref")
    return trainer


PAIR = {"prompt": ["t5 t6"], "chosen": ["t7 t8"], "rejected": ["t9"]}


def of_dpo(
    model: Any, windows: Sequence[Window], folder: Path, **options: Any
) -> tuple[Tensor, list[float]]:
    trainer = trainer_of(DPOTrainer, DPOConfig, model, folder, PAIR, **options)
    loss = trainer.compute_loss(trainer.model.train(), inputs_of([*windows[::2], *windows[1::2]]))
    return loss, [
        trainer._metrics["train"][f"rewards/{name}"][0] for name in ("chosen", "rejected")
    ]


def of_kto(
    model: Any, windows: Sequence[Window], folder: Path, **options: Any
) -> tuple[Tensor, list[float]]:
    rows: dict[str, list[Any]] = {
        "prompt": ["t5", "t6"],
        "completion": ["t7", "t8"],
        "label": [True, False],
    }
    trainer = trainer_of(KTOTrainer, KTOConfig, model, folder, rows, **options)
    inputs = {
        **inputs_of(windows[::2]),
        **inputs_of(windows[1::2], "KL_"),
        "label": torch.tensor(LABELS),
    }
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    return loss, []


LABELS = [True, False, False]


def concatenated(windows: Sequence[Window]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, some in (("chosen", windows[::2]), ("rejected", windows[1::2])):
        found |= {f"{name}_{key}": value for key, value in inputs_of(some).items()}
        marks = found.pop(f"{name}_completion_mask")
        found[f"{name}_labels"] = found[f"{name}_input_ids"].masked_fill(marks == 0, IGNORED)
    return found


def of_cpo(
    model: Any, windows: Sequence[Window], folder: Path, **options: Any
) -> tuple[Tensor, list[float]]:
    trainer = trainer_of(
        CPOTrainer, CPOConfig, model, folder, PAIR, loss_type="simpo", cpo_alpha=0.0, **options
    )
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.train(), concatenated(windows))
    return loss, [metrics[f"rewards/{name}"] for name in ("chosen", "rejected")]


def of_orpo(
    model: Any, windows: Sequence[Window], folder: Path, **options: Any
) -> tuple[Tensor, list[float]]:
    trainer = trainer_of(ORPOTrainer, ORPOConfig, model, folder, PAIR, **options)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.train(), concatenated(windows))
    return loss, [float(metrics[f"rewards/{name}"]) for name in ("chosen", "rejected")]


Theirs = Callable[..., tuple[Tensor, list[float]]]
CASES: dict[str, tuple[dict[str, Any], Theirs, dict[str, Any]]] = {
    "dpo": ({"loss": "dpo", "beta": 0.3}, of_dpo, {"beta": 0.3}),
    "dpo with the chosen answers' likelihood": (
        {"loss": "dpo", "beta": 0.2, "rpo_alpha": 0.7},
        of_dpo,
        {"beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    "ipo": ({"loss": "ipo", "beta": 0.4}, of_dpo, {"beta": 0.4, "loss_type": ["ipo"]}),
    "kto": ({"loss": "kto", "beta": 0.2}, of_kto, {"beta": 0.2}),
    "orpo": ({"loss": "orpo", "beta": 0.3}, of_orpo, {"beta": 0.3}),
    "simpo": (
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.7},
        of_cpo,
        {"beta": 2.0, "simpo_gamma": 0.7},
    ),
    "simpo, smoothed": (
        {"loss": "simpo", "beta": 2.0, "label_smoothing": 0.1},
        of_cpo,
        {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
    ),
}


class Compared(NamedTuple):
    """(ours, TRL's) of a batch: the losses, the mean rewards of both kinds, each tensor's
    gradient.
    """

    losses: tuple[Tensor, Tensor]
    rewards: list[tuple[float, float]]
    gradients: dict[str, tuple[Tensor, Tensor]]


def compared(
    ours: TransformersModel,
    plain: Any,
    spec: AdapterSpec,
    windows: Sequence[Window],
    case: str,
    folder: Path,
) -> Compared:
    """The loss `case` of three pairs by both. `plain`: transformers' model with the weights of the
    base of `ours`.
    """
    save_adapter(folder, ours, spec, "base")
    theirs = PeftModel.from_pretrained(plain, folder, is_trainable=True)
    given, of_trl, options = CASES[case]
    settings = FinetuneDpo(**given)
    more: dict[str, Any] = {"whole": settings.loss == "orpo"}
    if settings.loss == "kto":
        more["desirable"] = LABELS
    answers = answers_of(windows, **more)
    if settings.loss in ("dpo", "ipo", "kto"):
        answers = answers_of(windows, reference=reference_of(ours, answers), **more)
    mine = preference(ours.train(), answer_batch(answers, range(3)), settings)
    torch.autograd.backward(mine.loss)
    loss, rewards = of_trl(theirs, windows, folder, **options)
    torch.autograd.backward(loss)
    wanted = {
        name.replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: parameter.grad for name, parameter in tensors(ours, spec).items()}
    return Compared(
        (mine.loss.detach(), loss.detach()),
        [
            (one.mean().item(), float(other))
            for one, other in zip((mine.chosen, mine.rejected), rewards, strict=False)
        ],
        {name: (grad, wanted[name]) for name, grad in found.items() if grad is not None},
    )
