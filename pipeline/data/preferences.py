"""Preference pairs and labelled answers as examples that are encoded: of a pair both answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from pipeline.data.examples import Example
from pipeline.data.formats.messages import text_of
from pipeline.data.masking import Encoded, Encoder
from pipeline.errors import UserError


class PairEncoder(Encoder):
    """Each pair as two encoded examples: its chosen answer and its rejected one. If one has no
    label, none has.
    """

    labels_bad_answers = True

    def each(
        self,
        examples: Iterable[Example],
        on_error: Callable[[Example, UserError], None] | None = None,
    ) -> Iterator[tuple[Example, Encoded]]:
        both = super().each((answer for example in examples for answer in pair(example)), on_error)
        while two := list(islice(both, 2)):
            cut = not all(encoded.labels for _, encoded in two)
            yield from (
                (one, replace(e, trained=(False,) * len(e.ids)) if cut else e) for one, e in two
            )


@dataclass(frozen=True)
class AnswerEncoder(Encoder):
    """Each answer by itself, for KTO: of a pair both. `desirable`: whether those that have labels
    are good ones.
    """

    labels_bad_answers = True

    desirable: list[bool] = field(default_factory=list)

    def each(
        self,
        examples: Iterable[Example],
        on_error: Callable[[Example, UserError], None] | None = None,
    ) -> Iterator[tuple[Example, Encoded]]:
        for one, encoded in super().each(
            (one for example in examples for one in _answers(example)), on_error
        ):
            if encoded.labels:  # the others are left out
                self.desirable.append(bool(one.desirable))
            yield one, encoded


def pair(example: Example) -> tuple[Example, Example]:
    """Its chosen and its rejected answer, each as an example. Raises UserError."""
    if example.rejected is None:
        raise UserError(
            f'{example.location}: a preference is a pair {{"prompt", "chosen", "rejected"}}; this row has one answer. '
            "Add the other, or use `loss: kto` with labels."
        )
    chosen = replace(example, rejected=None, desirable=True)
    if isinstance(example.rejected, str):
        return chosen, replace(
            chosen, text=(example.prompt or "") + example.rejected, desirable=False
        )
    turns = (*example.messages[: example.begin], *example.rejected)
    before = frozenset(turn for turn in example.untrained if turn < example.begin)
    return chosen, replace(
        chosen, text=text_of(turns), messages=turns, untrained=before, desirable=False
    )


def _answers(example: Example) -> Sequence[Example]:
    if example.rejected is not None:
        return pair(example)
    if example.desirable is None:
        raise UserError(
            f'{example.location}: KTO takes answers {{"prompt", "completion", "label"}}, whose label is true or false, '
            'or pairs {"prompt", "chosen", "rejected"}. Add the label.'
        )
    return (example,)
