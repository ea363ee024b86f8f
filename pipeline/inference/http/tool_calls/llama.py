"""{"name": …, "parameters": {…}} and nothing else: Llama 3.1, 3.2, 3.3 and 4.

<|python_tag|> may come first, but as a special token it is no text of an answer.
"""

from pipeline.inference.http.tool_calls import Format

FORMAT = Format(
    template='{"name": function name, "parameters": dictionary',
    begins=r"\A\s*(<\|python_tag\|>\s*)?\{",
    between=r"\A\s*(<\|python_tag\|>|;)?\s*",
    arguments="parameters",
)
