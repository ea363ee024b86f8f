"""How much is answered at once: on a CPU as ever, on an accelerator as much as its memory holds.

The accelerator is `tests/helpers/fake_accelerator.py`, with as much free memory as a test says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.inference.batching import BatchedGenerator, Generation, Running
from pipeline.inference.completions import cache_tokens
from pipeline.inference.model_pool import ModelPool
from pipeline.models import generate as generation
from pipeline.models.base import CausalLM, packed_hidden_states
from pipeline.models.device import device_limits
from pipeline.models.generate import bytes_per_token, generate_all
from pipeline.models.pages import PAGE
from tests.helpers import fake_accelerator
from tests.helpers.bases import toy_checkpoint

PLENTY = 10**6  # pages


@pytest.fixture
def base(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "base", num_hidden_layers=1, max_position_embeddings=700)
    return tmp_path / "base"


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with fake_accelerator.best(monkeypatch) as there:
        yield there


on_accelerator = pytest.mark.usefixtures("accelerator")


def load(base: Path, monkeypatch: pytest.MonkeyPatch, pages: int = PLENTY) -> ModelPool:
    """The model, where half of the free memory holds so many pages."""
    pool = ModelPool()
    leave_pages(monkeypatch, pool.load("base", base, None)[0].loaded.model, pages)
    return pool


def leave_pages(monkeypatch: pytest.MonkeyPatch, model: CausalLM, pages: int) -> None:
    free = 2 * pages * PAGE * bytes_per_token(model)
    monkeypatch.setattr(generation, "available_memory", lambda _: free)


class Watched(BatchedGenerator):
    """Notes how many tokens of each request a forward reads, and the pages that there are."""

    def __init__(
        self, pool: ModelPool, requests: Sequence[Generation], max_batch: int | None = None
    ) -> None:
        room = cache_tokens(pool.get("base").loaded.model, requests)
        super().__init__(pool, max_batch, len(requests), room, threaded=False)
        self.forwards, self.pages = list[list[int]](), 0
        self.answers: list[list[int]] = [[] for _ in requests]
        for request, ids in zip(requests, self.answers, strict=True):
            self.submit(request, lambda token, ids=ids: ids.append(token.id), self._ended)  # type: ignore[misc]
        self.run_all()

    def _ended(self, reason: str | Exception) -> None:
        assert reason in ("length", "stop")

    def _advance(self, counts: Mapping[Running, int], forward: Callable[[], Tensor]) -> None:
        self.forwards.append([*counts.values()])
        super()._advance(counts, forward)
        self.pages = max(self.pages, *(batched.pool.count for batched in self._batched.values()))

    @property
    def most(self) -> int:
        """Requests in one forward."""
        return max(map(len, self.forwards))


def requests_of(count: int, length: int = 3, limit: int = 2) -> list[Generation]:
    starts = [3 + n % 200 for n in range(count)]
    return [Generation("base", (*range(start, start + length),), limit) for start in starts]


def test_a_cpu_has_the_limits_that_it_had_and_an_accelerator_larger_ones() -> None:
    assert device_limits(torch.device("cpu")) == (16, 512, 1024)
    for name in ("cuda:1", "mps", "meta"):
        assert device_limits(torch.device(name)) == (256, 4096, 8192)


def test_a_cpu_answers_sixteen_at_once_and_as_many_as_asked_for(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, requests = load(base, monkeypatch), requests_of(40)
    generators = [Watched(pool, requests, most) for most in (None, 16, 3, 30)]
    assert [each.most for each in generators] == [16, 16, 3, 30]
    default, explicit, *_ = generators
    assert default.forwards == explicit.forwards, "as before there was a choice"
    # prompts and tokens are apart
    assert all(set(counts) in ({1}, {3}) for counts in default.forwards)
    assert len({str(each.answers) for each in generators}) == 1


@on_accelerator
def test_an_accelerator_answers_256_at_once_or_as_many_as_asked_for(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, requests = load(base, monkeypatch), requests_of(300)
    generators = [Watched(pool, requests, most) for most in (None, 3, 280)]
    assert [each.most for each in generators] == [256, 3, 280]
    assert len({str(each.answers) for each in generators}) == 1


@on_accelerator
def test_each_sequence_there_takes_whole_pages_of_what_memory_holds(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = load(base, monkeypatch, pages=6)
    short, long = requests_of(20), requests_of(20, length=PAGE, limit=1)
    for requests, most in ((short, 6), (long, 3)):
        generator = Watched(pool, requests)
        assert (generator.most, generator.pages) == (most, 6)
    assert Watched(pool, requests_of(20), 4).most == 4, "the option wins where it is less"


@on_accelerator
def test_an_accelerator_reads_prompts_beside_the_tokens_of_others(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = load(base, monkeypatch)
    # of different lengths, so that one joins when another ends
    requests = [*requests_of(1, limit=2), *requests_of(2, length=5, limit=6)]
    generator = Watched(pool, requests, 2)
    assert generator.forwards == [[3, 5], [1, 1], [1, 5], *[[1, 1]] * 3, [1], [1]]
    assert generator.answers == Watched(pool, requests, 1).answers
    # a prompt gets what the limit leaves, a running request always its token
    monkeypatch.setattr(
        "pipeline.inference.batching.device_limits",
        lambda device: device_limits(device)._replace(prompt_tokens=4),
    )
    limited = Watched(pool, requests, 2)
    assert limited.forwards[:4] == [[3, 1], [1, 4], [1, 4], [1, 1]]
    assert limited.answers == generator.answers


def groups(model: CausalLM, lengths: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts of `lengths`, the answers included, `generate_all` continues at once."""
    sizes = list[int]()

    def noted(_: CausalLM, prompts: Sequence[Sequence[int]], *_rest: object) -> list[list[int]]:
        sizes.append(len(prompts))
        return []

    monkeypatch.setattr(generation, "_generate_group", noted)
    generate_all(model, [[3] * (length - 9) for length in lengths], (), [9] * len(lengths))
    return sizes


def test_a_cpu_continues_4096_tokens_at_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base, monkeypatch).get("base").loaded.model
    assert groups(model, [100] * 100, monkeypatch) == [40, 40, 20]
    assert groups(model, [4000, 96, 1, 5000, 5], monkeypatch) == [2, 1, 1, 1]


@on_accelerator
def test_an_accelerator_continues_as_many_at_once_as_pages_fit_into_memory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base, monkeypatch).get("base").loaded.model
    assert groups(model, [10] * 300, monkeypatch) == [256, 44]
    # all have as many pages as the longest
    assert groups(model, [10] * 200 + [PAGE + 1] + [10], monkeypatch) == [200, 2]
    leave_pages(monkeypatch, model, 6)
    assert groups(model, [10] * 8 + [PAGE + 1] * 4, monkeypatch) == [6, 3, 3]
    # what a rank has left is not what the others have
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert groups(model, [10] * 300, monkeypatch) == [256, 44]


@on_accelerator
def test_there_is_no_memory_for_more_pages_than_a_group_has(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counts = load(base, monkeypatch).get("base").loaded.model, list[int]()
    read = generation.read_side_by_side

    def noted(*arguments: object) -> Tensor:
        logits = read(*arguments)  # type: ignore[arg-type]
        counts.append(arguments[1][0].pool.count)  # type: ignore[index]
        return logits

    monkeypatch.setattr(generation, "read_side_by_side", noted)
    assert len(generate_all(model, [[5, 6]] * 5, (), [3] * 5)) == 5
    assert max(counts[2:]) == 5, "it doubles up to that"


@pytest.mark.parametrize(("name", "most"), [("cpu", 1024), ("meta", 8192)])
def test_texts_to_score_are_packed_into_rows_of_the_devices_length(name: str, most: int) -> None:
    rows = list[int]()

    def hidden_states(ids: Tensor, *_: object) -> Tensor:
        rows.append(ids.shape[1])
        return torch.empty(1, ids.shape[1], 4, device=name)

    model = SimpleNamespace(
        device=torch.device(name), supports_packing=True, hidden_states=hidden_states
    )
    lengths = [128] * 100 + [most, 1, 2 * most]
    hidden = packed_hidden_states(model, [[3] * length for length in lengths])  # type: ignore[arg-type]
    assert [len(states) for states in hidden] == lengths
    full, rest = divmod(100 * 128, most)
    assert rows == [*[most] * full, rest, most, 1, 2 * most]
