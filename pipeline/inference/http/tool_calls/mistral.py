"""[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]: Mistral's templates up to version 7.

[TOOL_CALLS] is a special token, so that an answer's text may begin with the list.
"""

from pipeline.inference.http.tool_calls import Format

FORMAT = Format(
    template="[TOOL_CALLS]",
    begins=r"\[TOOL_CALLS\]|\A\s*\[\s*\{",
    between=r"\A\s*(\[TOOL_CALLS\]\s*)?",
    opening=("[TOOL_CALLS]", "["),
    closing="]",
)
