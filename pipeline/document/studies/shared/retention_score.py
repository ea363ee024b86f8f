"""What a model has learned and what it has forgotten, as the studies measure it (§9.3)."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from pipeline.data.examples import Example, read_examples
from pipeline.document.tables import Cell, Spread
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import EvalScores, completes_correctly, score
from pipeline.project.runner import Job

FORMATS = {"new_loss": ".3f", "new_done": ".1f", "old_rise": ".2f", "old_kept": ".0%"}
IN_WORDS = (
    "*New loss* is the mean cross-entropy on the new sentences, in nats a token; *new done* how many of them are "
    "completed word for word; *old rise* what the loss on the old sentences has risen by, against the base; *old kept* "
    "the share of first choices there that are still the base's."
)


@dataclass(frozen=True)
class Knowledge:
    """Losses in nats a token; `new_done` in sentences; `old_kept` a share of first choices."""

    new_loss: float
    new_done: float
    old_rise: float
    old_kept: float


@dataclass(frozen=True)
class RetentionScorer:
    """The sentences on which models are measured, and what the base says of the old ones."""

    old: Sequence[Example]
    new: Sequence[Example]
    before: EvalScores
    given: int  # words of a new sentence before its completion is compared

    def measure(self, loaded: LoadedModel) -> Knowledge:
        """Of a model whose vocabulary has the base's words and the new sentences'."""
        new_loss, old_rise, old_kept = self.losses(loaded)
        done = sum(completes_correctly(loaded, example, self.given) for example in self.new)
        return Knowledge(new_loss, float(done), old_rise, old_kept)

    def losses(self, loaded: LoadedModel) -> tuple[float, float, float]:
        """New loss, rise of the old one, share of old first choices kept: all that takes no generation."""
        old, new = score(loaded, self.old, self.before), score(loaded, self.new)
        kept = float((old.choices == self.before.choices).double().mean())
        return new.loss, old.loss - self.before.loss, kept


def retention_scorer(job: Job, old_data: str, new_data: str, given: int = 2) -> RetentionScorer:
    """For a study of these data files. Raises UserError for words that the base does not know."""
    base = engine.load(job.artifact("pretrain"))
    old = read_examples(job.path(old_data), old_data)
    return RetentionScorer(old, read_examples(job.path(new_data), new_data), score(base, old), given)


def spreads(measured: Sequence[Knowledge]) -> dict[str, Cell]:
    """Of several seeds: a cell for each quantity, empty where every one of them diverged."""
    if not measured:
        return dict.fromkeys(field.name for field in fields(Knowledge))
    columns = zip(*map(astuple, measured), strict=True)
    return {field.name: Spread.of(values) for field, values in zip(fields(Knowledge), columns, strict=True)}
