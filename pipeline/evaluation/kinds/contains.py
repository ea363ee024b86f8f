"""contains: one of the expected texts is somewhere in the answer."""

from pipeline.evaluation.kinds import Kind, Score, Scores, TaskExample, TaskOptions, expected, plain


def scorer(options: TaskOptions) -> Score:
    ignore_case = options.values.get("ignore_case", False)

    def score(answer: str, example: TaskExample) -> Scores:
        text = plain(answer, ignore_case)
        right = expected(example.row, example.location)
        return {"score": float(any(plain(words, ignore_case) in text for words in right))}

    return score


KIND = Kind(
    "`answer`, or one of a list, is somewhere in the answer",
    expected,
    scorer,
    {"ignore_case": bool},
)
