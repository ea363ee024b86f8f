"""MiniGPT's block in one autograd node, against its modules one by one under autograd."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.attach import attach, disable_adapter
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.models import minigpt
from pipeline.models.kernels import low_rank_block as kernel
from pipeline.models.kernels.native import native
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
needs_native = pytest.mark.skipif(native() is None, reason="needs a C compiler")
IDS = torch.arange(36).remainder(20).view(3, 12)  # (B, T)


def model_with(*specs: AdapterSpec, config: MiniGPTConfig | None = None) -> tuple[MiniGPT, Any]:
    """A MiniGPT with an adapter for each spec, no factor of which is zero, and the routing of
    several.
    """
    torch.manual_seed(0)
    model, routing = MiniGPT(config or MiniGPTConfig(20, 0, 1)), None
    if len(specs) == 1:
        attach(model, specs[0])
    else:
        routing = attach_many(model, [lambda spec=spec: attach(model, spec) for spec in specs])  # type: ignore[misc]
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    return model.train(), routing


def gradients(
    model: MiniGPT, routing: Any, segments: Any, ids: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and every parameter's gradient of a loss of them."""
    if ids is None:
        ids = IDS if segments is None else IDS.view(len(segments[1]), -1)
    positions = (
        None
        if segments is None
        else torch.cat([torch.arange(n) for n in segments[0]]).expand(ids.shape)
    )
    counts = () if routing is None else (ids.numel() // len(routing.counts),) * len(routing.counts)
    model.zero_grad()
    with nullcontext() if routing is None else routing.route(counts):
        out = model.hidden_states(ids, positions, None if segments is None else segments[0])
        torch.autograd.backward((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum())
    return out.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each block that ran was one node."""
    calls = list[bool]()

    def spy(*given: Any) -> Tensor | None:
        out = kernel.low_rank_block(*given)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(minigpt, "low_rank_block", spy)
    return calls


def lora(rank: int = 4, alpha: float = 8, **options: Any) -> AdapterSpec:
    return AdapterSpec(rank, alpha, ATTENTION, **options)


@pytest.mark.parametrize("rows", ["as they are", "packed"])
@pytest.mark.parametrize("saved", [(), ("embed_tokens",)], ids=["factors", "embeddings too"])
@pytest.mark.parametrize("alphas", [(8,), (8, 2, 32), (8, 8, 8)], ids=["one", "scales", "three"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("natively", [True, False], ids=["native", "torch"])
def test_outputs_and_gradients_are_those_of_the_modules(
    natively: bool,
    alphas: tuple[int, ...],
    saved: tuple[str, ...],
    rows: str,
    checkpointing: Any,
    used: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = len(alphas)
    # both products are tried
    monkeypatch.setattr(kernel, "ONEDNN_FROM", 20 if count == 1 else 1000)
    if not natively:
        monkeypatch.setattr(kernel, "_runs_natively", lambda *_: False)
    model, routing = model_with(*(lora(4, alpha, saved=saved) for alpha in alphas))
    model.checkpoint_blocks(checkpointing)
    segments = None if rows == "as they are" else ((3, 4, 5), range(count if count > 1 else 3))
    out, found = gradients(model, routing, segments)
    assert used and all(used)
    monkeypatch.setattr(minigpt, "low_rank_block", lambda *_: None)
    expected, wanted = gradients(model, routing, segments)
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert found.keys() == wanted.keys() and len(found) >= 16
    for name, grad in wanted.items():
        assert_close(found[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each block of several adapters ran."""
    ran = list[str]()

    def spy(*given: Any) -> bool:
        natively = runs_natively(*given)
        ran.append("native" if natively else "torch")
        return natively

    runs_natively = kernel._runs_natively
    monkeypatch.setattr(kernel, "_runs_natively", spy)
    return ran


def of_sizes(rank: int, width: int, adapters: int = 3) -> tuple[MiniGPT, Any]:
    return model_with(
        *[lora(rank)] * adapters, config=MiniGPTConfig(20, 0, 1, width, 2, 2, 3 * width)
    )


@needs_native
@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize(
    "segments", [(1,), (3, 1, 7), (20, 13), (2, 2)], ids=["one token", "odd", "long", "even"]
)
def test_the_native_block_takes_any_rank_width_and_lengths(
    segments: tuple[int, ...],
    rank: int,
    width: int,
    blocks: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, routing = of_sizes(rank, width)
    ids = torch.arange(3 * sum(segments)).remainder(20).view(3, -1)  # a row per adapter

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        return gradients(model, routing, (segments, range(3)), ids)

    out, found = run()
    again, twice = run()
    assert set(blocks) == {"native"}
    assert torch.equal(out, again) and all(
        torch.equal(found[name], grad) for name, grad in twice.items()
    )
    monkeypatch.setattr(minigpt, "low_rank_block", lambda *_: None)
    expected, wanted = run()
    assert_close(out, expected, rtol=1e-4, atol=2e-5)
    for name, grad in wanted.items():
        assert_close(
            found[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()) + 1e-6, msg=name
        )


@needs_native
def test_in_the_native_block_what_is_not_finite_stays_with_its_adapter(blocks: list[str]) -> None:
    model, routing = of_sizes(4, 32)
    finite, wanted = gradients(model, routing, ((2, 2), range(3)), IDS.view(3, -1)[:, :4])
    with torch.no_grad():
        model.get_parameter("model.decoder.layers.0.self_attn.v_proj.lora_A")[1, 0, 0] = torch.nan
    out, found = gradients(model, routing, ((2, 2), range(3)), IDS.view(3, -1)[:, :4])
    assert set(blocks) == {"native"} and out[1].isnan().all()
    for n in (0, 2):
        assert torch.equal(out[n], finite[n]) and all(
            torch.equal(found[key][n], wanted[key][n]) for key in wanted
        )


@pytest.mark.parametrize(("width", "heads"), [(48, 3), (64, 8)], ids=["width", "heads"])
def test_sizes_that_fill_no_vector_are_computed_by_torch(
    width: int, heads: int, blocks: list[str]
) -> None:
    model, routing = model_with(*[lora()] * 2, config=MiniGPTConfig(20, 0, 1, width, 2, heads))
    gradients(model, routing, ((2, 2), range(2)), IDS[:2, :4])
    assert set(blocks) == {"torch"}


def changed(change: Callable[[MiniGPT], object]) -> MiniGPT:
    model, _ = model_with(lora())
    change(model)
    return model


@pytest.mark.parametrize("make", [
    lambda: model_with(lora(dora=True))[0],
    lambda: model_with(AdapterSpec(4, 8, (*ATTENTION, "fc1")))[0],
    lambda: model_with(AdapterSpec(4, 8, ("q_proj", "v_proj")))[0],
    lambda: model_with(lora(ranks={"v_proj": 8}, alphas={"v_proj": 16}))[0],
    lambda: changed(lambda model: model.blocks.requires_grad_(True)),
    lambda: changed(lambda model: model.bfloat16()),
], ids=["DoRA", "feed-forward too", "some of attention", "ranks", "the base trains", "bf16"])  # fmt: skip
def test_anything_else_goes_through_the_modules(
    make: Callable[[], MiniGPT], used: list[bool]
) -> None:
    gradients(make(), None, None)
    assert not any(used)


def test_a_disabled_adapter_and_a_forward_without_gradient_go_through_the_modules(
    used: list[bool],
) -> None:
    model, _ = model_with(lora())
    with disable_adapter(model):
        model.hidden_states(IDS)
    with torch.no_grad():
        model.hidden_states(IDS)
    assert not any(used)


def test_onednn_is_on_again_after_a_step() -> None:
    model, _ = model_with(lora())
    gradients(model, None, None)
    assert torch._C._get_mkldnn_enabled()
