"""What every training stage does before the loop: settings become batches and prompts."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, TypedDict

from pipeline.data.examples import Example, in_evaluation
from pipeline.data.formats import iter_examples
from pipeline.data.masking import Encoded, Encoder
from pipeline.data.windows import Corpus, Dataset, dataset_from, refuse_empty
from pipeline.errors import UserError
from pipeline.models.load import Base
from pipeline.project.logs.run_log import Sample
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Job, Note
from pipeline.training.batches import Batches
from pipeline.training.optimizer import refuse_long_warmup
from pipeline.training.step import Evaluation

if TYPE_CHECKING:  # a run without samples does not load it
    from pipeline.data.answers.questions import Question

MAX_TOKENS = 20  # of a sample's answer, as `lora prompt`


def training_examples(
    job: Job, settings: Training, on_note: Callable[[str], None] | None = None
) -> Iterator[Example]:
    """The examples of all data files, in order. Raises UserError."""
    readers = (
        iter_examples(
            job.path(file.path),
            file.path,
            columns=file.columns,
            on_note=on_note,
            templated=settings.templated,
        )
        for file in settings.data_files
    )
    return islice(chain.from_iterable(readers), job.sample)


def held_out_examples(job: Job, settings: Training) -> Iterator[Example]:
    """The examples of eval_data, or those that eval_share selects; none without either."""
    if settings.eval_data:
        path, name = job.path(settings.eval_data), settings.eval_data
        return iter_examples(path, name, columns=settings.columns, templated=settings.templated)
    return (
        example
        for example in training_examples(job, settings)
        if in_evaluation(example, settings.eval_share)
    )


def prepare_data(
    job: Job, settings: Training, base: Base, first: int = 0
) -> Generator[Event, None, tuple[Batches, Evaluation | None]]:
    """The batches, after the `first` steps of a run before, and the evaluation if there is one.

    Raises UserError as `build_datasets` does.
    """
    training, held_out = yield from build_datasets(job, settings, base)
    batches = Batches.of(training, settings, first)
    refuse_long_warmup(settings, len(batches), job.stage.section)
    if held_out is None:
        return batches, None
    in_order = Batches.held_out(held_out, settings)
    return batches, Evaluation.of(settings, in_order, len(batches))


def build_datasets(
    job: Job, settings: Training, base: Base
) -> Generator[Event, None, tuple[Dataset, Dataset | None]]:
    """(training set, evaluation set or None). Raises UserError as `build_corpora` does."""
    training, held_out = yield from build_corpora(job, settings, base)
    evaluation = None if held_out is None else dataset_from(held_out, settings.window)
    return dataset_from(training, settings.window), evaluation


Encode = Callable[[Encoder, Iterable[Example]], Iterator[tuple[Example, Encoded]]]


def build_corpora(
    job: Job, settings: Training, base: Base, encode: Encode = Encoder.each
) -> Generator[Event, None, tuple[Corpus, Corpus | None]]:
    """The encoded examples to train on and those to evaluate on, if there are.

    All are read and tokenized once. Yields notes on examples that were truncated or skipped. Raises
    UserError for an invalid example, for an empty training set and for an empty evaluation set.
    """
    files, section, share = ", ".join(settings.files), job.stage.section, settings.eval_share
    if share and settings.eval_data:
        raise UserError(
            f"{section} sets eval_share and eval_data, which exclude each other. Remove one of "
            "them."
        )
    # virtual tokens take the first positions
    positions = base.model.shape.positions
    virtual = positions - base.model.max_length
    encoder = Encoder(base.tokenizer, settings.max_length, positions, virtual)
    weights = {file.path: file.weight for file in settings.data_files}
    notes = list[str]()
    training = Corpus(job.run / "tokens/training", weights)
    held_out = Corpus(job.run / "tokens/evaluation")
    with training, held_out:
        for example, encoded in encode(encoder, _marked_examples(job, settings, notes.append)):
            (held_out if example.held_out else training).add(example, encoded)

    yield from _corpus_notes(job, settings, training)
    yield from (Note(f"{job.stage.name}: {note}") for note in notes)
    if not share and not settings.eval_data:
        refuse_empty(training, files)
        for key in ("eval_steps", "patience", "load_best"):
            if value := getattr(settings, key):
                raise UserError(
                    f"{section}.{key} is {str(value).lower()}, but there is no evaluation set. Set "
                    f"{section}.eval_share above 0."
                )
        return training, None

    yield from _corpus_notes(job, settings, held_out)
    if settings.eval_data:
        refuse_empty(held_out, settings.eval_data)
        refuse_empty(training, files)
        return training, held_out
    selection = f"{section}.eval_share {share:g} selects"
    if not len(training) and len(held_out):
        raise UserError(
            f"{selection} all {len(held_out)} labelled examples of {files} (the split is by "
            "hash). Decrease it, or set it to 0."
        )
    refuse_empty(training, files)
    if not len(held_out):
        raise UserError(
            f"{selection} 0 of {len(training)} labelled examples of {files} (the split is by "
            "hash). Increase it, or set it to 0."
        )
    return training, held_out


def _marked_examples(
    job: Job, settings: Training, on_note: Callable[[str], None]
) -> Iterator[Example]:
    """The examples to train on, then those of eval_data; what is held out is marked."""
    for example in training_examples(job, settings, on_note):
        is_held_out = in_evaluation(example, settings.eval_share)
        yield replace(example, held_out=True) if is_held_out else example
    if settings.eval_data:
        for example in held_out_examples(job, settings):
            yield replace(example, held_out=True)


def _corpus_notes(job: Job, settings: Training, corpus: Corpus) -> Iterator[Note]:
    counts = corpus.statistics
    if counts.truncated:
        note = f"{counts.truncated} examples truncated to {settings.max_length} tokens"
        yield Note(f"{job.stage.name}: {note}")
    if counts.unlabelled:
        yield Note(f"{job.stage.name}: {counts.unlabelled} examples skipped: no token is labelled")


@dataclass(frozen=True)
class Prompts:
    """What a model is asked while it trains."""

    base: Base
    questions: "Sequence[Question]"
    ids: Sequence[Sequence[int]]  # of each question
    every: int = 0  # steps between two rounds; 0: as evaluations

    def answers(self, step: int) -> list[Sample]:
        """The model's greedy answers as it is now.

        They change nothing that is trained: no random number is drawn.
        """
        model = self.base.model
        model.eval()
        try:
            answers = self._generate()
        finally:
            model.train()
        pairs = zip(self.questions, answers, strict=True)
        return [
            Sample(step, question.asked, answer, question.expected) for question, answer in pairs
        ]

    def _generate(self) -> Sequence[str | None]:
        from pipeline.models.generate import generate_all

        tokenizer = self.base.tokenizer
        try:
            limits = [question.limit for question in self.questions]
            tokens = generate_all(self.base.model, self.ids, tokenizer.end_ids, limits)
        except UserError:  # not finite: the next step finds it out, and says it better
            return [None] * len(self.questions)
        return ["".join(map(tokenizer.stream(), ids)).strip() for ids in tokens]


class Asked(TypedDict):
    """What the learners are asked while they train, by the names of TrainingTask's fields."""

    prompts: Prompts | None
    questions: Prompts | None


def asked_while_training(job: Job, settings: Training, base: Base) -> Asked:
    """The prompts and the held-out examples of the stage's `samples`. Raises UserError."""
    return {
        "prompts": read_prompts(job, settings, base),
        "questions": held_out_questions(job, settings, base),
    }


def read_prompts(job: Job, settings: Training, base: Base) -> Prompts | None:
    """The prompts of the stage's `samples`; None without.

    Raises UserError for one that the model cannot read.
    """
    if not settings.samples.get("prompts"):
        return None
    from pipeline.data.answers.questions import Question

    # with the decoder, which other runs do not load
    from pipeline.models.generate import encode_prompt

    asked, ids = list[Question](), list[Sequence[int]]()
    limit = settings.samples.get("max_tokens", MAX_TOKENS)
    for number, prompt in enumerate(settings.samples["prompts"]):
        key = f"{job.stage.section}.samples.prompts[{number}]"
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if not isinstance(prompt, str) and not base.tokenizer.has_template:
            raise UserError(
                f"{key} has messages, but the base has no chat template. Give it as a text."
            )
        if isinstance(prompt, str) and settings.templated and base.tokenizer.has_template:
            prompt = [{"role": "user", "content": prompt.strip()}]
        try:
            text = prompt if isinstance(prompt, str) else base.tokenizer.render(prompt, True)
            ids.append(encode_prompt("the base", base.model, base.tokenizer, text))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        asked.append(Question(shown, text, None, limit))
    return Prompts(base, asked, ids, settings.samples.get("every", 0))


def held_out_questions(job: Job, settings: Training, base: Base) -> Prompts | None:
    """The held-out examples to answer at each evaluation, `samples.held_out` of them.

    None without that setting, or if no example is held out.
    """
    most = settings.samples.get("held_out", 0)
    if not most or not (settings.eval_data or settings.eval_share):
        return None
    from pipeline.data.answers.questions import questions

    asked = questions(held_out_examples(job, settings), base.tokenizer, most, base.model.max_length)
    if not asked:
        return None
    return Prompts(base, asked, [base.tokenizer.encode(question.prompt) for question in asked])
