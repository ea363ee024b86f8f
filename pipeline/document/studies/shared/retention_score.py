"""How well a model learned the new sentences and retained the old ones (§9.3)."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from pipeline.data.examples import Example
from pipeline.data.read import read_examples
from pipeline.document.tables import Cell, Spread
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import EvalScores, completes_correctly, score
from pipeline.project.runner import Job

FORMATS = {"new_loss": ".3f", "new_done": ".1f", "old_rise": ".2f", "old_kept": ".0%"}
COLUMNS_EXPLAINED = (
    "*New loss*: mean cross-entropy on the new sentences, in nats per token. *New done*: the number of new sentences "
    "completed word for word. *Old rise*: the increase of the loss on the old sentences over the base. *Old kept*: the "
    "share of next tokens of the old sentences where the first choice is still the base's."
)


@dataclass(frozen=True)
class Knowledge:
    """Losses in nats per token; `new_done` is a number of sentences, `old_kept` a share of first choices."""

    new_loss: float
    new_done: float
    old_rise: float
    old_kept: float


@dataclass(frozen=True)
class RetentionScorer:
    """The sentences to measure models on, and the base's scores on the old ones."""

    old: Sequence[Example]
    new: Sequence[Example]
    before: EvalScores
    given: int  # words of a new sentence that serve as the prompt for its completion

    def measure(self, loaded: LoadedModel) -> Knowledge:
        """Measure a model whose vocabulary includes the words of the old and the new sentences."""
        new_loss, old_rise, old_kept = self.losses(loaded)
        done = sum(completes_correctly(loaded, example, self.given) for example in self.new)
        return Knowledge(new_loss, float(done), old_rise, old_kept)

    def losses(self, loaded: LoadedModel) -> tuple[float, float, float]:
        """New loss, old rise and old kept: the scores that need no generation."""
        old, new = score(loaded, self.old, self.before), score(loaded, self.new)
        kept = float((old.choices == self.before.choices).double().mean())
        return new.loss, old.loss - self.before.loss, kept


def retention_scorer(job: Job, old_data: str, new_data: str, given: int = 2) -> RetentionScorer:
    """The scorer for these data files. Raises UserError for old sentences with words unknown to the base."""
    base = engine.load(job.artifact("pretrain"))
    old = read_examples(job.path(old_data), old_data)
    return RetentionScorer(old, read_examples(job.path(new_data), new_data), score(base, old), given)


def spreads(measured: Sequence[Knowledge]) -> dict[str, Cell]:
    """A Spread over seeds for each quantity; empty cells if `measured` is empty, because every seed diverged."""
    if not measured:
        return dict.fromkeys(field.name for field in fields(Knowledge))
    columns = zip(*map(astuple, measured), strict=True)
    return {field.name: Spread.of(values) for field, values in zip(fields(Knowledge), columns, strict=True)}
