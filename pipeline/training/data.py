"""What every training stage does before and after the loop: settings → sequences, trained model → checkpoint."""

from collections.abc import Generator, Iterator
from shutil import copyfile
from typing import TYPE_CHECKING

import torch

from pipeline.data.examples import Example, in_evaluation, iter_examples
from pipeline.data.masking import encoder
from pipeline.data.token_file import Corpus, refuse_nothing
from pipeline.data.windows import Dataset, dataset_from
from pipeline.errors import UserError
from pipeline.files.base_model import base_fingerprint
from pipeline.models.base import CausalLM
from pipeline.models.load import Base, count, save_base
from pipeline.project.logs.run_log import LOSS
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Facts, Job, Note
from pipeline.training.batches import Batches
from pipeline.training.optimizer import FlatAdam
from pipeline.training.schedule import refuse_long_warmup

if TYPE_CHECKING:
    from pipeline.training.evaluation import Evaluation


def examples_of(job: Job, settings: Training) -> Iterator[Example]:
    """Those of each data file, in order."""
    return (example for name in settings.files for example in iter_examples(job.path(name), name))


def data_of(job: Job, settings: Training, base: Base) -> Generator[Event, None, tuple[Batches, "Evaluation | None"]]:
    """The batches, and the evaluation where examples are held out for it. Raises UserError as `datasets_for`."""
    learned, held_out = yield from datasets_for(job, settings, base)
    batches = Batches(learned, settings.batch_size, settings.seed, settings.accumulate)
    refuse_long_warmup(settings, settings.epochs * len(batches), job.stage.section)
    if held_out is None:
        return batches, None
    from pipeline.training.evaluation import Evaluation  # only for runs that hold examples out

    return batches, Evaluation(held_out, settings.batch_size, settings.eval_every or len(batches), settings.patience)


def datasets_for(job: Job, settings: Training, base: Base) -> Generator[Event, None, tuple[Dataset, Dataset | None]]:
    """What is learned, and what is held out to evaluate on; notes what was cut or left out.

    Raises UserError for an example that cannot be learned from, and where nothing is left to learn.
    """
    learned = yield from _corpus(job, settings, base, held_out=False)
    named = ", ".join(settings.files)
    share = settings.eval_share
    if not share:
        refuse_nothing(learned, named)
        _refuse_unused(job, settings)
        return dataset_from(learned, settings.window), None
    held_out = yield from _corpus(job, settings, base, held_out=True)
    split = f"{job.stage.section}.eval_share {share:g} of {named} holds out"
    if not len(learned) and len(held_out):
        raise UserError(
            f"{split} all {len(held_out)} examples that have labels: they are chosen by their hash. Lower it, or set "
            "it to 0."
        )
    refuse_nothing(learned, named)
    if not len(held_out):
        raise UserError(f"{split} no example: they are chosen by their hash. Raise it, or set it to 0.")
    return dataset_from(learned, settings.window), dataset_from(held_out, settings.window)


def _refuse_unused(job: Job, settings: Training) -> None:
    for key in ("eval_every", "patience"):
        if getattr(settings, key):
            raise UserError(
                f"{job.stage.section}.{key} is {getattr(settings, key)}, but nothing is held out to evaluate on. "
                f"Set {job.stage.section}.eval_share above 0."
            )


def _corpus(job: Job, settings: Training, base: Base, held_out: bool) -> Generator[Event, None, Corpus]:
    folder = job.run / "tokens" / ("evaluation" if held_out else "training")
    folder.mkdir(parents=True, exist_ok=True)
    examples = (e for e in examples_of(job, settings) if in_evaluation(e, settings.eval_share) == held_out)
    virtual = base.model.shape.positions - base.model.max_length
    encodes = encoder(base.tokenizer, settings.max_length, base.model.shape.positions, virtual)
    corpus = Corpus.build(examples, encodes, folder)
    found = corpus.statistics
    if found.truncated:
        left_out = f", {found.unlabelled} of them left out: their labels were cut off" if found.unlabelled else ""
        cut = f"{found.truncated} examples were cut after {settings.max_length} tokens"
        yield Note(f"{job.stage.name}: {cut}{left_out}")
    elif found.unlabelled:
        yield Note(f"{job.stage.name}: {found.unlabelled} examples left out: nothing in them is to be learned")
    return corpus


def save_curve(job: Job) -> None:
    """The run's loss.csv, beside what it trained."""
    copyfile(job.run / LOSS, job.out / LOSS)


@torch.no_grad()
def save_checkpoint(job: Job, base: Base, optimizer: FlatAdam, trained_from: CausalLM | None = None) -> Facts:
    """The trained model and its loss curve; returns what the manifest says of them.

    What a model that trained in other bits than it is stored in has learned, in full precision, is added to the one
    that it was trained from: what was frozen, or never read, stays bit for bit.
    """
    parameters = count(base.model)
    model = base.model.to("cpu")
    if trained_from is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        trained = {names[id(p)]: (p.dtype, weights.cpu()) for p, weights in optimizer.trained()}
        model = trained_from
        for name, (dtype, weights) in trained.items():
            stored = model.get_parameter(name)
            stored.copy_(stored.float() + (weights - stored.to(dtype).float()))
    save_base(job.out, Base(model, base.tokenizer))
    save_curve(job)
    return {"parameters": parameters, "fingerprint": base_fingerprint(job.out)}
