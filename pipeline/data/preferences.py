"""Preference pairs and labelled answers as examples that are encoded: of a pair both answers."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from pipeline.data.examples import Example
from pipeline.data.formats.messages import text_of
from pipeline.data.masking import Encoded, Encoder
from pipeline.errors import UserError


def encode_pairs(
    encoder: Encoder, examples: Iterable[Example]
) -> Iterator[tuple[Example, Encoded]]:
    """The chosen and the rejected answer of each pair. If one has no label, none has."""
    encoder = replace(encoder, labels_bad_answers=True)
    answers = encoder.each(chain.from_iterable(map(pair, examples)))
    for both in zip(answers, answers, strict=True):
        is_labelled = all(encoded.labels for _, encoded in both)
        for answer, encoded in both:
            untrained = (False,) * len(encoded.ids)
            yield answer, encoded if is_labelled else replace(encoded, trained=untrained)


class Rejected(Example):
    """The worse answer of the pair that comes before it."""


def with_rejected(examples: Iterable[Example]) -> Iterator[Example]:
    """The examples, a pair's worse answer behind it."""
    for example in examples:
        yield example
        if example.rejected is not None:
            yield Rejected(**vars(pair(example)[1]))


def encode_answers(
    encoder: Encoder, examples: Iterable[Example]
) -> Iterator[tuple[Example, Encoded]]:
    """Each answer by itself, for KTO: of a pair both."""
    encoder = replace(encoder, labels_bad_answers=True)
    return encoder.each(chain.from_iterable(map(_answers, examples)))


def pair(example: Example) -> tuple[Example, Example]:
    """Its chosen and its rejected answer, each as an example. Raises UserError."""
    if example.rejected is None:
        raise UserError(
            f'{example.location}: a preference is a pair {{"prompt", "chosen", "rejected"}}; this '
            "row has one answer. Add the other, or use `loss: kto` with labels."
        )
    chosen = replace(example, rejected=None, desirable=True)
    if isinstance(example.rejected, str):
        text = (example.prompt or "") + example.rejected
        return chosen, replace(chosen, text=text, desirable=False)
    turns = (*example.messages[: example.begin], *example.rejected)
    before = frozenset(turn for turn in example.untrained if turn < example.begin)
    return chosen, replace(
        chosen, text=text_of(turns), messages=turns, untrained=before, desirable=False
    )


def _answers(example: Example) -> tuple[Example, ...]:
    if example.rejected is not None:
        return pair(example)
    if example.desirable is None:
        raise UserError(
            f'{example.location}: KTO takes answers {{"prompt", "completion", "label"}}, whose '
            'label is true or false, or pairs {"prompt", "chosen", "rejected"}. Add the label.'
        )
    return (example,)
