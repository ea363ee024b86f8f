"""The Modelfile from which `ollama create` makes a model.

Ollama does not render the chat template of a GGUF file. It looks for a similar one in its list, and
takes the list's template in Go's language, or else the prompt alone. So the Modelfile has a
TEMPLATE, derived from what the chat template writes around messages.
"""

from itertools import cycle
from typing import NamedTuple

from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.errors import UserError
from pipeline.export.gguf.vocabulary import Vocabulary

# contents that no template writes itself
_SYSTEM, _USER, _ASSISTANT, _AGAIN = "Zq7s", "Zq7u", "Zq7a", "Zq7v"


class Turns(NamedTuple):
    """What a chat template writes before a message's content, by the message before it."""

    system: str | None  # None if it takes no system message
    first: str
    after_system: str
    assistant: str
    user: str


def modelfile(model: str, vocabulary: Vocabulary) -> str:
    """The text of a Modelfile for the file `model` in the same folder."""
    lines = [f"FROM ./{model}"]
    tokenizer = vocabulary.tokenizer
    if (turns := read_turns(tokenizer)) and (template := go_template(turns, vocabulary.bos)):
        lines.append(f'TEMPLATE """{template}"""')
    for end in vocabulary.ends:
        # a quote or a line break in a token would end the parameter
        if end.isprintable() and '"' not in end:
            lines.append(f'PARAMETER stop "{end}"')
    return "\n".join(lines) + "\n"


def read_turns(tokenizer: SubwordTokenizer) -> Turns | None:
    """What the tokenizer's chat template writes around messages.

    None without a template, or if it writes more than fixed texts.
    """
    if not tokenizer.has_template:
        return None

    def render(*contents: str) -> str:
        pairs = zip(cycle(("user", "assistant")), contents, strict=False)
        messages = [{"role": role, "content": text} for role, text in pairs]
        return tokenizer.render(messages, add_generation_prompt=True)

    try:
        talk = render(_USER, _ASSISTANT, _AGAIN)
        first, rest = _cut(talk, _USER)
        answer, rest = _cut(rest, _ASSISTANT)
        between, _ = _cut(rest, _AGAIN)
        # it must write the same around other messages, and before the next answer
        pair = f"{answer}{_ASSISTANT}{between}{_AGAIN}"
        if render(_USER) != f"{first}{_USER}{answer}":
            return None
        if render(_USER, *(_ASSISTANT, _AGAIN) * 2) != f"{first}{_USER}{pair}{pair}{answer}":
            return None
    except UserError:
        return None
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    try:
        told = tokenizer.render(messages, add_generation_prompt=True)
    except UserError:
        return Turns(None, first, first, answer, between)
    before, rest = _cut(told, _SYSTEM)
    after, rest = _cut(rest, _USER)
    if told.count(_SYSTEM) != 1 or rest != answer:
        return None
    return Turns(before, first, after, answer, between)


def _cut(text: str, content: str) -> tuple[str, str]:
    before, _, after = text.partition(content)
    return before, after


def go_template(turns: Turns, bos: str | None) -> str | None:
    """The turns in Go's language, without `bos`, which Ollama adds; None if Go cannot say them."""
    texts = list(filter(None, turns))
    # `{{` may also begin in a text's last character
    if any('"""' in text or "{{" in f"{text}{{" for text in texts):
        return None
    first, system = turns.first.removeprefix(bos or ""), ""
    after_system = turns.after_system
    if turns.system is None:  # system messages are left out
        after_system = first
    else:
        system = turns.system.removeprefix(bos or "") + "{{ .Content }}"
    before_user = (
        f"{{{{ if eq $i 0 }}}}{first}{{{{ else if and (eq $i 1) $.System }}}}{after_system}"
        f"{{{{ else }}}}{turns.user}{{{{ end }}}}"
    )
    return (
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}{turns.assistant}'
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
    )
