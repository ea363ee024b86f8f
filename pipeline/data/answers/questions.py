"""Examples as questions: the prompt that a model gets, and the answer that the data expects."""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.data.examples import Example
from pipeline.data.masking import as_turns
from pipeline.data.tokenizers.word import Tokenizer

# an answer may have so many at least, and so many more than the expected one
LEAST_TOKENS, SPARE_TOKENS = 64, 16
MOST_TOKENS = 1024  # of any answer


class Question(NamedTuple):
    """`asked`: what is shown of it, the last turn of the user or the prompt. `prompt`: as the model
    reads it.

    `expected`: None where no answer is known. `limit`: the tokens that an answer may have.
    """

    asked: str
    prompt: str
    expected: str | None
    limit: int


def prompt_and_answer(example: Example, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """What comes before an example's last answer, as the model reads it, and that answer; None of a
    plain text.
    """
    example = as_turns(example, tokenizer)
    if example.messages:
        last = max(
            n for n, message in enumerate(example.messages) if message["role"] == "assistant"
        )
        prompt, answer = (
            tokenizer.render(example.messages[:last], True, example.tools),
            example.messages[last],
        )
        if "tool_calls" not in answer:
            return prompt, answer["content"] or ""
        # as the template writes them, without special tokens.
        whole = tokenizer.render(example.messages[: last + 1], False, example.tools)
        return prompt, tokenizer.decode(tokenizer.encode_following(whole.removeprefix(prompt)))
    return None if example.prompt is None else (example.prompt, example.completion)


def questions(
    examples: Iterable[Example], tokenizer: Tokenizer, most: int, positions: int
) -> list[Question]:
    """At most so many questions, evenly from all examples that have a prompt: a file may be sorted.

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
    return [_question(example, prompt, expected, tokenizer) for example, prompt, expected in asked]


def _question(example: Example, prompt: str, expected: str, tokenizer: Tokenizer) -> Question:
    messages = as_turns(example, tokenizer).messages
    turns = [message["content"] or "" for message in messages if message["role"] == "user"]
    tokens = len(tokenizer.encode_following(expected)) + SPARE_TOKENS
    return Question(
        turns[-1] if turns else prompt,
        prompt,
        expected,
        min(MOST_TOKENS, max(LEAST_TOKENS, tokens)),
    )
