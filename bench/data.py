"""Conversations as tokens and label masks, against the tokenizer alone on the same texts."""

import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.measure import Row
from pipeline.data.examples import Example
from pipeline.data.formats import iter_examples
from pipeline.data.masking import Encoder
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import RENDERER
from pipeline.data.windows import Corpus

CONVERSATIONS, SLICE = 100_000, 2_000
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def data() -> Iterator[Row]:
    """Reading, rendering, tokenizing, masking and storing; the tokenizer alone takes turns with it
    in slices.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _write(folder / "d.jsonl")
        inner = _trained(_texts(2_000))
        hf_tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token=END, chat_template=TEMPLATE
        )
        turns = _Turns(hf_tokenizer.backend_tokenizer)
        start = _now()
        examples = turns.watch(iter_examples(folder / "d.jsonl", "d.jsonl"))
        corpus = Corpus.of(Encoder(SubwordTokenizer(hf_tokenizer, "bench")).each(examples), folder)
        RENDERER.stop()  # its CPU time counts when it has ended
        ours, alone = (_now() - start - turns.alone).tolist(), turns.alone.tolist()
        tokens = corpus.statistics.tokens / len(corpus)
    what = (
        f"{CONVERSATIONS:,} conversations of 4 turns, {tokens:.0f} tokens each, as tokens with "
        "label masks"
    )
    for clock, mine, other in zip(("", ", CPU time of both processes"), ours, alone, strict=True):
        reference = f"tokenizer.encode of each text, {other:.1f} s"
        yield Row(what + clock, mine, reference, mine / other, "at most 3 ×", mine <= 3 * other)
    first, last = turns.peaks[1], turns.peaks[-1]
    what, reference = (
        f"the same, {last / 2**20:,.0f} MiB resident at the peak",
        f"{first / 2**20:,.0f} MiB in the first 2 %",
    )
    yield Row(what, 0, reference, last / first, "at most 1.1 ×", last <= 1.1 * first)


class _Turns:
    """Runs the tokenizer alone on each slice of the texts before the slice is encoded with
    masks.
    """

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.alone = np.zeros(2)  # seconds, as of `_now`
        self.peaks: list[int] = []  # bytes resident at the peak, before each slice and at the end

    def watch(self, examples: Iterator[Example]) -> Iterator[Example]:
        while taken := list(islice(examples, SLICE)):
            texts = list(map(_rendered, taken))
            self.peaks.append(_peak())
            start = _now()
            for text in texts:
                self._inner.encode(text, add_special_tokens=False)
            self.alone += _now() - start
            yield from taken
        self.peaks.append(_peak())


def _now() -> npt.NDArray[np.float64]:
    """Seconds on the wall, and CPU seconds of this process and those that it started and that have
    ended.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array(
        [time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime]
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rendered(example: Example) -> str:
    return "".join(f"{START}{turn['role']}\n{turn['content']}{END}\n" for turn in example.messages)


def _texts(count: int) -> Iterator[str]:
    """Texts of made-up words, the short ones the most frequent."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices(LETTERS, range(26, 0, -1), k=draw.randint(1, 9))) for _ in range(5_000)
    ]
    words.sort(key=len)
    weights = [1 / (rank + 1) for rank in range(len(words))]
    for _ in range(count):
        yield " ".join(draw.choices(words, weights, k=draw.randint(25, 65)))


def _trained(texts: Iterator[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4_000,
            special_tokens=[START, END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return inner


def _write(path: Path) -> None:
    contents = _texts(4 * CONVERSATIONS)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(CONVERSATIONS):
            turns = [
                {"role": role, "content": next(contents)} for role in ("user", "assistant") * 2
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
