"""contains: one of the expected texts is somewhere in the answer."""

from pipeline.evaluation.kinds import Kind, comparing, expected

KIND = Kind(
    "`answer`, or one of a list, is somewhere in the answer",
    expected,
    comparing(lambda answer, texts: any(text in answer for text in texts)),
    {"ignore_case": bool},
)
