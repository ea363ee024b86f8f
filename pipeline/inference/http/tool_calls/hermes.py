"""<tool_call>{"name": …, "arguments": {…}}</tool_call>: Hermes 2 and 3, Qwen 2.5 and 3, SmolLM."""

from pipeline.inference.http.tool_calls import Format

FORMAT = Format(
    template="<tool_call>",
    begins="<tool_call>",
    between=r"\A\s*(</tool_call>\s*)?(<tool_call>\s*)?",
    opening=("<tool_call>", "\n"),
    closing=("\n", "</tool_call>"),
)
