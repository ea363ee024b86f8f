"""Examples as questions: the prompt that a model gets, and the answer that the data expects."""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.data.examples import Example
from pipeline.data.masking import as_turns
from pipeline.data.tokenizers.word import Tokenizer

# what every answer may have at least, and how many more than the expected one it may have
LEAST_TOKENS, SPARE_TOKENS = 64, 16
MOST_TOKENS = 1024  # of any answer


class Question(NamedTuple):
    """A prompt, and the answer that is expected."""

    asked: str  # what is shown of it: the last turn of the user, or the prompt
    prompt: str  # as the model reads it
    expected: str | None  # None where no answer is known
    limit: int  # tokens that an answer may have


def prompt_and_answer(example: Example, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """What the model reads before an example's last answer, and that answer; None for a text."""
    example = as_turns(example, tokenizer)
    if not example.messages:
        return None if example.prompt is None else (example.prompt, example.completion)
    messages, tools = example.messages, example.tools
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    prompt = tokenizer.render(messages[:last], True, tools)
    if "tool_calls" not in messages[last]:
        return prompt, messages[last]["content"] or ""
    # as the template writes them, without special tokens
    whole = tokenizer.render(messages[: last + 1], False, tools)
    return prompt, tokenizer.decode(tokenizer.encode_following(whole.removeprefix(prompt)))


def questions(
    examples: Iterable[Example], tokenizer: Tokenizer, most: int, positions: int
) -> list[Question]:
    """At most `most` questions, evenly from all examples with a prompt: a file may be sorted.

    Left out are prompts with words that a word-level model does not know, and those that leave no
    room for an answer in `positions` tokens.
    """
    asked = list[tuple[Example, str, str]]()
    for example in examples:
        pair = prompt_and_answer(example, tokenizer)
        if pair is None or tokenizer.unknown_words(pair[0]):
            continue
        if len(tokenizer.encode(pair[0])) < positions:
            asked.append((example, *pair))
    if len(asked) > most:
        asked = [asked[n * len(asked) // most] for n in range(most)]
    return [_question(*question, tokenizer) for question in asked]


def _question(example: Example, prompt: str, expected: str, tokenizer: Tokenizer) -> Question:
    messages = as_turns(example, tokenizer).messages
    turns = [message["content"] or "" for message in messages if message["role"] == "user"]
    tokens = len(tokenizer.encode_following(expected)) + SPARE_TOKENS
    limit = min(MOST_TOKENS, max(LEAST_TOKENS, tokens))
    return Question(turns[-1] if turns else prompt, prompt, expected, limit)
