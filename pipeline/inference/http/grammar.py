"""What an answer must match, such as a JSON schema: which tokens may come next, by llguidance."""

import json
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch

from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError, require
from pipeline.files.worker import python_module
from pipeline.inference.batching import Matcher
from pipeline.inference.requests import FieldError

# The time for a token grows with the square of a pattern: half a second at most.
MAX_CHARACTERS = 2**14
# Spaces, and line breaks with indentation. The library's default may go on for ever.
OPTIONS = {"whitespace_pattern": r"( |\n {0,32})?", "lenient": False}


def json_rule(schema: Mapping[str, Any]) -> str:
    """The JSON texts that a schema describes, as a rule of a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': OPTIONS})}"


def compile_grammar(tokenizer: Tokenizer, rows: int, grammar: str, field: str) -> Matcher:
    """The matcher of a grammar in llguidance's form of Lark, for a model with `rows` embeddings.

    In bounded time and memory. Raises UserError.
    """
    require("response_format", field)
    from llguidance import LLMatcher, LLParserLimits

    if len(grammar) > MAX_CHARACTERS:
        most = f"{MAX_CHARACTERS:,} characters, got {len(grammar):,}"
        raise FieldError(field, f" must have at most {most}. Use a simpler schema.")
    _check(grammar, field)
    # Fuel is time until the first token; later ones have the library's. A state takes up to 2 kB.
    limits = LLParserLimits(initial_lexer_fuel=100_000, max_lexer_states=20_000)
    matcher = Matcher(field, LLMatcher(_open(tokenizer, rows), grammar, log_level=0, limits=limits))
    matcher.mask(torch.zeros(rows))
    return matcher


# Matchers are not kept: all copies together have so many states, however many requests there are.
@lru_cache(maxsize=64)
def _check(grammar: str, field: str) -> None:
    """Compile a grammar in a process of its own. Raises FieldError."""
    command = python_module("pipeline.inference.http.grammar_process")
    compiled = subprocess.run(command, input=grammar, capture_output=True, text=True)
    if compiled.returncode or compiled.stdout:
        # without the place in the grammar, which the client did not write
        reason = compiled.stdout.partition("\n   1 | ")[0].rpartition("JSON schema: ")[2]
        reason = " ".join(reason.split()) or "it takes too long, or is nested too deeply"
        raise FieldError(field, f": {reason}. Use another schema.")


@lru_cache(maxsize=2)
def _open(tokenizer: Tokenizer, rows: int) -> Any:
    """The library's form of a tokenizer, which takes a second. Raises UserError."""
    from llguidance import LLTokenizer

    if isinstance(tokenizer, SubwordTokenizer):
        with suppress(ValueError):
            return LLTokenizer(json.dumps(tokenizer.describe()), rows, sorted(tokenizer.end_ids))
    raise UserError(
        "response_format and tool_choice need a tokenizer with a token for each byte, which this "
        "model has not. Use another model."
    )
