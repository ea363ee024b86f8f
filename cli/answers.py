"""Answers to questions of the data beside the expected ones, for `lora train` and `lora report`."""

from collections.abc import Mapping, Sequence
from typing import Any

Samples = Mapping[str, Sequence[Mapping[str, Any]]]  # samples.json: model → its answers, to the same questions
UNKNOWN_WORDS = "not asked: it does not know all of these words"
MOST_CHARACTERS = 300  # of a text; report.md has all of it


def count_lines(metrics: Mapping[str, Any], name: str, where: str) -> list[str]:
    """How many answers of the model `name` are as expected, beside the base's, and where the others differ."""
    from pipeline.data.answers.match import describe

    counts, before = (metrics.get(model, {}).get("answers", {}) for model in (name, "base"))
    if not (found := describe(counts)):
        return []
    base = f"; the base: {describe(before)}" if name != "base" and describe(before) else ""
    lines = [f"answers to {where}: {found}{base}"]
    if fields := counts.get("differs"):
        numbers = ", ".join(f"{field or 'no JSON'} {number}" for field, number in fields.items())
        lines.append(f"differ in: {numbers}")
    return lines


def print_answers(samples: Samples, names: Sequence[str], most: int | None = None) -> None:
    """Each question with the expected answer and those of the models `names`.

    `most`: questions at most, with wrong answers of the last model first; None: all.
    """
    from cli.console import print_line
    from pipeline.evaluation.samples import match_of

    models = [name for name in names if samples.get(name)]
    if not models:
        return
    last = samples[models[-1]]
    numbers = sorted(range(len(last)), key=lambda number: match_of(last[number]).as_expected)
    width = max(len(name) for name in (*models, "expected"))
    for number in sorted(numbers[:most]):
        print_line(f"\n> {_shorten(last[number]['question'])}")
        print_line(f"  {'expected':{width}}  {_shorten(last[number]['reference'])}")
        for name in models:
            # by its prompt: a model is not asked what has words that it does not know
            same = [row for row in samples[name] if row["prompt"] == last[number]["prompt"]]
            sign, answer = (match_of(same[0]).sign, same[0]["answer"]) if same else (" ", UNKNOWN_WORDS)
            print_line(f"{sign} {name:{width}}  {_shorten(answer)}")


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"
