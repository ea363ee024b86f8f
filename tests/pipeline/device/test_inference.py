"""Scores, generation, the engine for many adapters and SVD on a device without numbers: see
`stand_in`.
"""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.mixed import MixedAdapter
from pipeline.data.examples import Example
from pipeline.inference import score
from pipeline.inference.batched_model import BatchedModel, Part
from pipeline.inference.engine import LoadedModel
from pipeline.inference.model_pool import ResidentBase, view
from pipeline.models.base import CausalLM, packed_hidden_states
from pipeline.models.generate import Sampling, _side_by_side, generate
from pipeline.models.kernels import decode
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.models.pages import PagePool, SequenceCache
from pipeline.models.virtual_tokens import PrefixTokens, PromptTokens
from tests.helpers.real import ROWS, toy, with_lora
from tests.helpers.stand_in import READ, refuse, to_stand_in, watched

LONG = 600
PROMPT = [3 + n % 90 for n in range(LONG)]
# a token and its log-probability
TOKEN = "models/generate.py:next_tokens _to_copy"


def ready(model: CausalLM) -> CausalLM:
    """The model there; what is tried once, of the model or of this CPU, was tried before."""
    decode._is_available()
    assert model.supports_packing
    return to_stand_in(model).eval()


FAMILIES = ["llama", "gemma2", "gemma3", "gpt2", "minigpt"]
MODELS = [(name, dtype) for name in FAMILIES for dtype in (torch.bfloat16, torch.float32)]
MODELS += [("gpt_oss", torch.bfloat16)]  # in fp32 transformers' experts have no kernel on meta
IDS = [f"{name}-{dtype.itemsize * 8}" for name, dtype in MODELS]
each_model = pytest.mark.parametrize(("family", "dtype"), MODELS, ids=IDS)


def model_of(name: str, dtype: torch.dtype) -> CausalLM:
    if name == "minigpt":
        return MiniGPT(MiniGPTConfig(ROWS, 0, 1, d_model=32, max_positions=800))
    settings = {"max_position_embeddings": 800} if name != "gpt2" else {"n_positions": 800}
    return toy(name, dtype, **settings)


@each_model
def test_generation_reads_a_token_and_no_more(family: str, dtype: torch.dtype) -> None:
    model = ready(model_of(family, dtype))
    samplings = (Sampling(), Sampling(0.7), Sampling(0.7, top_k=5, top_p=0.9))
    for pages, sampling in product((False, True), samplings):
        _side_by_side[model] = pages and model.takes_packed_cache
        with watched(LONG - 1) as seen:
            assert len(list(generate(model, PROMPT, (), 4, sampling))) == 4
        refuse(seen, {TOKEN: 4})


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation_after_virtual_tokens(kind: str) -> None:
    model = model_of("qwen3", torch.bfloat16)
    assert model.supports_prefix
    prompt, prefix = PromptTokens(torch.randn(5, 32)), PrefixTokens(torch.randn(5, 128), 2, 2)
    model.set_virtual_tokens(prompt if kind == "prompt" else prefix)
    ready(model)
    with watched(LONG - 1) as seen:
        list(generate(model, PROMPT, (), 3))
    refuse(seen, {TOKEN: 3})


@each_model
def test_texts_to_score_are_copied_once_a_row(family: str, dtype: torch.dtype) -> None:
    model = ready(model_of(family, dtype))
    with watched(LONG - 1) as seen:
        hidden = list(packed_hidden_states(model, [PROMPT, PROMPT[:300], PROMPT[:120], PROMPT]))
    assert [len(each) for each in hidden] == [LONG, 300, 120, LONG]
    refuse(seen, {})


class Ids:
    """A tokenizer of numbers: "3 17 4"."""

    end_ids = (1,)
    end_id = 1
    chat_template = None

    def __len__(self) -> int:
        return ROWS

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split()))

    def continuation(self, _: str, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def unknown_words(self, _: str) -> list[str]:
        return []

    def word(self, id_: int) -> str:
        return f"{id_}"


TEXT = " ".join(map(str, PROMPT))


def loaded(model: CausalLM) -> LoadedModel:
    return LoadedModel("model", model, Ids(), Path("base"))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_an_evaluation_is_read_when_all_of_it_is_queued(dtype: torch.dtype) -> None:
    """Losses, choices and the divergence from the base: once each, however many examples there
    are.
    """
    model = ready(with_lora(toy("llama", dtype, max_position_embeddings=800)))
    examples = [Example(TEXT, "f.txt", n) for n in range(4)]
    with watched(LONG - 1) as seen:
        first = score.score(loaded(model), examples)
        assert seen.reads.total() == 2
        seen.clear()
        score.score(loaded(model), examples, first)
    refuse(seen, {"inference/score.py:score _to_copy": 3})


def test_answers_are_read_when_all_of_them_are_queued() -> None:
    """Numbers of each, and no logits."""
    model, k = ready(model_of("llama", torch.bfloat16)), 3
    pairs = [(TEXT, "5 6 7"), (TEXT, "8"), ("3", "4"), ("3", "")]
    with watched(LONG - 1) as seen:
        score.score_answers(loaded(model), pairs, k)
    refuse(seen, {READ: 1})
    assert seen.read_bytes[READ] == len(pairs) * (4 + 2 * k) * 4


def test_log_likelihoods_of_a_task_are_read_when_all_of_them_are_queued() -> None:
    """Two numbers of each continuation, two of which follow the same context, another is long."""
    pytest.importorskip("lm_eval")
    from pipeline.evaluation.harness_model import HarnessModel

    resident = SimpleNamespace(loaded=loaded(ready(model_of("llama", torch.bfloat16))))
    pool = SimpleNamespace(loaded=lambda _: resident)
    harness = HarnessModel(pool, "model")  # type: ignore[arg-type]
    requests = [(None, PROMPT[:9], [5]), (None, PROMPT[:9], [6]), (None, PROMPT[:50], PROMPT[:300])]
    with watched(LONG - 1) as seen:
        assert len(harness._loglikelihood_tokens(requests)) == 3
    refuse(seen, {READ: 1})
    assert seen.read_bytes[READ] == len(requests) * 2 * 8


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_sequences_of_many_adapters_are_one_copy(dtype: torch.dtype, dora: bool) -> None:
    base = ready(model_of("llama", dtype))
    resident = ResidentBase.__new__(ResidentBase)
    resident.loaded = loaded(base)
    adapters: list[MixedAdapter | None] = [None]
    with watched(LONG - 1) as seen:
        engine = BatchedModel(resident)
        for rank in (3, 5):
            adapted = view(base)
            attach(adapted, AdapterSpec(rank, 6.0, ("q_proj", "down_proj"), dora=dora))
            layers = {
                name: adapted.get_submodule(name)
                for name, m in adapted.named_modules()
                if hasattr(m, "lora_A")
            }
            assert len(layers) == 4
            engine._install(layers)
            adapters.append(MixedAdapter(layers))
        pool = PagePool()
        caches = [SequenceCache(pool, LONG + 4) for _ in adapters]
        seen.clear()
        engine.logits([Part(*each, PROMPT) for each in zip(adapters, caches, strict=True)])
        for _ in range(2):
            assert engine.logits(
                [Part(*each, [7]) for each in zip(adapters, caches, strict=True)]
            ).shape == (3, ROWS)
    refuse(seen, {})
