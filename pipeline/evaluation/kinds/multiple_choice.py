"""multiple_choice: of several texts, the right one must be the likeliest after the prompt.

As `acc` and `acc_norm` of lm-evaluation-harness: acc_norm divides a choice's log-likelihood by its
number of characters, so that long choices have no disadvantage. Of equally likely choices the first
counts.
"""

import math
from collections.abc import Sequence

from pipeline.data.formats import Record, read_list, read_string
from pipeline.errors import UserError
from pipeline.evaluation.kinds import Kind, Score, Scores, TaskExample, TaskOptions
from pipeline.files.text import abbreviate_repr


def choices(row: Record, location: str = "") -> list[str]:
    """The texts to choose from. Raises UserError."""
    return [
        read_string({"choices": text}, "choices", location)
        for text in read_list(row, "choices", location, "texts")
    ]


def right(row: Record, location: str = "") -> int:
    """The index of `answer`, the text of a choice or its number from 0. Raises UserError."""
    texts = choices(row, location)
    answer = row.get("answer")
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise UserError(
            f"{location}: choices must be two or more different texts, got "
            f"{abbreviate_repr(texts)}."
        )
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if answer not in texts:
        raise UserError(
            f"{location}: answer must be one of the choices, or its number from 0, got "
            f"{abbreviate_repr(answer)}."
        )
    return texts.index(answer)


def scorer(options: TaskOptions) -> Score:
    main, other = ("acc_norm", "acc") if options.values.get("normalized") else ("acc", "acc_norm")

    def score(log_likelihoods: Sequence[float | None], example: TaskExample) -> Scores:
        # a text with a word that a word tokenizer does not know has probability 0
        values = [-math.inf if value is None else value for value in log_likelihoods]
        answer = right(example.row)
        lengths = [len(text) for text in choices(example.row)]
        by_length = [value / length for value, length in zip(values, lengths, strict=True)]
        known = values[answer] > -math.inf
        scores = {
            "acc": float(known and values.index(max(values)) == answer),
            "acc_norm": float(known and by_length.index(max(by_length)) == answer),
        }
        return {"score": scores[main], other: scores[other]}

    return score


KIND = Kind(
    "`answer` is the likeliest of `choices` by log-likelihood",
    right,
    scorer,
    {"normalized": bool},
    choices,
)
