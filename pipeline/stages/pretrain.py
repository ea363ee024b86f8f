"""pretrain: trains a MiniGPT from scratch on the everyday sentences (the document's §9.1), or imports a base model."""

from collections.abc import Generator

import torch

from pipeline.data.tokenizers.word import WordTokenizer, split
from pipeline.errors import UserError
from pipeline.files.base_model import resolve
from pipeline.models.import_base import import_base
from pipeline.models.load import Base, load_base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.models.transformers_model import TransformersModel, refuse_unlike
from pipeline.project.params.sections import Pretrain
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.training.data import prepare_data, save_checkpoint, training_examples
from pipeline.training.loop import TrainingTask, train


def run(job: Job) -> Generator[Event, None, Facts]:
    """Build a tokenizer from the data and train a MiniGPT, or import a checkpoint. Raises UserError."""
    settings = job.project.params.pretrain
    if settings.imports:
        return (yield from _import(job, settings))
    _check_import_only_keys(settings)
    base = _new_model(job, settings)
    batches, evaluation = yield from prepare_data(job, settings, base)
    optimizer = yield from train(job, TrainingTask.of_one(base.model, batches, settings, FULL, evaluation))
    return save_checkpoint(job, base, optimizer)


def _import(job: Job, settings: Pretrain) -> Generator[Event, None, Facts]:
    """Import the base, and check that the stages compute the same logits as transformers."""
    trust = settings.trust_remote_code
    facts = import_base(resolve(settings.base, job.project.root), job.out, settings.dtype, trust)
    model = load_base(job.out, None, trust).model
    if isinstance(model, TransformersModel):
        refuse_unlike(model, settings.base)
    yield Progress(1, 1, facts["architecture"])
    return facts


def _new_model(job: Job, settings: Pretrain) -> Base:
    """An untrained MiniGPT with the data's words as its vocabulary."""
    words = (word for example in training_examples(job, settings) for word in split(example.text))
    tokenizer = WordTokenizer.of_words(words)
    config = MiniGPTConfig(
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
        d_model=settings.d_model,
        layers=settings.layers,
        heads=settings.heads,
        feed_forward=settings.feed_forward,
        max_positions=settings.max_positions,
        tie_embeddings=settings.tie_embeddings,
    )
    torch.manual_seed(settings.seed)
    return Base(MiniGPT(config), tokenizer)


def _check_import_only_keys(settings: Pretrain) -> None:
    """Raises UserError for a setting that only imported bases use."""
    for key, default in (("dtype", "auto"), ("trust_remote_code", False), ("precision", "fp32")):
        if getattr(settings, key) != default:
            raise UserError(
                f"pretrain.{key} applies only to an imported base; MiniGPT is trained in fp32, without remote code. "
                f"Set it to {str(default).lower()}, or set base to a model."
            )
