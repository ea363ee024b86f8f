"""Many requests in one forward give the texts that each gives alone."""

import gc
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.attach import adapter_layers, attach, resolve
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import weight_of
from pipeline.adapters.mixed import MixedAdapter
from pipeline.adapters.peft import save_adapter
from pipeline.adapters.virtual import attach_virtual_tokens, save_virtual
from pipeline.errors import UserError
from pipeline.inference import batched_model, batching, completions
from pipeline.inference.batched_model import BatchedModel, Part
from pipeline.inference.batching import BatchedGenerator, Busy, GeneratedToken, Generation
from pipeline.inference.completions import complete_all
from pipeline.inference.model_pool import ModelPool, Resident, ResidentBase
from pipeline.models import pages
from pipeline.models.device import Limits
from pipeline.models.generate import GREEDY, Sampling, bytes_per_token, generate
from pipeline.models.load import load_base
from pipeline.models.pages import PagePool, SequenceCache
from pipeline.models.transformers_model import from_config
from pipeline.stages.methods import ia3
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.families import FAMILIES, OTHERS, WIDE, new_project
from tests.helpers.real import toy

TARGETS = ("fc1", "k_proj", "q_proj")
ENDS = ("embed_tokens", "lm_head")
SPECS = {
    "lora": AdapterSpec(3, 6.0, TARGETS),
    "other": AdapterSpec(4, 2.0, ("v_proj", "q_proj", "fc2")),
    "all": AdapterSpec(3, 6.0, TARGETS, saved=ENDS),
    "rows": AdapterSpec(3, 6.0, TARGETS, rows=dict.fromkeys(ENDS, (60, 5, 41))),
    "embedding": AdapterSpec(3, 6.0, ("embed_tokens", "q_proj")),
    "dora": AdapterSpec(3, 6.0, TARGETS, dora=True),
}
VIRTUAL = ("prefix", "prompt")
ANY_STRENGTH = ("base", *SPECS)
Ended = tuple[list[GeneratedToken], str | Exception]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MiniGPT base, and an adapter of every kind."""
    root = tmp_path_factory.mktemp("models")
    base = checkpoint(root / "base")
    made = {
        name: adapter(root / name, base, spec, seed)
        for seed, (name, spec) in enumerate(SPECS.items())
    }
    for kind in VIRTUAL:
        made[kind] = root / kind
        made[kind].mkdir()
        model, tokenizer = load_base(base)
        attach_virtual_tokens(model, kind, 3, len(tokenizer), seed=0)
        save_virtual(made[kind], model, str(base))
    made["ia3"] = root / "ia3"
    made["ia3"].mkdir()
    model = load_base(base).model
    layers = ia3.wrap(model, resolve(model, ["k_proj", "v_proj"]), resolve(model, ["fc2"]))
    for layer in layers.values():
        for vector in layer.adapter_parameters().values():
            nn.init.normal_(vector, 1, 0.5)
    named = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
    ia3.save(made["ia3"], layers, named)
    return {"base": base, **made}


def pool_of(folders: dict[str, Path]) -> ModelPool:
    pool, base = ModelPool(), folders["base"]
    for name, folder in folders.items():
        pool.load(name, base, None if name == "base" else folder)
    return pool


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> ModelPool:
    return pool_of(folders)


@pytest.fixture
def pool(folders: dict[str, Path]) -> ModelPool:
    return pool_of(folders)


Start = Callable[..., BatchedGenerator]


@pytest.fixture
def start(pool: ModelPool) -> Iterator[Start]:
    """Starts a generator, which is closed after the test."""
    started: list[BatchedGenerator] = []

    def start_one(models: ModelPool = pool, **options: Any) -> BatchedGenerator:
        started.append(BatchedGenerator(models, **options))
        return started[-1]

    yield start_one
    for generator in started:
        generator.close()


def alone(references: ModelPool, request: Generation) -> list[int]:
    loaded = references.get(request.model).at(request.strength)
    return list(
        generate(
            loaded.model, request.ids, loaded.tokenizer.end_ids, request.limit, request.sampling
        )
    )


def submit(
    generator: BatchedGenerator, request: Generation, ended: "threading.Event | None" = None
) -> Callable[[], Ended]:
    """A function that waits for the answer."""
    tokens, reasons, end = (
        list[GeneratedToken](),
        list[str | Exception](),
        ended or threading.Event(),
    )

    def on_end(reason: str | Exception) -> None:
        reasons.append(reason)
        end.set()

    generator.submit(request, tokens.append, on_end)

    def wait() -> Ended:
        assert end.wait(60)
        (reason,) = reasons
        return tokens, reason

    return wait


def answers(generator: BatchedGenerator, requests: Sequence[Generation]) -> list[Ended]:
    """Submitted between two steps, so that they are waiting together."""
    return [
        wait()
        for wait in generator.call(
            lambda _: [submit(generator, request) for request in requests]
        ).result()
    ]


def texts(generator: BatchedGenerator, requests: Sequence[Generation]) -> list[list[int]]:
    return [[token.id for token in tokens] for tokens, _ in answers(generator, requests)]


def _append(order: list[int], n: int, _: GeneratedToken) -> None:
    order.append(n)


def _set(event: threading.Event, _: str | Exception) -> None:
    event.set()


def _unload(name: str, models: ModelPool) -> None:
    models.unload(name)


def _tripled(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x) * 3
    return out


ids = st.lists(st.integers(3, 73), min_size=1, max_size=12).map(tuple)
samplings = st.one_of(
    st.just(GREEDY),
    st.builds(Sampling, st.just(1.0), top_k=st.sampled_from([0, 5]), seed=st.integers(0, 99)),
)
requests = st.builds(
    Generation,
    st.sampled_from(ANY_STRENGTH),
    ids,
    st.integers(0, 40),
    samplings,
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
) | st.builds(
    Generation,
    st.sampled_from([*VIRTUAL, "ia3"]),
    ids,
    st.integers(0, 40),
    samplings,
    st.sampled_from([0.0, 1.0]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=1, max_size=24), st.integers(1, 16), st.integers(50, 400))
@pytest.mark.slow
def test_a_text_is_the_same_whatever_is_beside_it(
    references: ModelPool, wanted: list[Generation], max_batch: int, max_tokens: int
) -> None:
    generator = BatchedGenerator(references, max_batch, max_tokens=max_tokens)
    try:
        found = [
            [token.id for token in wait()[0]]
            for wait in [submit(generator, request) for request in wanted]
        ]
    finally:
        generator.close()
    assert found == [alone(references, request) for request in wanted]


@pytest.mark.slow
def test_two_hundred_requests_at_once_are_answered_as_each_alone(
    start: Start, references: ModelPool
) -> None:
    numbers = torch.Generator().manual_seed(0)
    names = [*ANY_STRENGTH, *VIRTUAL, "ia3"]
    wanted = [
        Generation(
            names[n % len(names)],
            (*torch.randint(3, 74, (1 + n % 9,), generator=numbers).tolist(),),
            5 + n % 20,
        )
        for n in range(200)
    ]
    generator, found = start(), [alone(references, request) for request in wanted]
    assert texts(generator, wanted) == found
    assert max(generator.batch_sizes) > 8
    assert (generator.running, generator.waiting, generator.tokens) == (0, 0, sum(map(len, found)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@pytest.mark.sampled(3)
def test_every_family_answers_in_a_batch_as_alone(
    tmp_path: Path, start: Start, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and texts are longer than the sliding windows of 5 tokens, and prompts are read in
    parts.
    """
    monkeypatch.setattr(batching, "device_limits", lambda _: Limits(16, 8, 0))
    base = new_project(tmp_path, (FAMILIES | OTHERS)[name]) / "base"
    linears = (
        ["c_attn"]
        if name == "gpt2"
        else ["query_key_value"]
        if name == "bloom"
        else ["q_proj", "v_proj"]
    )
    pool, references = ModelPool(), ModelPool()
    for models in (pool, references):
        models.load("base", base, None)
        for seed, adapted in enumerate(("one", "two")):
            models.load(
                adapted,
                base,
                adapter(tmp_path / adapted, base, AdapterSpec(4, 8.0, tuple(linears)), seed),
            )
    wanted = [
        Generation(model, (*range(3, 3 + length),), limit, strength=strength)
        for model, length, limit, strength in [
            *(("base", 3, 12, 1.0), ("one", 9, 12, 1.0), ("two", 1, 14, 1.0)),
            *(("one", 7, 10, 0.5), ("two", 11, 3, 1.0), ("base", 8, 12, 1.0)),
        ]
    ]
    generator = start(pool)
    assert texts(generator, wanted) == [alone(references, request) for request in wanted]
    together = name != "bloom"  # its attention knows no sequences
    assert max(generator.batch_sizes) >= 4 if together else max(generator.batch_sizes) == 1


def llama_in_bf16(root: Path) -> tuple[ModelPool, list[str]]:
    """Large enough that no update is folded into a weight, which would round it; oneDNN sums 1536
    inputs in parts.
    """
    sizes = {
        "hidden_size": 256,
        "head_dim": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 1536,
    }
    family = replace(FAMILIES["llama"], config={**FAMILIES["llama"].config, **sizes})
    base = new_project(root, family, torch.bfloat16) / "base"
    pool, names = ModelPool(), ["base", "one", "two"]
    pool.load("base", base, None)
    for seed, name in enumerate(names[1:]):
        folder = adapter(
            root / name,
            base,
            AdapterSpec(4, 8.0, ("q_proj", "v_proj", "o_proj", "down_proj", "up_proj")),
            seed,
        )
        pool.load(name, base, folder)
    return pool, names


@pytest.mark.filterwarnings("ignore")
def test_logits_in_bf16_do_not_depend_on_the_neighbours(tmp_path: Path) -> None:
    pool, names = llama_in_bf16(tmp_path)
    models = [pool.get(name) for name in names]
    batched = BatchedModel(models[0].base)
    assert all(map(batched.takes, models))
    adapters = [batched.adapter(model, 1.0) for model in models]

    def read(rows: Sequence[int]) -> list[Tensor]:
        """Each sequence's logits after its prompt of another length, and after each of 3 more
        tokens.
        """
        pool = PagePool(32)
        sequences = [
            (adapters[row], SequenceCache(pool, 32), [*range(2, 5 + 3 * row)]) for row in rows
        ]
        steps = [batched.logits([Part(*sequence) for sequence in sequences])]
        steps += [
            batched.logits([Part(a, cache, [token]) for a, cache, _ in sequences])
            for token in (7, 9, 4)
        ]
        return [*torch.stack(steps, 1)]

    together = read([0, 0, 1, 1, 1, 2])
    for row, logits in zip([0, 0, 1, 1, 1, 2], together, strict=True):
        (lonely,) = read([row])
        assert (lonely - logits).norm() <= 0.02 * lonely.norm()
        assert torch.equal(lonely.argmax(-1), logits.argmax(-1))


@pytest.mark.filterwarnings("ignore")
def test_adapters_in_bf16_come_go_and_change_their_strength(tmp_path: Path) -> None:
    pool, _ = llama_in_bf16(tmp_path)
    base, folders = pool.get("base").base, {name: tmp_path / name for name in ("one", "two")}
    batched = BatchedModel(base)

    def read(*rows: tuple[str, float]) -> list[Tensor]:
        """Each row's logits after three tokens."""
        residents = [pool.get(name) for name, _ in rows]
        assert all(map(batched.takes, residents))
        cache = PagePool(16)
        sequences = [SequenceCache(cache, 16) for _ in rows]
        adapters = [
            batched.adapter(resident, strength)
            for resident, (_, strength) in zip(residents, rows, strict=True)
        ]
        for token in (5, 9, 7):
            parts = [Part(*pair, [token]) for pair in zip(adapters, sequences, strict=True)]
            logits = batched.logits(parts)
        return [*logits]

    one, two = read(("one", 1.0), ("two", 1.0))
    weak, plain, none = read(("one", 0.5), ("base", 1.0), ("two", 0.0))
    assert torch.equal(plain, none)
    assert all((plain - logits).norm() > 0.01 * plain.norm() for logits in (one, two, weak))
    unloaded = weakref.ref(pool.get("one").loaded.model)
    part = weakref.ref(pool.get("one").loaded.model.blocks[0].get_submodule("mlp.up_proj"))
    pool.unload("one")
    batched.forget()
    gc.collect()
    assert (unloaded(), part()) == (None, None)
    # the same name, another adapter
    pool.load("one", base.folder, folders["two"])
    exchanged, weaker = read(("one", 1.0), ("two", 0.5))
    assert torch.equal(exchanged, two)
    pool.load("one", base.folder, folders["one"])
    again, same = read(("one", 0.5), ("two", 0.5))
    assert torch.equal(again, weak) and torch.equal(same, weaker)
    assert not torch.equal(weaker, two)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_llama_in_bf16_answers_in_a_batch_as_alone(tmp_path: Path, start: Start) -> None:
    pool, names = llama_in_bf16(tmp_path)
    references, _ = llama_in_bf16(tmp_path / "again")
    wanted = [Generation(names[n % 3], (*range(2 + n, 5 + 2 * n),), 20) for n in range(9)]
    assert texts(start(pool), wanted) == [alone(references, request) for request in wanted]


@pytest.mark.parametrize(
    ("kind", "independent"), [("default", True), ("dynamic", False), ("yarn", True)]
)
def test_rotary_positions_that_depend_on_the_longest_text_are_not_batched(
    kind: str, independent: bool
) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    model = from_config(
        {"model_type": "llama", "vocab_size": 9, **WIDE, "rope_parameters": rope}, torch.float32
    )
    assert model.mixes_lengths == independent


def test_log_probabilities_are_those_of_the_models_own_logits(
    start: Start, references: ModelPool
) -> None:
    request = Generation("lora", (5, 9, 30), 6, Sampling(1.5, seed=4), top_logprobs=4)
    others = [Generation(name, (8, 9), 9) for name in SPECS]
    (tokens, reason), *_ = answers(start(), [request, *others])
    assert (len(tokens), reason) == (6, "length")
    drawn = [*request.ids, *(token.id for token in tokens)]
    with torch.no_grad():
        expected = references.get("lora").at(1).model(torch.tensor([drawn]))[0].log_softmax(-1)
    for token, logprobs in zip(tokens, expected[2:], strict=False):
        assert token.logprob == pytest.approx(float(logprobs[token.id]), abs=1e-4)
        assert [id_ for id_, _ in token.top] == logprobs.topk(4).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(
            logprobs.topk(4).values.tolist(), abs=1e-4
        )


def test_an_end_token_stops_a_request_and_is_not_passed_on(start: Start, pool: ModelPool) -> None:
    loaded, request = pool.get("base").loaded, Generation("base", (5, 9), 20, Sampling(1.0, seed=4))
    text = alone(pool, request)
    stop = text[7]
    loaded.tokenizer.end_ids = frozenset([stop])
    (tokens, reason), *_ = answers(start(), [request, replace(request, ids=(7,))])
    assert ([token.id for token in tokens], reason) == (text[: text.index(stop)], "stop")


def test_a_text_ends_at_the_models_last_position(start: Start) -> None:
    (first, reason), (second, full) = answers(
        start(), [Generation("base", (5,) * n, 99) for n in (30, 32)]
    )
    assert (len(first), reason) == (2, "length")
    assert (second, full) == ([], "length")


def test_a_cancelled_request_frees_its_slot_at_once(start: Start) -> None:
    generator, reasons, seen = start(max_batch=1), list[str | Exception](), list[int]()
    ended, tickets = threading.Event(), list[batching.Ticket]()

    def on_token(token: GeneratedToken) -> None:
        seen.append(token.id)
        if len(seen) == 3:
            tickets[0].cancel()

    def on_end(reason: str | Exception) -> None:
        reasons.append(reason)
        ended.set()

    def begin(_: ModelPool) -> Callable[[], Ended]:
        tickets.append(generator.submit(Generation("base", (5,), 30), on_token, on_end))
        return submit(generator, Generation("base", (6,), 2))

    wait = generator.call(begin).result()
    assert ended.wait(60)
    assert wait()[1] == "length"
    assert reasons == ["cancelled"]
    assert len(seen) == 3


def test_a_cancelled_request_that_waits_never_begins(start: Start) -> None:
    generator = start(max_batch=1)
    reasons = list[str | Exception]()

    def begin(_: ModelPool) -> Callable[[], Ended]:
        wait = submit(generator, Generation("base", (5,), 10))
        generator.submit(
            Generation("base", (6,), 9), lambda _: pytest.fail("began"), reasons.append
        ).cancel()
        return wait

    assert generator.call(begin).result()()[1] == "length"
    assert generator.call(lambda _: reasons).result() == ["cancelled"]


def test_more_than_max_waiting_are_refused_at_once(start: Start) -> None:
    generator = start(max_batch=1, max_waiting=2)

    def fill(_: ModelPool) -> list[Callable[[], Ended]]:
        waits = [submit(generator, Generation("base", (5,), 3)) for _ in range(2)]
        with pytest.raises(Busy, match="2 requests are waiting already"):
            submit(generator, Generation("base", (5,), 3))
        return waits

    assert [wait()[1] for wait in generator.call(fill).result()] == ["length"] * 2


def test_requests_begin_in_the_order_in_which_they_came(start: Start) -> None:
    generator, order = start(max_batch=1), list[int]()

    def begin(_: ModelPool) -> list[threading.Event]:
        ends = [threading.Event() for _ in range(8)]
        for n, end in enumerate(ends):
            request = Generation(ANY_STRENGTH[n % 4], (5,), 1 + n % 3)
            generator.submit(request, partial(_append, order, n), partial(_set, end))
        return ends

    for end in generator.call(begin).result():
        assert end.wait(60)
    assert list(dict.fromkeys(order)) == [*range(8)]


def test_a_long_prompt_does_not_hold_up_those_that_run(
    start: Start, references: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "device_limits", lambda _: Limits(16, 4, 0))
    generator, order = start(), list[str]()
    long, short = Generation("lora", (*range(5, 26),), 3), Generation("other", (9,), 12)
    ends = {name: threading.Event() for name in ("long", "short")}
    tokens = {name: list[int]() for name in ends}

    def begin(_: ModelPool) -> None:
        for name, request in (("short", short), ("long", long)):

            def on_token(token: GeneratedToken, name: str = name) -> None:
                order.append(name)
                tokens[name].append(token.id)

            generator.submit(request, on_token, partial(_set, ends[name]))

    generator.call(begin).result()
    assert all(end.wait(60) for end in ends.values())
    assert order.index("long") >= 5  # 21 tokens are six steps; in each the other gets a token
    assert tokens == {"long": alone(references, long), "short": alone(references, short)}


def test_the_caches_never_need_more_than_max_tokens(start: Start, references: ModelPool) -> None:
    generator = start(max_tokens=31)
    wanted = [Generation("lora", (5,) * (1 + n), 10) for n in range(9)]
    sizes = list[int]()

    def begin(_: ModelPool) -> list[Callable[[], Ended]]:
        return [submit(generator, request) for request in wanted]

    step = generator._step

    def observed() -> None:
        sizes.append(sum(run.ticket.capacity for run in generator._running))
        step()

    generator._step = observed  # type: ignore[method-assign]
    waits = generator.call(begin).result()
    assert [[token.id for token in wait()[0]] for wait in waits] == [
        alone(references, request) for request in wanted
    ]
    assert 20 < max(sizes) <= 31
    with pytest.raises(UserError, match="may take 32 tokens; there is memory for 31"):
        submit(generator, Generation("base", (5,), 99))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["minigpt", "llama", "qwen3", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_takes_the_keys_and_values_that_the_config_names(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    model = (
        load_base(folders["base"]).model.to(dtype) if family == "minigpt" else toy(family, dtype)
    )
    shape = model.shape
    c: dict[str, Any] = getattr(model.config, "to_dict", dict)()
    size = c.get("head_dim") or weight_of(model.embeddings).shape[1] // shape.heads
    numbers = 2 * shape.layers * (c.get("num_key_value_heads") or shape.heads) * size
    assert bytes_per_token(model) == numbers * dtype.itemsize


def test_caches_take_half_of_the_memory_that_the_models_leave(
    start: Start, pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = bytes_per_token(pool.get("base").loaded.model)
    monkeypatch.setattr("pipeline.models.generate.available_memory", lambda _: 62 * token + 1)
    generator = start()
    generator.call(lambda _: generator.fit_to_memory()).result()
    assert generator.max_tokens == 31
    with pytest.raises(UserError, match="may take 32 tokens; there is memory for 31"):
        submit(generator, Generation("base", (5,), 99))


def test_a_request_that_waits_while_its_memory_goes_is_refused_and_the_next_is_answered(
    start: Start, references: ModelPool
) -> None:
    generator = start()
    large, small = Generation("base", (5, 6), 9), Generation("base", (5,), 3)

    def begin(_: ModelPool) -> list[Callable[[], Ended]]:
        waits = [submit(generator, request) for request in (large, small)]
        generator.max_tokens = 8  # a model was loaded
        return waits

    refused, answered = generator.call(begin).result()
    assert "may take 11 tokens; there is memory for 8" in str(refused()[1])
    assert [token.id for token in answered()[0]] == alone(references, small)


def test_a_model_that_comes_while_others_answer_leaves_them_their_caches(
    start: Start, pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they hold is no longer free, and theirs."""
    token = bytes_per_token(pool.get("base").loaded.model)
    monkeypatch.setattr("pipeline.models.generate.available_memory", lambda _: 20 * token)
    generator, rooms = start(), list[int]()

    def read(_: GeneratedToken) -> None:
        generator.fit_to_memory()
        rooms.append(generator.max_tokens)

    ended = threading.Event()
    generator.submit(Generation("base", (5, 6, 7), 4), read, partial(_set, ended))
    assert ended.wait(60) and rooms == [10 + n for n in range(3, 3 + len(rooms))]


def test_an_evaluation_generates_what_does_not_fit_side_by_side_one_after_the_other(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pool.get("lora").loaded
    prompts = [f"w{n} w{n + 1}" for n in range(3, 9)]
    sizes = list[Counter[int]]()

    class Watched(BatchedGenerator):
        def run_all(self) -> None:
            super().run_all()
            sizes.append(self.batch_sizes)

    monkeypatch.setattr(completions, "BatchedGenerator", Watched)
    expected = complete_all(loaded, prompts, 8)
    monkeypatch.setattr("pipeline.models.generate.available_memory", lambda _: 0)
    assert complete_all(loaded, prompts, 8) == expected
    assert [max(counts) for counts in sizes] == [len(prompts), 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Generation("gone", (5,), 3), "gone is not loaded"),
        (Generation("base", (), 3), "The prompt is empty"),
        (Generation("base", (5,) * 33, 3), "The prompt has 33 tokens; base takes 32"),
        (Generation("prefix", (5,) * 30, 3), "The prompt has 30 tokens; prefix takes 29"),
        (Generation("base", (5, 74), 3), "ids from 5 to 74; base has 74"),
        (Generation("base", (-1,), 3), "ids from -1"),
        (Generation("base", (5,), -1), "limit and top_logprobs must be at least 0"),
        (Generation("base", (5,), 3, strength=float("nan")), "strength must be from 0 to 2"),
        (
            Generation("prompt", (5,), 3, strength=0.5),
            "virtual tokens, whose strength cannot be scaled",
        ),
        (
            Generation("ia3", (5,), 3, strength=0.5),
            "ia3 is not LoRA, so its strength cannot be scaled",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_at_once(start: Start, request_: Generation, message: str) -> None:
    with pytest.raises(UserError, match=message):
        submit(start(), request_)


def test_a_request_whose_outputs_are_not_finite_ends_alone(
    tmp_path: Path, folders: dict[str, Path], start: Start, references: ModelPool, pool: ModelPool
) -> None:
    broken = load_base(folders["base"]).model
    attach(broken, SPECS["lora"])
    for _, layer in adapter_layers(broken):
        nn.init.constant_(layer.lora_A, 1e38)
        nn.init.constant_(layer.lora_B, 1e38)
    save_adapter(tmp_path, broken, SPECS["lora"], str(folders["base"]))
    pool.load("broken", folders["base"], tmp_path)
    wanted = [
        Generation(name, (5, 9, 7), 12)
        for name in ("lora", "other", "broken", "dora", "base", "broken")
    ]
    for request, (tokens, reason) in zip(wanted, answers(start(), wanted), strict=True):
        if request.model == "broken":
            assert not tokens and isinstance(reason, UserError) and "not finite" in str(reason)
        else:
            assert ([token.id for token in tokens], reason) == (
                alone(references, request),
                "length",
            )


def test_a_callback_that_raises_ends_its_request_only(start: Start, references: ModelPool) -> None:
    generator, reasons, ended = start(), list[str | Exception](), threading.Event()

    def on_token(_: GeneratedToken) -> None:
        raise ValueError("gone")

    def on_end(reason: str | Exception) -> None:
        reasons.append(reason)
        ended.set()
        raise ValueError("gone too")

    request = Generation("lora", (5,), 9)

    def begin(_: ModelPool) -> Callable[[], Ended]:
        generator.submit(request, on_token, on_end)
        return submit(generator, request)

    tokens, reason = generator.call(begin).result()()
    assert ([token.id for token in tokens], reason) == (alone(references, request), "length")
    assert ended.wait(60) and isinstance(reasons[0], ValueError)


def test_out_of_memory_ends_all_with_a_message_and_later_requests_are_answered(
    start: Start, references: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, wanted = start(), [Generation("lora", (5,), 4), Generation("base", (6, 7), 4)]
    assert len(answers(generator, wanted)) == 2  # what each adapter's check needs is tried before
    with monkeypatch.context() as patch:

        def fail(*_: object) -> Tensor:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes."
            )

        patch.setattr(BatchedModel, "logits", fail)
        for tokens, reason in answers(generator, wanted):
            assert (
                not tokens
                and isinstance(reason, UserError)
                and str(reason).startswith("out of memory (")
            )
    assert texts(generator, wanted) == [alone(references, request) for request in wanted]


@pytest.fixture
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 16 tokens, of which a few in common are copied."""
    monkeypatch.setattr(batched_model, "PagePool", partial(PagePool, 16))
    monkeypatch.setattr(pages, "LEAST_COPY", 3)


def pages_in_use(generator: BatchedGenerator) -> list[int]:
    return generator.call(
        lambda _: [batched.pool.used for batched in generator._batched.values()]
    ).result()


@pytest.mark.usefixtures("short_pages")
def test_prompts_that_begin_alike_are_read_once_and_answered_as_alone(
    start: Start, references: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*range(3, 22),)
    wanted = [
        Generation(model, (*common, 40 + n, 50 + n), 4, strength=strength)
        for n, (model, strength) in enumerate(
            [("base", 1.0), ("lora", 1.0), ("lora", 0.5), ("dora", 1.0), ("lora", 0.0)]
        )
    ]
    generator, read = start(), Counter[MixedAdapter | None]()
    logits = BatchedModel.logits

    def count(model: BatchedModel, parts: Sequence[Part]) -> Tensor:
        for part in parts:
            read[part.adapter] += len(part.ids)
        return logits(model, parts)

    first = texts(generator, wanted)
    monkeypatch.setattr(BatchedModel, "logits", count)
    # other last tokens, and a prompt that goes on after an answer
    more = [replace(request, ids=(*common, 60, 61)) for request in wanted]
    more.append(replace(wanted[1], ids=(*wanted[1].ids, *first[1], 62, 63)))
    assert first == [alone(references, request) for request in wanted]
    assert texts(generator, more) == [alone(references, request) for request in more]
    # two tokens of each prompt, then those of the answers but the last; one more of the longest
    assert read.total() == 6 * (2 + 3) + 1
    assert pages_in_use(generator) == [0]


@pytest.mark.usefixtures("short_pages")
def test_whatever_ends_a_request_gives_its_pages_back(
    start: Start, references: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = start()
    request, tokens = Generation("lora", (*range(3, 22),), 9), list[int]()
    assert len(texts(generator, [request])[0]) == 9

    def stop(token: GeneratedToken) -> None:
        tokens.append(token.id)
        generator._running[0].ticket.cancel()

    ended = threading.Event()
    generator.submit(request, stop, partial(_set, ended))
    assert ended.wait(60) and len(tokens) < 9
    with monkeypatch.context() as patch:

        def fail(_: BatchedModel, parts: Sequence[Part]) -> Tensor:
            for part in parts:
                part.cache.reserve(part.cache.length + len(part.ids))
            raise RuntimeError("the device is gone")

        patch.setattr(BatchedModel, "logits", fail)
        ((_, reason),) = answers(generator, [request])
        assert str(reason) == "the device is gone"
    assert pages_in_use(generator) == [0]
    assert texts(generator, [request]) == [alone(references, request)]
    generator.call(lambda _: generator.fit_to_memory()).result()
    assert generator.call(
        lambda _: [batched.pool.count for batched in generator._batched.values()]
    ).result() == [0]


def test_models_come_and_go_while_requests_run(
    folders: dict[str, Path], start: Start, references: ModelPool
) -> None:
    generator = start(max_batch=2)
    running = Generation("lora", (5, 6), 30)

    def begin(_: ModelPool) -> list[Callable[[], Ended]]:
        waits = [submit(generator, running), submit(generator, replace(running, model="dora"))]
        return [*waits, submit(generator, replace(running, model="other"))]

    first, second, third = generator.call(begin).result()

    def change(models: ModelPool) -> None:
        for name in ("lora", "other"):
            models.unload(name)
        models.load("new", folders["base"], folders["other"])

    generator.call(change).result()
    new = submit(generator, replace(running, model="new"))
    assert [token.id for token in first()[0]] == alone(references, running)
    assert [token.id for token in second()[0]] == alone(references, replace(running, model="dora"))
    _, reason = third()
    assert isinstance(reason, UserError) and "other is not loaded" in str(reason)
    assert [token.id for token in new()[0]] == alone(references, replace(running, model="other"))
    with pytest.raises(UserError, match="nothing_like_it is not loaded"):
        generator.call(lambda models: models.unload("nothing_like_it")).result()


def test_an_adapter_that_is_unloaded_leaves_memory(start: Start, pool: ModelPool) -> None:
    generator = start()
    answers(
        generator, [Generation(name, (5,), 4, strength=0.5) for name in ("lora", "dora", "other")]
    )
    kept: list[weakref.ref[nn.Module]] = [
        weakref.ref(pool.get(name).loaded.model) for name in ("lora", "dora")
    ]
    parts: list[weakref.ref[nn.Module]] = [
        weakref.ref(pool.get("lora").loaded.model.blocks[0].get_submodule("fc1"))
    ]
    for name in ("lora", "dora"):
        generator.call(partial(_unload, name)).result()
    answers(generator, [Generation("base", (5,), 1)])  # the thread has let go of its last request
    gc.collect()
    assert [ref() for ref in (*kept, *parts)] == [None] * 3


def test_a_model_that_does_not_agree_with_itself_alone_takes_its_turns_alone(
    start: Start, references: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agrees = BatchedModel._agrees

    def only_the_base(self: BatchedModel, adapter: MixedAdapter | None, model: nn.Module) -> bool:
        return adapter is None and agrees(self, adapter, model)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchedModel, "_agrees", only_the_base)
    generator, wanted = (
        start(),
        [Generation(name, (5, 9), 8) for name in ("base", "lora", "base", "dora")],
    )
    assert texts(generator, wanted) == [alone(references, request) for request in wanted]
    assert max(generator.batch_sizes) == 2


def test_a_layer_that_computes_something_else_is_noticed(pool: ModelPool) -> None:
    resident: Resident = pool.get("lora")
    base: ResidentBase = resident.base
    assert BatchedModel(base).takes(resident)
    for _, layer in adapter_layers(resident.loaded.model):
        layer.forward = partial(_tripled, layer.base)  # type: ignore[method-assign]
    assert not BatchedModel(base).takes(resident)


def test_closing_cancels_what_runs_and_what_waits(start: Start) -> None:
    generator = start(max_batch=1)
    waits = generator.call(
        lambda _: [submit(generator, Generation("base", (5,), 31)) for _ in range(50)]
    ).result()
    generator.close()
    assert waits[-1]()[1] == "cancelled"
    assert {wait()[1] for wait in waits} <= {"length", "cancelled"}
    with pytest.raises(UserError, match="stopping"):
        submit(generator, Generation("base", (5,), 3))
    with pytest.raises(UserError, match="stopping"):
        generator.call(ModelPool.names.__get__)


LEFT_BEHIND = """
import os, sys, threading, time
import torch
from pipeline.inference.batching import BatchedGenerator
from pipeline.inference.model_pool import ModelPool

def native():  # threads that Python did not start
    return len(os.listdir("/proc/self/task")) - threading.active_count()

torch.set_num_threads(4)
before = native()
torch.ones(10**6).add(1)
assert native() > before, "torch computed with several threads"
if sys.argv[1] == "generator":
    generator = BatchedGenerator(ModelPool())
deadline = time.monotonic() + 2
while native() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(native() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads of Linux")
def test_no_workers_of_the_thread_that_loaded_compete_with_the_generators() -> None:
    command = (sys.executable, "-c", LEFT_BEHIND)
    ended = [
        subprocess.run([*command, which], capture_output=True, text=True, check=True)
        for which in ("generator", "none")
    ]
    left = [int(run.stdout) for run in ended]
    assert left[0] == 0 < left[1], left
