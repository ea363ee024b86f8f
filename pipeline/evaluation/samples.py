"""A model's answers to questions of the data, and how many are the expected ones."""

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
    """For samples.json: greedy answers to the first `most` questions, compared with the data's."""
    asked = questions(examples, loaded.tokenizer, most, loaded.model.max_length)
    prompts = [question.prompt for question in asked]
    answers = complete_all(loaded, prompts, [question.limit for question in asked])
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        expected = question.expected or ""
        compared = match(answer, expected)
        row: dict[str, Any] = {
            "question": question.asked,
            "prompt": question.prompt,
            "reference": expected,
            "answer": answer,
            "match": compared.how,
        }
        if compared.differs:
            row["differs"] = list(compared.differs)
        if compared.rouge_l is not None:
            row["rouge_l"] = compared.rouge_l
        rows.append(row)
    return rows


def match_of(row: Mapping[str, Any]) -> Match:
    """How the answer of a row of samples.json compares with the expected one."""
    return Match(row["match"], tuple(row.get("differs", ())), row.get("rouge_l"))


def count_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For metrics.json: the counts of the rows' answers; none without rows."""
    return {"answers": count([match_of(row) for row in rows])} if rows else {}
