"""Tokens per second of one sequence and of eight, against transformers and llama.cpp.

The base is that of bench/real.py in bf16. LORA_BENCH_GGUF and LORA_BENCH_GGUF_Q8 name the same
model as GGUF files in f16 and in q8_0, for llama.cpp (`lora export --format gguf --quantize
f16,q8_0`).
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row
from bench.real import ROUNDS, THREADS, ask, base, side
from bench.real_sides import examples, seconds
from bench.serve import GGUF, Batch, LlamaCpp, Requests
from pipeline.inference.batching import BatchedGenerator
from pipeline.inference.http.q8_0 import Q8Bases
from pipeline.inference.model_pool import ModelPool, Prepare
from pipeline.models.load import load_base, save_base

EIGHT, NEW_TOKENS, PROMPT = 8, 64, 12
GGUF_Q8 = os.environ.get("LORA_BENCH_GGUF_Q8", "")
ORDERS = {"one": 1, "eight": EIGHT}
GOALS = {("transformers", "one"): 2.0, ("llama.cpp f16", "one"): 1.0, ("llama.cpp f16", "eight"): 1}


def decoding() -> Iterator[Row]:
    """Prompts of 12 tokens and 64 new ones each, with one thread and with all."""
    with base() as (folder, name), tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        stored = Path(root)
        (stored / "base").mkdir()
        save_base(stored / "base", load_base(folder, "bf16"))
        kinds: dict[str, Callable[[Path], Any]] = {
            "ours": Ours,
            "ours in q8_0": OursInQ8,
            "transformers": Transformers,
        }
        for what, file in (("f16", GGUF), ("q8_0", GGUF_Q8)):
            if Path(file).is_file() and find_spec("llama_cpp_py_sync"):
                kinds[f"llama.cpp {what}"] = partial(LlamaCppTexts, file)
        sides = {what: stack.enter_context(side(kind, stored)) for what, kind in kinds.items()}
        for threads in ("one_thread", "all_threads"):
            times: dict[tuple[str, str], list[float]] = {}
            for pipe in sides.values():
                ask(pipe, threads)
            for turn in range(ROUNDS + 1):  # the first is a warm-up
                for order in ORDERS:
                    for what, pipe in sides.items():
                        times.setdefault((what, order), []).extend([ask(pipe, order)][:turn])
            used = 1 if threads == "one_thread" else THREADS
            yield from _rows(name, used, {key: median(each) for key, each in times.items()})


def _rows(name: str, threads: int, times: dict[tuple[str, str], float]) -> Iterator[Row]:
    for order, count in ORDERS.items():
        mine = times["ours", order]
        sequences = f"{count} sequence{'s' * (count > 1)}"
        what = f"{sequences}, {threads} threads, {name}, {_speed(count, mine)}"
        for (other, measured), theirs in times.items():
            if measured == order and other != "ours":
                least, ratio = GOALS.get((other, order), 0.0), theirs / mine
                goal = f"at least {least:g} ×" if least else ""
                yield Row(
                    what, mine, f"{other}, {_speed(count, theirs)}", ratio, goal, ratio >= least
                )
                what = "the same"


def _speed(sequences: int, seconds_taken: float) -> str:
    return f"{sequences * NEW_TOKENS / seconds_taken:,.0f} tokens a second"


class Texts(Requests):
    """A side that continues one prompt or eight."""

    new_tokens = NEW_TOKENS

    def __init__(self, *files: Any) -> None:
        super().__init__(*files)
        prompts = [(ids * 6)[:PROMPT] for ids, _ in examples(64, 2)]
        self.prompts = prompts[:EIGHT]

    def one(self) -> float:
        return seconds(lambda: self.answer([0]))

    def eight(self) -> float:
        return seconds(lambda: self.answer([0] * EIGHT))

    def one_thread(self) -> float:
        return self.use_threads(1)

    def all_threads(self) -> float:
        return self.use_threads(THREADS)

    def use_threads(self, threads: int) -> float:
        """0, for the pipe."""
        torch.set_num_threads(threads)
        return 0.0


class Ours(Texts, Batch):
    """`lora serve`'s generator, without adapters."""

    prepare: Prepare | None = None

    def load(self, folder: Path) -> None:
        pool = ModelPool(prepare=self.prepare)
        pool.load("0", folder / "base", None)
        type(pool.get("0").loaded.tokenizer).end_ids = frozenset()  # type: ignore[method-assign]
        self.generator = BatchedGenerator(pool)

    def use_threads(self, threads: int) -> float:
        # a thread has its own number
        self.generator.call(lambda _: torch.set_num_threads(threads)).result()
        return 0.0


class OursInQ8(Ours):
    """The same with `--quantization q8_0`."""

    prepare = Q8Bases()


class Transformers(Texts):
    """`model.generate`; all prompts have the same length."""

    def load(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)

    def answer(self, adapters: Sequence[int]) -> None:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        ids = torch.tensor(self.prompts[: len(adapters)])
        with torch.no_grad():
            out = self.model.generate(ids, pad_token_id=0, **options)
        assert out.shape == (len(adapters), PROMPT + NEW_TOKENS)


class LlamaCppTexts(Texts, LlamaCpp):
    """The same in llama.cpp."""

    def use_threads(self, threads: int) -> float:
        self.lib.llama_set_n_threads(self.context, threads, threads)
        return 0.0
