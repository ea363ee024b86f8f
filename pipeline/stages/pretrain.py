"""pretrain: a MiniGPT from scratch on the everyday sentences (the document's §9.1), or a base from elsewhere."""

from collections.abc import Generator

import torch

from pipeline.calc.settings import FULL
from pipeline.data.tokenizers.word import WordTokenizer, split
from pipeline.errors import UserError
from pipeline.files.base_model import resolve
from pipeline.models.importing.import_base import import_base
from pipeline.models.load import Base, load_base
from pipeline.models.minigpt.model import MiniGPT, MiniGPTConfig
from pipeline.models.transformers_model import TransformersModel, refuse_unlike
from pipeline.project.params.sections import Pretrain
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.training.data import prepare_data, save_checkpoint, training_examples
from pipeline.training.loop import TrainingTask, train


def pretrain(job: Job) -> Generator[Event, None, Facts]:
    """Words of the data → tokenizer → MiniGPT → checkpoint; or an imported checkpoint, as it is."""
    settings = job.project.params.pretrain
    if settings.imports:
        return (yield from _imported(job, settings))
    _refuse_unread(settings)
    base = _new(job, settings)
    batches, evaluation = yield from prepare_data(job, settings, base)
    optimizer = yield from train(job, TrainingTask(base.model, batches, settings, FULL, evaluation))
    return save_checkpoint(job, base, optimizer)


def _imported(job: Job, settings: Pretrain) -> Generator[Event, None, Facts]:
    """The base in the form that all stages read, and the proof that they read it as transformers does."""
    trust = settings.trust_remote_code
    facts = import_base(resolve(settings.base, job.project.root), job.out, settings.dtype, trust)
    model = load_base(job.out, None, trust).model
    if isinstance(model, TransformersModel):
        refuse_unlike(model, settings.base)
    yield Progress(1, 1, facts["architecture"])
    return facts


def _new(job: Job, settings: Pretrain) -> Base:
    """A MiniGPT that knows the data's words and nothing else."""
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


def _refuse_unread(settings: Pretrain) -> None:
    """Raises UserError for a setting that only an import reads."""
    for key, plain in (("dtype", "auto"), ("trust_remote_code", False), ("precision", "fp32")):
        if getattr(settings, key) != plain:
            raise UserError(
                f"pretrain.{key} is for a base that is imported; MiniGPT is trained in fp32 with no code but ours. "
                f"Set it to {str(plain).lower()}, or name a base in base."
            )
