"""regex: a regular expression matches somewhere in the answer, within a time limit."""

from pipeline.data.formats import Record, read_string
from pipeline.errors import UserError
from pipeline.evaluation.kinds import Kind, Score, Scores, TaskExample, TaskOptions
from pipeline.files.patterns import BUDGET, one_budget, problem, search
from pipeline.files.text import abbreviate_repr


def check(row: Record, location: str) -> None:
    pattern = read_string(row, "pattern", location)
    if why := problem(pattern):
        raise UserError(
            f"{location}: {abbreviate_repr(pattern)} is not a regular expression: {why}. Correct "
            "pattern."
        )


def scorer(_: TaskOptions) -> Score:
    left = [BUDGET]  # seconds for all answers of the task

    def score(answer: str, example: TaskExample) -> Scores:
        with one_budget(left):
            return {"score": float(search(example.row["pattern"], answer, example.location))}

    return score


KIND = Kind("the regular expression `pattern` matches somewhere in the answer", check, scorer)
