"""What every training stage does before and after the loop: settings → batches, trained model → checkpoint."""

from shutil import copyfile

from pipeline.artifact import base_fingerprint
from pipeline.data import Example, read_examples, windows
from pipeline.metrics import LOSS
from pipeline.models.base import Base, count, save_base
from pipeline.params import Training
from pipeline.runner import Facts, Job
from pipeline.tokenizer import WordTokenizer
from pipeline.training.batches import Batches


def examples_of(job: Job, settings: Training) -> list[Example]:
    return read_examples(job.path(settings.data), settings.data)


def batches_of(examples: list[Example], settings: Training, tokenizer: WordTokenizer, max_positions: int) -> Batches:
    """Every example's windows. Raises UserError on an unknown word or a line that is too long."""
    ids = [tokenizer.encode_example(example, max_positions) for example in examples]
    cut = [window for one in ids for window in windows(one, settings.window)]
    return Batches(cut, settings.batch_size, settings.seed, tokenizer.pad_id)


def save_curve(job: Job) -> None:
    """The run's loss.csv, beside what it trained."""
    copyfile(job.run / LOSS, job.out / LOSS)


def save_checkpoint(job: Job, base: Base) -> Facts:
    """The trained model and its loss curve; returns what the manifest says of them."""
    parameters = count(base.model)
    save_base(job.out, base)
    save_curve(job)
    return {"parameters": parameters, "fingerprint": base_fingerprint(job.out)}
