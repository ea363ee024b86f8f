"""pretrain: a MiniGPT from scratch on the everyday sentences (the document's §9.1)."""

from collections.abc import Generator

import torch

from pipeline.calc.settings import FULL
from pipeline.models.base import Base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.runner import Event, Facts, Job
from pipeline.tokenizer import WordTokenizer, split
from pipeline.training.loop import train
from pipeline.training.task import batches_of, examples_of, save_checkpoint


def pretrain(job: Job) -> Generator[Event, None, Facts]:
    """Words of the data → tokenizer → MiniGPT → checkpoint."""
    settings = job.project.params.pretrain
    examples = examples_of(job, settings)
    tokenizer = WordTokenizer.of_words(word for example in examples for word in split(example.text))
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
    model = MiniGPT(config)
    batches = batches_of(examples, settings, tokenizer, config.max_positions)
    yield from train(job, model, batches, settings, FULL)
    return save_checkpoint(job, Base(model, tokenizer))
