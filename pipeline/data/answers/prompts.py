"""prompts.yaml: prompts with the answers that fine-tuning must keep, change or teach."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.errors import UserError
from pipeline.files import strict_yaml
from pipeline.files.text import abbreviate_repr

Rule = Literal["must_change", "must_keep", "must_learn"]


@dataclass(frozen=True)
class Prompt:
    """A prompt with the expected top-1 prediction before and after fine-tuning.

    `answer` and `corrected` differ only for must_change; for must_learn, `answer` is expected of
    the fine-tuned model alone.
    """

    group: str
    rule: Rule
    prompt: str
    answer: str
    corrected: str


def read_prompts(path: Path, name: str) -> list[Prompt]:
    """Group → rule → list of {prompt, answer[, corrected]}. Raises UserError."""
    tree = strict_yaml.read(path, name)
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"{name} must map groups to rules and their prompts, got {abbreviate_repr(tree)}."
        )
    prompts = []
    for group, rules in tree.items():
        if not isinstance(rules, dict):
            known = ", ".join(get_args(Rule))
            raise UserError(
                f"{name}: {group} must map rules ({known}) to prompts, got "
                f"{abbreviate_repr(rules)}."
            )
        for rule, entries in rules.items():
            if rule not in get_args(Rule):
                known = ", ".join(get_args(Rule))
                raise UserError(f"{name}: {group}.{rule}: unknown rule. Use one of {known}.")
            if not isinstance(entries, list):
                raise UserError(
                    f"{name}: {group}.{rule} must be a list of prompts, got "
                    f"{abbreviate_repr(entries)}."
                )
            prompts += [_read_prompt(entry, str(group), rule, name) for entry in entries]
    if not prompts:
        raise UserError(f"{name} contains no prompts. Add at least one.")
    return prompts


def prompt_texts(path: Path | None) -> list[str]:
    """The prompts of a file without their answers; none without a file. Raises UserError."""
    return [prompt.prompt for prompt in read_prompts(path, str(path))] if path else []


def _read_prompt(entry: Any, group: str, rule: Rule, name: str) -> Prompt:
    location = f"{name}: {group}.{rule}"
    shown = abbreviate_repr(entry, 200)
    required = {"prompt", "answer"} | ({"corrected"} if rule == "must_change" else set())
    if not isinstance(entry, dict) or set(entry) != required:
        raise UserError(
            f"{location}: each prompt needs exactly {', '.join(sorted(required))}, got {shown}."
        )
    if not all(isinstance(value, str) and value.strip() for value in entry.values()):
        raise UserError(
            f"{location}: every value must be a string that is not empty (quote yes, no and "
            f"numbers), got {shown}."
        )
    # NFC: an answer with a combining accent looks the same, and no token of a model would ever
    # equal it.
    words = {
        key: unicodedata.normalize("NFC", value.strip())
        for key, value in entry.items()
        if key != "prompt"
    }
    answer = words["answer"]
    return Prompt(group, rule, entry["prompt"], answer, words.get("corrected", answer))
