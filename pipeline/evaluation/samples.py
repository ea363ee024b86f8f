"""What a model answers to questions of the data, and how many answers are the expected ones."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.answers.match import Match, count, match
from pipeline.data.answers.questions import questions
from pipeline.data.examples import Example
from pipeline.inference.completions import complete_all
from pipeline.inference.engine import LoadedModel


def sample_answers(
    loaded: LoadedModel, examples: Iterable[Example], most: int
) -> list[dict[str, Any]]:
    """For samples.json: the model's greedy answers to at most so many examples, each with how it
    compares.
    """
    asked = questions(examples, loaded.tokenizer, most, loaded.model.max_length)
    answers = complete_all(
        loaded, [question.prompt for question in asked], [question.limit for question in asked]
    )
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        expected = question.expected or ""
        compared = match(answer, expected)
        row = {
            "question": question.asked,
            "prompt": question.prompt,
            "reference": expected,
            "answer": answer,
        }
        rows.append({**row, **_fields(compared)})
    return rows


def _fields(compared: Match) -> dict[str, Any]:
    fields: dict[str, Any] = {"match": compared.how}
    if compared.differs:
        fields["differs"] = list(compared.differs)
    if compared.rouge_l is not None:
        fields["rouge_l"] = compared.rouge_l
    return fields


def match_of(row: Mapping[str, Any]) -> Match:
    """How the answer of a row of samples.json compares with the expected one."""
    return Match(row["match"], tuple(row.get("differs", ())), row.get("rouge_l"))


def count_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For metrics.json: the counts of the rows' answers; none without rows."""
    return {"answers": count([match_of(row) for row in rows])} if rows else {}
