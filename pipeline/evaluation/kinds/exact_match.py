"""exact_match: the whole answer is one of the expected ones."""

from pipeline.evaluation.kinds import Kind, comparing, expected

KIND = Kind(
    "the whole answer is `answer`, or one of a list",
    expected,
    comparing(lambda answer, texts: answer in texts),
    {"ignore_case": bool},
)
