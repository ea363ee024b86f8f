"""The certificate of exported files: the other program opens them, and is compared with the model.

Files are rejected (`_compare`) if the program reads another chat template or end token
(`_template_problems`) or other token ids (`_token_problems`), or if its logits differ by more than
rounding explains (`_logit_problems`). An export writes nothing then.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Protocol, runtime_checkable
from unicodedata import normalize

import torch
from torch import Tensor, no_grad

from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import Rendered
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import Difference, builtin_prompts, difference_of
from pipeline.models.base import CausalLM, compute_in_fp32, packed_hidden_states
from pipeline.models.generate import generate
from pipeline.project.runner import Event, Progress

# of all prompts: the reference's logits stay in memory, 0.6 GiB with Gemma's vocabulary
MOST_TOKENS = 640
GREEDY_TOKENS = 48
# The largest mean KL, in nats per token, that rounding explains. On SmolLM2-135M it is 1e-8 in f32,
# 4e-6 in f16, 2e-4 in bf16, where products round the activations too. An adapter at twice its
# scale, or q and k in the wrong order, is above 1e-2. f32 is allowed as much as f16, since
# llama.cpp looks some activations (GELU) up in a table of fp16.
ROUNDING = {"f32": 1e-4, "f16": 1e-4, "bf16": 2e-3}
# Some models magnify rounding, as mixtures do, where it changes a token's experts. The KL of toy
# mixtures and delta nets in f16 was 0.3 to 1.1 times that of the model's own products in fp16.
TIMES_OWN_ROUNDING = 4
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
# Where tokenizers differ: digits, white space, punctuation, scripts, emoji. Characters are
# composed: llama.cpp does not normalize.
SPELLINGS = (
    "The meeting is at 10:45 on 2024-11-27 in room 1234567, for 3.50 € each.",
    "Columns:   1  20\t\t300\n\n\tand  lines \r\n 5",
    "def f(x):\n    return x ** 2  # squares: f(12) == 144",
    'Don\'t! I\'LL say: we\'ve "done" it… (50 % off) ½ ² №5 — {"k": [1, 2]}',
    "Grüße aus Łódź, Ελλάδα и Москва; 東京は3月、서울 ١٢٣ हिन्दी 👍🏽🇧🇬",
)
MOST_ENDS = 3  # end tokens for which a GGUF file has room: eos, eot, eom

Turns = Sequence[Mapping[str, str]]


class Runner(Protocol):
    """A model that another program has opened."""

    @property
    def name(self) -> str:
        """The program and its version."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V) in fp32 on the CPU."""

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text or a `Rendered` chat, with BOS; None if it has no tokenizer."""

    def generate(self, ids: Sequence[int], limit: int) -> tuple[list[int], float]:
        """The greedy continuation without an end token, and its tokens per second."""


@runtime_checkable
class SelfContained(Protocol):
    """A runner whose file holds more than the weights: context, chat template and end tokens."""

    @property
    def max_length(self) -> int: ...

    @property
    def template(self) -> str | None: ...

    @property
    def ends(self) -> frozenset[int]: ...

    def chat(self, messages: Turns, add_generation_prompt: bool) -> str | None: ...


class Candidate(NamedTuple):
    """Files to compare."""

    label: str
    # a key of ROUNDING, which limits the logits' difference; a quantized kind has no limit
    kind: str
    size: int
    open: Callable[[], AbstractContextManager[Runner]]


class Reference(NamedTuple):
    """What the exported model reads and computes."""

    tokenizer: Tokenizer
    prompts: list[tuple[list[int], Tensor]]  # ids and logits (T, V)
    texts: list[str]
    chat: tuple[Turns, Rendered] | None  # turns and their rendering; None without a chat template
    greedy: tuple[list[int], int, list[int]]  # a prompt's ids, the most new tokens, those generated


def compare(
    load: Callable[[], LoadedModel],
    tokenizer: Tokenizer,
    candidates: Sequence[Candidate],
    prompts: Sequence[str] = (),
) -> Generator[Event, None, dict[str, Any]]:
    """Compare files with base + adapter as `load` gives them, and the exported `tokenizer`.

    One model is in memory at a time. Returns the certificate's entries. Raises UserError if files
    are not the model.
    """
    yield Progress(0, len(candidates) + 1, "the exported model")
    # llama.cpp does not normalize, and need not
    composed = [normalize("NFC", prompt) for prompt in prompts]
    expected = reference(load(), tokenizer, composed or builtin_prompts())
    # rarely needed, and loads the model again
    rounding = cache(lambda kind: own_rounding(load().model, expected, DTYPES[kind]))
    names, files = set[str](), []
    for done, candidate in enumerate(candidates, start=1):
        yield Progress(done, len(candidates) + 1, candidate.label)
        with candidate.open() as runner:
            names.add(runner.name)
            files.append(_compare(expected, candidate, runner, rounding))
    return {
        "runner": ", ".join(sorted(names)),
        "prompts_checked": len(expected.prompts),
        "files": files,
    }


@no_grad()
def reference(loaded: LoadedModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> Reference:
    """The exported model, with logits in fp32, so that only the other program rounds."""
    model = loaded.model
    room = MOST_TOKENS
    ids = list[list[int]]()
    for prompt in prompts:
        ids.append(list(tokenizer.encode(prompt)[: min(room, model.max_length)]))
        room -= len(ids[-1])
        if room <= 0:
            break
    chat = _rendered_chat(tokenizer, prompts[0])
    asked = prompts[0]
    if chat:
        with suppress(UserError):  # from a template that needs other turns
            asked = tokenizer.render([{"role": "user", "content": asked}], True)
    start = list(tokenizer.encode(asked))[: model.max_length // 2]
    limit = min(GREEDY_TOKENS, model.max_length - len(start))
    greedy = list(generate(model, start, tokenizer.end_ids, limit))  # as `lora prompt` answers
    with compute_in_fp32(model):
        logits = _logits(model, ids)
    texts = [text for text in (*SPELLINGS, *prompts) if _knows(tokenizer, text)]
    pairs = list(zip(ids, logits, strict=True))
    return Reference(tokenizer, pairs, texts, chat, (start, limit, greedy))


def _logits(model: CausalLM, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model.logits(hidden).float().cpu() for hidden in packed_hidden_states(model, ids)]


@no_grad()
def own_rounding(model: CausalLM, expected: Reference, dtype: torch.dtype) -> float:
    """The mean KL that products in `dtype` cause in the exported model itself."""
    ids, logits = zip(*expected.prompts, strict=True)
    device = next(model.parameters()).device.type
    with compute_in_fp32(model), torch.autocast(device, dtype):
        rounded = _logits(model, ids)
    return difference_of(zip(logits, rounded, strict=True)).divergence


def _rendered_chat(tokenizer: Tokenizer, prompt: str) -> tuple[Turns, Rendered] | None:
    """Several turns with a generation prompt; with a system's turn if the template takes one."""
    for content in ("\n".join(SPELLINGS), prompt):
        if not tokenizer.has_template or not _knows(tokenizer, content):
            continue
        turns = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "It is 27."},
            {"role": "user", "content": content},
        ]
        renderings = []
        for part in (turns[1:], turns):
            with suppress(UserError):
                renderings.append((part, tokenizer.render(part, True)))
        # a template without system turns may write one as another's turn, and leave out BOS
        starts = [tokenizer.encode(rendered)[:1] for _, rendered in renderings]
        if renderings:
            return renderings[-1 if starts[-1] == starts[0] else 0]
    return None


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer has every character: another program may skip unknown ones."""
    decoded = tokenizer.decode(tokenizer.encode(text))
    return tokenizer.normalize(decoded) == tokenizer.normalize(text)


def _compare(
    expected: Reference, candidate: Candidate, runner: Runner, rounding: Callable[[str], float]
) -> dict[str, Any]:
    """A file's entry in the certificate. Raises UserError if it is not the model.

    `rounding`: `own_rounding` by kind.
    """
    entry: dict[str, Any] = {"format": candidate.label, "bytes": candidate.size}
    problems = [*_template_problems(expected, runner), *_token_problems(expected, runner, entry)]
    most = runner.max_length if isinstance(runner, SelfContained) else MOST_TOKENS
    pairs = ((logits[:most], runner.logits(ids[:most])) for ids, logits in expected.prompts)
    first = next(pairs)
    ours, theirs = (logits.shape[-1] for logits in first)
    if theirs != ours:
        problems.append(f"it has {theirs} tokens, the exported model {ours} (is it another base?)")
    else:
        result = difference_of(chain([first], pairs))
        entry |= result._asdict()
        problems += _logit_problems(result, candidate.kind, rounding)
    if problems:
        raise UserError(
            f"{candidate.label} is not the exported model in {runner.name}: {'; '.join(problems)}. "
            "Nothing was written. Use --format merged or peft, and report this."
        )
    if isinstance(runner, SelfContained) and expected.chat:
        rendered = runner.chat(expected.chat[0], True)
        entry["renders_the_chat_alike"] = None if rendered is None else rendered == expected.chat[1]
    ids, limit, greedy = expected.greedy
    answer, speed = runner.generate(ids, limit)
    entry["first_greedy_difference"] = first_difference(expected.tokenizer, greedy, answer)
    return entry | {"greedy_tokens": len(greedy), "tokens_per_second": round(speed, 1)}


def _template_problems(expected: Reference, runner: Runner) -> list[str]:
    """What differs in the chat template and the end tokens that the file holds."""
    if not isinstance(runner, SelfContained):
        return []
    problems = []
    tokenizer = expected.tokenizer
    ours = tokenizer.template if isinstance(tokenizer, SubwordTokenizer) else None
    if ours != runner.template:
        if ours is None:
            problems.append("it has a chat template, the model has none")
        else:
            which = "no" if runner.template is None else "another"
            problems.append(f"it has {which} chat template")
    missing = tokenizer.end_ids - runner.ends
    if missing and len(tokenizer.end_ids - missing) < MOST_ENDS:
        words = [tokenizer.word(id_) for id_ in sorted(missing)]
        problems.append(f"it does not stop at {', '.join(words)}")
    return problems


def _token_problems(expected: Reference, runner: Runner, entry: dict[str, Any]) -> list[str]:
    """The first text that the program reads differently; noted in `entry` if it is no problem."""
    tokenizer, texts = expected.tokenizer, expected.texts
    if expected.chat:
        texts = [expected.chat[1], *texts]
    for text in texts:
        ours, theirs = list(tokenizer.encode(text)), runner.encode(text)
        if theirs is None or theirs == ours:
            continue
        at = first_difference(tokenizer, ours, theirs)
        assert at is not None
        what = "a rendered chat" if isinstance(text, Rendered) else f"the text {text[:20]!r}"
        reason = (
            f"token ids of {what} differ: token {at['token']} is {at['theirs']}, ours {at['ours']}"
        )
        if theirs[1:] == ours:
            return [f"{reason} (the file adds BOS: a chat that begins with BOS has it twice)"]
        if theirs[:-1] == ours or isinstance(text, Rendered) or expected.chat is None:
            return [reason]
        # A GGUF file cannot say that BOS or a space precedes plain texts but not chats. The chat,
        # which has the same spellings, is read alike.
        entry["plain_text_difference"] = at
        break
    return []


def _logit_problems(result: Difference, kind: str, rounding: Callable[[str], float]) -> list[str]:
    limit = ROUNDING.get(kind)
    if limit is None or result.divergence <= limit:  # NaN is not
        return []
    if kind in DTYPES:
        limit = max(limit, TIMES_OWN_ROUNDING * rounding(kind))
    if result.divergence <= limit:
        return []
    return [
        f"its logits differ by up to {result.max_logit_difference:.1e}, KL {result.divergence:.1e} "
        f"nats per token, and rounding to {kind} explains {limit:.0e} (likely causes: the "
        "adapter's scale, the order of the rows of q and k, another base)"
    ]


def first_difference(
    tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]
) -> dict[str, Any] | None:
    """Number (from 1) and spelling of the first token that differs; None if none does."""

    def word(id_: int | None) -> str:
        if id_ is None:
            return "the end"
        return repr(tokenizer.word(id_)) if id_ < len(tokenizer) else f"<{id_}>"

    for number, (mine, other) in enumerate(zip_longest(ours, theirs), start=1):
        if mine != other:
            return {"token": number, "ours": word(mine), "theirs": word(other)}
    return None


def describe(certificate: Mapping[str, Any]) -> list[str]:
    """A table of at most 80 columns, and what is not the same."""
    rows = [("format", "size", "KL", "same first choice", "tokens/s", "greedy text")]
    notes = []
    for file in certificate["files"]:
        label, greedy = file["format"], file["first_greedy_difference"]
        rows.append(
            (
                label,
                f"{file['bytes'] / 2**20:.1f} MiB",
                f"{max(file['divergence'], 0):.1e}",
                f"{file['same_first_choices']} of {certificate['prompts_checked']}",
                f"{file['tokens_per_second']:.0f}",
                f"differs from token {greedy['token']}" if greedy else "the same",
            )
        )
        if text := file.get("plain_text_difference"):
            at = f"token {text['token']} is {text['theirs']}, ours {text['ours']}"
            notes.append(f"{label} reads chats as we do, but not plain texts: {at}.")
    lines = [f"{certificate['runner']} against base + adapter (KL in nats per token):"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, last in rows:
        # texts to the left, the numbers between them to the right
        cells = map(str.rjust, numbers, widths[1:-1])
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]))
    return [*lines, *notes]
