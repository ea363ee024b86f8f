"""exact_match: the whole answer is one of the expected ones."""

from pipeline.evaluation.kinds import Kind, Score, Scores, TaskExample, TaskOptions, expected, plain


def scorer(options: TaskOptions) -> Score:
    ignore_case = options.values.get("ignore_case", False)

    def score(answer: str, example: TaskExample) -> Scores:
        right = {plain(text, ignore_case) for text in expected(example.row, example.location)}
        return {"score": float(plain(answer, ignore_case) in right)}

    return score


KIND = Kind(
    "the whole answer is `answer`, or one of a list", expected, scorer, {"ignore_case": bool}
)
