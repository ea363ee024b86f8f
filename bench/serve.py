"""Requests for many adapters on one base: in one batch, one after the other, with PEFT, and with
llama.cpp.

The base is that of bench/real.py in bf16. LORA_BENCH_GGUF names the same model as a GGUF file in
f16, for llama.cpp.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Row
from bench.real import ROUNDS, THREADS, ask, base, side
from bench.real_sides import RANK, examples, seconds
from pipeline.adapters.attach import adapter_layers, attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.inference.batching import BatchedGenerator, GeneratedToken, Generation
from pipeline.inference.model_pool import ModelPool
from pipeline.models.generate import generate
from pipeline.models.load import load_base, save_base

REQUESTS, NEW_TOKENS = 8, 32
ADAPTERS = {"one": 1, "four": 4, "eight": 8}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GGUF = os.environ.get("LORA_BENCH_GGUF", "")


def serve() -> Iterator[Row]:
    """8 requests of 7 to 36 tokens and 32 new ones each, for 1, 4 or 8 adapters on all linears."""
    with _models() as (folder, name), ExitStack() as stack:
        kinds: dict[str, Callable[[Path], Any]] = {
            "batch": Batch,
            "turns": OneAfterAnother,
            "peft": PeftPerAdapter,
            "mixed": PeftMixedBatch,
        }
        if Path(GGUF).is_file() and find_spec("llama_cpp_py_sync"):
            kinds["llama.cpp"] = partial(LlamaCpp, GGUF)
        pipes = {what: stack.enter_context(side(kind, folder)) for what, kind in kinds.items()}
        times: dict[tuple[str, str], list[float]] = {}
        for turn in range(ROUNDS + 1):  # the first is a warm-up
            for order in ADAPTERS:
                for what, pipe in pipes.items():
                    if what != "llama.cpp" or order == "eight":
                        times.setdefault((what, order), []).extend([ask(pipe, order)][:turn])
    yield from _rows(name, {key: median(each) for key, each in times.items()})


def _rows(name: str, times: dict[tuple[str, str], float]) -> Iterator[Row]:
    compared = {
        "turns": ("one after the other", 3),
        "peft": ("PEFT, a batch per adapter", 2),
        "mixed": ("PEFT, one mixed batch", 2),
    }
    for order, count in ADAPTERS.items():
        mine = times["batch", order]
        what = f"8 requests for {count} adapter{'s' * (count > 1)}, {name}, {_speed(mine)}"
        for other, (title, least) in compared.items():
            theirs = times[other, order]
            # a single adapter is what PEFT's batches are made for
            goal = f"at least {least} ×" if count == REQUESTS else ""
            ratio = theirs / mine
            yield Row(
                what, mine, f"{title}, {_speed(theirs)}", ratio, goal, not goal or ratio >= least
            )
            what = "the same"
        if ("llama.cpp", order) in times:
            theirs = times["llama.cpp", order]
            reference = f"llama.cpp f16 without adapters, one batch, {_speed(theirs)}"
            yield Row(what, mine, reference, theirs / mine, "", True)


def _speed(seconds_taken: float) -> str:
    return f"{REQUESTS * NEW_TOKENS / seconds_taken:,.0f} tokens a second"


@contextmanager
def _models() -> Iterator[tuple[Path, str]]:
    """A folder with the base in bf16 and 8 adapters, which random updates make differ."""
    with base() as (folder, name), tempfile.TemporaryDirectory() as root:
        stored, spec = Path(root), AdapterSpec(RANK, 2 * RANK, TARGETS)
        (stored / "base").mkdir()
        save_base(stored / "base", load_base(folder, "bf16"))
        for n in range(REQUESTS):
            model = load_base(stored / "base").model
            attach(model, spec, torch.bfloat16)
            for _, layer in adapter_layers(model):
                nn.init.normal_(layer.lora_B, std=0.02)
            (stored / str(n)).mkdir()
            save_adapter(stored / str(n), model, spec, str(stored / "base"))
        yield stored, name


class Requests:
    """A side that answers the requests; each method returns the seconds for that many adapters."""

    new_tokens = NEW_TOKENS

    def __init__(self, folder: Path) -> None:
        self.prompts = [ids[: 4 * n + 7] for n, (ids, _) in enumerate(examples(64, 5)[:REQUESTS])]
        self.prompts = [(ids * 6)[: 4 * n + 7] for n, ids in enumerate(self.prompts)]
        self.load(folder)

    def one(self) -> float:
        return seconds(lambda: self.answer([0] * REQUESTS))

    def four(self) -> float:
        return seconds(lambda: self.answer([n % 4 for n in range(REQUESTS)]))

    def eight(self) -> float:
        return seconds(lambda: self.answer([*range(REQUESTS)]))

    def load(self, folder: Path) -> None:
        raise NotImplementedError

    def answer(self, adapters: Sequence[int]) -> None:
        """NEW_TOKENS tokens after each prompt, by the adapter with this number."""
        raise NotImplementedError


class Batch(Requests):
    """`lora serve`'s generator."""

    def load(self, folder: Path) -> None:
        self.pool = _pool(folder)
        self.generator = BatchedGenerator(self.pool)

    def answer(self, adapters: Sequence[int]) -> None:
        done, lengths = threading.Semaphore(0), [0] * len(adapters)

        def submit(_: ModelPool) -> None:
            for n, adapter in enumerate(adapters):

                def count(_: GeneratedToken, n: int = n) -> None:
                    lengths[n] += 1

                request = Generation(str(adapter), tuple(self.prompts[n]), self.new_tokens)
                self.generator.submit(request, count, lambda _: done.release())

        self.generator.call(submit)
        for _ in adapters:
            done.acquire()
        assert lengths == [self.new_tokens] * len(adapters)


class OneAfterAnother(Requests):
    """As `lora prompt` generates."""

    def load(self, folder: Path) -> None:
        self.pool = _pool(folder)

    def answer(self, adapters: Sequence[int]) -> None:
        for adapter, prompt in zip(adapters, self.prompts, strict=True):
            model = self.pool.get(str(adapter)).at(1).model
            assert len(list(generate(model, prompt, (), NEW_TOKENS))) == NEW_TOKENS


def _pool(folder: Path) -> ModelPool:
    """The adapters by their numbers; no token ends a text."""
    pool = ModelPool()
    for n in range(REQUESTS):
        pool.load(str(n), folder / "base", folder / str(n))
    type(pool.get("0").loaded.tokenizer).end_ids = frozenset()  # type: ignore[method-assign]
    torch.set_num_threads(THREADS)
    return pool


class PeftPerAdapter(Requests):
    """`model.generate`, one adapter after the other, each with its requests as a batch padded on
    the left.
    """

    def load(self, folder: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        self.model = PeftModel.from_pretrained(model, folder / "0", adapter_name="0")
        for n in range(1, REQUESTS):
            self.model.load_adapter(folder / str(n), adapter_name=str(n))
        self.model.eval()

    def answer(self, adapters: Sequence[int]) -> None:
        for adapter in dict.fromkeys(adapters):
            self.model.set_adapter(str(adapter))
            self.generate(
                [prompt for n, prompt in zip(adapters, self.prompts, strict=True) if n == adapter]
            )

    def generate(self, prompts: Sequence[list[int]], **options: Any) -> None:
        options |= {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with torch.no_grad():
            out = self.model.generate(**_padded_left(prompts), **options)
        assert out.shape == (len(prompts), max(map(len, prompts)) + NEW_TOKENS)


class PeftMixedBatch(PeftPerAdapter):
    """The same with all requests in one batch, each with the name of its adapter."""

    def answer(self, adapters: Sequence[int]) -> None:
        self.generate(self.prompts, adapter_names=[str(n) for n in adapters])


def _padded_left(prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ),
    }


class LlamaCpp(Requests):
    """The requests as parallel sequences of one llama_batch, greedy, without adapters."""

    def __init__(self, gguf: str, folder: Path) -> None:
        self.gguf = gguf
        super().__init__(folder)

    def load(self, folder: Path) -> None:  # noqa: ARG002 (the base is in the GGUF file)
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self.quiet = self.ffi.callback(
            "void(enum ggml_log_level, const char *, void *)", lambda *_: None
        )
        self.lib.llama_log_set(self.quiet, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(
            self.gguf.encode(), self.lib.llama_model_default_params()
        )
        options = self.lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = 512 * REQUESTS, REQUESTS, 512
        options.n_threads = options.n_threads_batch = THREADS
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.rows = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def answer(self, adapters: Sequence[int]) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        unread = [[*ids] for ids in self.prompts[: len(adapters)]]
        past = [0] * len(adapters)
        batch = self.lib.llama_batch_init(sum(map(len, unread)), 0, 1)
        for _ in range(self.new_tokens):
            last, batch.n_tokens = [], 0
            for sequence, ids in enumerate(unread):
                for id_ in ids:
                    n = batch.n_tokens
                    batch.token[n], batch.pos[n], batch.n_seq_id[n] = id_, past[sequence], 1
                    batch.seq_id[n][0], batch.logits[n] = sequence, False
                    batch.n_tokens, past[sequence] = n + 1, past[sequence] + 1
                last.append(batch.n_tokens - 1)
                batch.logits[last[-1]] = True
            assert self.lib.llama_decode(self.context, batch) == 0
            unread = [[self._likeliest(n)] for n in last]
        self.lib.llama_batch_free(batch)

    def _likeliest(self, n: int) -> int:
        row = self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, n), 4 * self.rows)
        return int(torch.frombuffer(row, dtype=torch.float32).argmax())
