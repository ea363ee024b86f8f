"""The optimizers' update rules, against torch's own optimizers and the 8-bit code of
bitsandbytes.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.optimizer import Adam, AdamW8bit, DynamicCode, FlatOptimizer, Span
from pipeline.training.task import build_optimizer, rule_of

CPU = torch.device("cpu")
RATE, DECAY = 1e-2, 0.1
OTHER = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3}


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 9)).to(dtype)


def gradients_at(step: int, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]


def stepped(flat: FlatOptimizer, model: nn.Module, steps: range, rate: float = RATE) -> None:
    for step in steps:
        for p, gradient in zip(model.parameters(), gradients_at(step, model), strict=True):
            assert p.grad is not None
            p.grad.copy_(gradient)
        flat.collect_gradients()
        flat.step(rate / (step + 1))


def masters(flat: FlatOptimizer, model: nn.Module) -> list[Tensor]:
    by_id = {id(p): weights for p, weights in flat.trained()}
    return [by_id[id(p)] for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adamw", lambda ps, decay: torch.optim.AdamW(ps, lr=RATE, weight_decay=decay, fused=True)),
        ("sgd", lambda ps, decay: torch.optim.SGD(ps, lr=RATE, weight_decay=decay)),
        (
            "adamw, other numbers",
            lambda ps, decay: torch.optim.AdamW(
                ps, lr=RATE, weight_decay=decay, betas=(0.8, 0.95), eps=1e-3, fused=True
            ),
        ),
    ],
)
def test_twenty_steps_are_those_of_torch(
    name: str, theirs: Callable[..., torch.optim.Optimizer], decay: float, dtype: torch.dtype
) -> None:
    """On fp32 weights to the bit; of 16-bit parameters the fp32 masters are."""
    model, other = net(dtype), net(dtype).float()
    optimizer: Any = name.partition(",")[0]
    numbers: Any = OTHER if name.endswith("numbers") else {}
    flat = build_optimizer(model, Training(optimizer=optimizer, weight_decay=decay, **numbers))
    torchs = theirs(other.parameters(), decay)
    stepped(flat, model, range(20))
    for step in range(20):
        for p, gradient in zip(other.parameters(), gradients_at(step, net(dtype)), strict=True):
            p.grad = gradient.float()
        torchs.param_groups[0]["lr"] = RATE / (step + 1)
        torchs.step()
    for ours, p in zip(masters(flat, model), other.parameters(), strict=True):
        assert torch.equal(ours, p.detach())


def test_each_learner_decays_by_its_own_weight_decay() -> None:
    model = nn.Module()
    model.register_parameter("both", nn.Parameter(torch.ones(2, 5)))
    flat = FlatOptimizer(model, ratios=[1.0, 1.0], decays=[0.0, 0.5])
    model.get_parameter("both").grad = torch.zeros(2, 5)
    flat.collect_gradients()
    flat.step(0.1, 0.1)
    torch.testing.assert_close(
        model.get_parameter("both").detach(), torch.tensor([[1.0], [0.95]]).expand(2, 5)
    )


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    code = DynamicCode(signed, CPU)
    assert torch.equal(code.tables[0], functional.create_dynamic_map(signed))
    torch.manual_seed(0)
    values = torch.randn(2000, 256) * torch.logspace(-6, 0, 2000)[:, None]
    values = values if signed else values.square()
    codes, largest = code.encode(values.clone())
    theirs, state = functional.quantize_blockwise(values, code=code.tables[0], blocksize=256)
    assert torch.equal(largest, state.absmax)
    near = values / largest[:, None]
    # below it only we never round to 0
    counted = slice(None) if signed else near > code.tables[0][1]
    error, their_error = (
        (code.tables[0][c.long()] - near).abs()[counted] for c in (codes, theirs.view(codes.shape))
    )
    assert (error <= their_error + 1e-9).all(), "theirs, which is approximate, is never nearer"
    assert (codes == theirs.view(codes.shape))[counted].float().mean() > 0.95


@settings(max_examples=100)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=256), st.booleans())
def test_a_number_is_encoded_as_the_nearest_value(numbers: list[float], signed: bool) -> None:
    code = DynamicCode(signed, CPU)
    values = torch.zeros(1, 256)
    values[0, : len(numbers)] = torch.tensor(numbers) if signed else torch.tensor(numbers).abs()
    codes, largest = code.encode(values.clone())
    assert largest.item() == values.abs().max().item()
    scaled = (values / (largest if largest > 0 else 1))[0].double()
    table = code.tables[0].double()
    nearest = (scaled[:, None] - table).abs().min(1).values
    error = (scaled - table[codes[0].long()]).abs()
    # between two at the same distance, fp32 decides
    assert ((error <= nearest + 1e-7) | ((scaled > 0) & (scaled < table[1]) & (not signed))).all()
    assert not signed or codes[0, scaled == 0].eq(table.eq(0).nonzero().item()).all()


def test_a_mean_square_above_zero_is_never_encoded_as_zero() -> None:
    """Its root divides the mean: 0 would make that step rate / 1e-8 times the mean."""
    values = torch.tensor([[1.0, 1e-12, 0.0, *[0.0] * 253]])
    codes, _ = DynamicCode(False, CPU).encode(values)
    assert codes[0, :3].tolist() == [255, 1, 0]


def test_eight_bits_follow_adamw_and_take_a_quarter_of_its_state() -> None:
    """The moments are those of AdamW up to the distance between neighbours of the code."""
    moved = {}
    for name in ("adamw", "adamw-8bit"):
        model = net()
        before = [p.detach().clone() for p in model.parameters()]
        flat = build_optimizer(model, Training(optimizer=name, weight_decay=DECAY))
        stepped(flat, model, range(20))
        moved[name] = torch.cat(
            [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
        )
        state = [t for key, t in flat.state().items() if key.startswith("exp_avg")]
        size = sum(t.numel() * t.element_size() for t in state)
        P = flat.weights.numel()
        blocks = -(-P // 256)
        assert size == (8 * P if name == "adamw" else 2 * blocks * (256 + 4))
    difference = (moved["adamw"] - moved["adamw-8bit"]).norm() / moved["adamw"].norm()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("adam", [Adam(), Adam(*OTHER.values())], ids=["usual", "other numbers"])
@pytest.mark.parametrize("sizes", [[1], [256], [255, 257], [3, 600, 1, 512]])
def test_eight_bits_are_those_of_each_block_alone(
    sizes: list[int], adam: Adam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Adam's formula in fp64 on each block of each span, with the nearest code by
    search.
    """
    monkeypatch.setattr("pipeline.training.optimizer.STATE_CHUNK", 512)
    rule, P = AdamW8bit(), sum(sizes)
    torch.manual_seed(0)
    weights = torch.randn(P)
    bounds = [(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]
    spans = [Span(*bound, RATE, DECAY, adam) for bound in bounds]
    expected, state = weights.double(), rule.zeros(weights, spans)
    blocks = [(at, min(at + 256, stop)) for start, stop in bounds for at in range(start, stop, 256)]
    tables = [DynamicCode(signed, CPU).tables[0].double() for signed in (True, False)]
    moments = [torch.zeros(P, dtype=torch.float64) for _ in range(2)]
    for step in range(1, 4):
        gradient = torch.randn(P)
        rule.update(weights, gradient.clone(), state, spans)
        mean, square = moments
        beta1, beta2, epsilon = adam
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient.double(), gradient.double(), value=1 - beta2)
        expected *= 1 - RATE * DECAY
        root = (square / (1 - beta2**step)).sqrt() + epsilon
        expected -= RATE * (mean / (1 - beta1**step)) / root
        for start, stop in blocks:
            for moment, table in zip(moments, tables, strict=True):
                largest = moment[start:stop].abs().max()
                nearest = ((moment[start:stop] / largest)[:, None] - table).abs().argmin(1)
                moment[start:stop] = table[nearest] * largest
        torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=2e-4)
    assert int(state["step"]) == 3


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit", "sgd", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_goes_on_to_the_same_bits(name: Any, dtype: torch.dtype) -> None:
    settings = Training(optimizer=name, weight_decay=DECAY)
    unbroken, stopped, again = (net(dtype) for _ in range(3))
    flat, first, second = (build_optimizer(model, settings) for model in (unbroken, stopped, again))
    stepped(flat, unbroken, range(5))
    stepped(first, stopped, range(2))
    second.restore(copy.deepcopy(first.state()))
    assert second.steps == 2
    stepped(second, again, range(2, 5))
    assert (
        flat.state().keys()
        == second.state().keys()
        == {"weights", *rule_of(name).zeros(torch.zeros(1, 9), [Span(0, 9)])}
    )
    assert all(torch.equal(second.state()[key], tensor) for key, tensor in flat.state().items())
    assert all(
        torch.equal(p, q) for p, q in zip(unbroken.parameters(), again.parameters(), strict=True)
    )


def test_paged_is_the_same_on_a_cpu() -> None:
    states = []
    for name in ("adamw-8bit", "paged-adamw-8bit"):
        model = net()
        flat = build_optimizer(model, Training(optimizer=name))
        stepped(flat, model, range(3))
        states.append(flat.state())
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "sgd"])
def test_many_learners_are_each_one_alone(name: Any) -> None:
    """With rates, decays and betas of their own, LoRA+, and one that is stopped halfway."""
    betas = (0.9, 0.9, 0.9) if name == "sgd" else (0.9, 0.8, 0.5)
    starts = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    own = [
        FinetuneLora(
            optimizer=name,
            learning_rate=rate,
            weight_decay=decay,
            loraplus_ratio=ratio,
            adam_beta1=beta,
        )
        for (rate, decay, ratio), beta in zip(
            ((1e-2, 0.0, 3.0), (3e-2, 0.1, 4.0), (1e-2, 0.2, 2.0)), betas, strict=True
        )
    ]

    def learned(rows: list[int]) -> Tensor:
        model = nn.Module()
        model.register_parameter("lora_A", nn.Parameter(starts[rows].clone().squeeze(0)))
        model.lin = nn.Module()
        model.lin.register_parameter("lora_B", nn.Parameter(-starts[rows, :70].clone().squeeze(0)))
        flat = build_optimizer(model, *(own[row] for row in rows))
        for step in range(4):
            noise = torch.randn(3, 370, generator=torch.Generator().manual_seed(step))
            for p, gradient in zip(
                model.parameters(), (noise[rows, :300], noise[rows, 300:]), strict=True
            ):
                gradient = gradient.view(p.shape)
                p.grad = gradient.clone() if p.grad is None else p.grad.copy_(gradient)
            flat.collect_gradients()
            flat.step(*(None if row == 1 and step >= 2 else own[row].learning_rate for row in rows))
        return flat.weights

    together = learned([0, 1, 2])
    for row in range(3):
        assert torch.equal(together[row], learned([row])[0])
