"""pretrain: trains a MiniGPT from scratch on everyday sentences."""

from collections.abc import Generator
from functools import partial

import torch

from pipeline.data.tokenizers.word import WordTokenizer, split
from pipeline.errors import UserError
from pipeline.models.load import Base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.project.params.sections import Import, Pretrain
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.training.data import asked_while_training, prepare_data, training_examples
from pipeline.training.loop import train
from pipeline.training.saving import finish, save_checkpoint
from pipeline.training.task import TrainingTask


def run(job: Job) -> Generator[Event, None, Facts]:
    """Build a tokenizer from the data and train a MiniGPT. Raises UserError."""
    settings = job.project.params.pretrain
    _check_import_only_keys(job.project.params.origin, settings)
    base = _new_model(job, settings)
    batches, evaluation = yield from prepare_data(job, settings, base)
    asked = asked_while_training(job, settings, base)
    save = partial(save_checkpoint, base=base)
    task = TrainingTask.of_one(base.model, batches, settings, FULL, evaluation, save=save, **asked)
    optimizer = yield from train(job, task)
    return finish(job, task, optimizer)


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


def _check_import_only_keys(origin: Import, settings: Pretrain) -> None:
    """Raises UserError for a setting that only imported bases use."""
    for key, value, default in (
        ("import.dtype", origin.dtype, Import().dtype),
        ("import.trust_remote_code", origin.trust_remote_code, Import().trust_remote_code),
        ("pretrain.precision", settings.precision, Pretrain().precision),
    ):
        if value != default:
            raise UserError(
                f"{key} applies only to an imported base; MiniGPT is trained in fp32, without "
                f"remote code. Set it to {str(default).lower()}, or set base to a model."
            )
