"""Combined updates, against their dense sum and against PEFT's combinations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pipeline.adapters.low_rank import LowRank, load_update
from pipeline.weights.combine import Combined, CombineOptions, Method, combine
from tests.helpers.errors import user_error
from tests.helpers.real import stock, toy
from tests.helpers.side_by_side import randomized

METHODS: tuple[Method, ...] = get_args(Method)
SIZES = st.integers(1, 9)
Several = tuple[list[LowRank], list[float]]


@st.composite
def several(draw: st.DrawFn, alike: bool = False) -> Several:
    """Updates of one matrix, (O, I) each and of one rank if they are `alike`, and their weights."""
    outputs, inputs, count, rank = (
        draw(SIZES),
        draw(SIZES),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ranks = [rank if alike else draw(st.integers(1, 4)) for _ in range(count)]
    scales = [draw(st.sampled_from((0.25, 1.0, 2.5))) for _ in range(count)]
    weights = [draw(st.sampled_from((-1.5, -0.3, 0.7, 1.0))) for _ in range(count)]
    pairs = [
        (torch.randn(r, inputs, generator=random), torch.randn(outputs, r, generator=random))
        for r in ranks
    ]
    return [LowRank(a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True)], weights


def total(updates: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·sᵢ·BᵢAᵢ, every product written out."""
    terms = [
        w * one.scale * (one.b.double() @ one.a.double())
        for one, w in zip(updates, weights, strict=True)
    ]
    return torch.stack(terms).sum(dim=0)


def of_one_matrix(found: Several, how: CombineOptions) -> tuple[Tensor, float]:
    """The combined update (O, I) and its reported error."""
    updates, weights = found
    made = combine([{"m": one} for one in updates], weights, how)
    one = made.updates["m"]
    return one.scale * (one.b.double() @ one.a.double()), made.error


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@given(several())
def test_cat_is_the_weighted_sum(found: Several) -> None:
    it, error = of_one_matrix(found, CombineOptions("cat"))
    torch.testing.assert_close(it, total(*found), atol=1e-5, rtol=1e-5)
    assert error < 1e-6


@given(several(), st.integers(1, 10))
def test_svd_is_the_best_approximation_of_its_rank(found: Several, rank: int) -> None:
    wanted = total(*found)
    left, values, right = torch.linalg.svd(wanted, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    it, error = of_one_matrix(found, CombineOptions("svd", rank))
    torch.testing.assert_close(it, best, atol=1e-4, rtol=1e-4)
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-6)


@given(
    several(alike=True),
    st.sampled_from(METHODS),
    st.integers(1, 9),
    st.sampled_from((0.3, 0.8, 1.0)),
)
def test_the_error_is_the_distance_from_the_sum_over_its_norm(
    found: Several, method: Method, rank: int, density: float
) -> None:
    it, error = of_one_matrix(found, CombineOptions(method, rank, density))
    assert error == pytest.approx(relative(it, total(*found)), abs=1e-5)


def test_the_error_is_that_of_all_modules_together() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (
        {
            name: LowRank(
                torch.randn(3, 6, generator=random), torch.randn(5, 3, generator=random), 2.0
            )
            for name in names
        }
        for names in ("xy", "yz")
    )
    made = combine([one, other], [0.5, -2.0], CombineOptions("svd", rank=2))
    sums = {"x": total([one["x"]], [0.5]), "y": total([one["y"], other["y"]], [0.5, -2.0])}
    sums["z"] = total([other["z"]], [-2.0])
    assert list(made.updates) == list(sums)
    apart = torch.cat(
        [(made.updates[name].delta() - wanted).flatten() for name, wanted in sums.items()]
    )
    assert made.error == pytest.approx(
        float(apart.norm() / torch.stack([*sums.values()]).norm()), abs=1e-6
    )


ONE, OTHER = torch.tensor([[4.0, -1.0], [2.0, 0.5]]), torch.tensor([[-3.0, -2.0], [1.0, 3.0]])


@pytest.mark.parametrize("method", get_args(Method))
def test_weights_whose_sum_no_fp32_holds_are_refused(method: Method) -> None:
    adapters = [{"w": LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0)} for _ in range(2)]
    said = user_error(combine, adapters, [1e39, 1.0], CombineOptions(method))
    assert said == (
        "--weights must keep the sum of each module within fp32, got [1e+39, 1.0]: that of w "
        "overflows. Use smaller weights."
    )


def matrices(*dense: Tensor) -> list[LowRank]:
    return [LowRank(matrix, torch.eye(2), 1.0) for matrix in dense]


@pytest.mark.parametrize(
    ("density", "weights", "by_hand"),
    [
        # kept: 4, 2 of the one, −3, 3 of the other; signs of their sums: + everywhere
        (0.5, (1.0, 1.0), [[4.0, 0.0], [2.0, 3.0]]),
        (0.5, (0.5, 2.0), [[2.0, 0.0], [1.0, 6.0]]),
        # all kept; the mean where both have the elected sign: (−1 − 2)/2, (2 + 1)/2, (0.5 + 3)/2
        (1.0, (1.0, 1.0), [[4.0, -1.5], [1.5, 1.75]]),
    ],
)
def test_ties_is_what_it_is_by_hand(
    density: float, weights: tuple[float, float], by_hand: list[list[float]]
) -> None:
    it, _ = of_one_matrix((matrices(ONE, OTHER), list(weights)), CombineOptions("ties", 2, density))
    torch.testing.assert_close(it.float(), torch.tensor(by_hand))


@pytest.fixture
def pair() -> Several:
    random = torch.Generator().manual_seed(4)
    pairs = [
        (torch.randn(2, 5, generator=random), torch.randn(6, 2, generator=random)) for _ in range(2)
    ]
    return [LowRank(a, b, 1.5) for a, b in pairs], [0.8, -0.4]


def test_dare_keeps_a_number_raised_or_drops_it(pair: Several) -> None:
    it, _ = of_one_matrix((pair[0][:1], [1.0]), CombineOptions("dare", 9, density=0.4))
    whole = total(pair[0][:1], [1.0])
    kept = torch.isclose(it, whole / 0.4, atol=1e-5)
    assert bool((kept | torch.isclose(it, torch.zeros(()).double(), atol=1e-5)).all())
    assert 0 < int(kept.sum()) < kept.numel()


def test_dare_is_the_sum_in_expectation(pair: Several) -> None:
    """Each number has variance Σ(wδ)²(1 − p)/p: the mean of n draws is within 5 of its standard
    deviations.
    """
    draws = torch.stack(
        [of_one_matrix(pair, CombineOptions("dare", 9, 0.5, seed))[0] for seed in range(400)]
    )
    updates, weights = pair
    variance = torch.stack(
        [total([one], [weight]) ** 2 for one, weight in zip(updates, weights, strict=True)]
    ).sum(0)
    assert ((draws.mean(0) - total(*pair)).abs() <= 5 * (variance / len(draws)).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, atol=0, rtol=0.5)


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_a_seed_decides_what_is_dropped(pair: Several, method: Method) -> None:
    first, again, other = (
        of_one_matrix(pair, CombineOptions(method, 9, 0.5, seed))[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_at_density_1_nothing_is_dropped(pair: Several) -> None:
    torch.testing.assert_close(
        of_one_matrix(pair, CombineOptions("dare", 9, 1.0))[0], total(*pair), atol=1e-5, rtol=1e-5
    )
    ties, dare_ties = (
        of_one_matrix(pair, CombineOptions(method, 9, 1.0))[0] for method in ("ties", "dare-ties")
    )
    torch.testing.assert_close(dare_ties, ties)
    alone = pair[0][:1], pair[1][:1]
    one_sign, plain = (
        of_one_matrix(alone, CombineOptions(method, 9, 0.5))[0] for method in ("dare-ties", "dare")
    )
    torch.testing.assert_close(one_sign, plain)


def plain_knots(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """KnOTS as it is written down: an SVD of the dense updates side by side, TIES on ΣVᵢ, and
    back.
    """
    left, values, right = np.linalg.svd(np.concatenate([delta.numpy() for delta in deltas], axis=1))
    count = int((values > 1e-9 * values[0]).sum())
    coordinates = np.split(values[:count, None] * right[:count], len(deltas), axis=1)
    trimmed = []
    for one in coordinates:
        size = int(density * one.size)
        least = np.sort(abs(one), axis=None)[::-1][size - 1] if size else np.inf
        trimmed.append(np.where(abs(one) >= max(least, 1e-9), one, 0))
    merged = np.zeros_like(coordinates[0])
    for place in np.ndindex(merged.shape):
        drawn = [(weight, one[place]) for weight, one in zip(weights, trimmed, strict=True)]
        elected = 1 if sum(value for _, value in drawn) >= 0 else -1
        agreeing = [weight * value for weight, value in drawn if np.sign(value) == elected]
        merged[place] = sum(agreeing) / max(1, len(agreeing))
    return torch.from_numpy(left[:, :count] @ merged)


@given(several(), st.sampled_from((0.3, 0.8, 1.0)))
def test_knots_is_ties_in_the_basis_of_a_joint_svd(found: Several, density: float) -> None:
    updates, weights = found
    deltas = [one.scale * (one.b.double() @ one.a.double()) for one in updates]
    # the share of values that is kept is one of the full basis, which includes directions of
    # nothing
    rank = min(
        len(deltas[0]),
        sum(one.rank for one in updates),
        sum(min(one.rank, one.a.shape[1]) for one in updates),
    )
    assume(np.linalg.matrix_rank(np.concatenate(deltas, axis=1)) == rank)
    it, _ = of_one_matrix(found, CombineOptions("knots", density=density))
    torch.testing.assert_close(it, plain_knots(deltas, weights, density), atol=1e-4, rtol=1e-4)


@given(several(), st.integers(0, 99))
def test_knots_does_not_depend_on_the_basis_of_the_outputs_as_ties_does(
    found: Several, seed: int
) -> None:
    updates, weights = found
    size = len(updates[0].b)
    drawn = torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    turn = torch.linalg.qr(drawn).Q
    turned = [LowRank(one.a.double(), turn @ one.b.double(), one.scale) for one in updates]
    plain, rotated = (
        of_one_matrix((each, weights), CombineOptions("knots", density=1.0))[0]
        for each in (updates, turned)
    )
    torch.testing.assert_close(rotated, turn @ plain, atol=1e-4, rtol=1e-4)


@given(several())
def test_knots_leaves_an_adapter_alone_or_beside_itself_unchanged(found: Several) -> None:
    updates, weights = found
    alone = [updates[0]], [weights[0]]
    it, error = of_one_matrix(alone, CombineOptions("knots", density=1.0))
    torch.testing.assert_close(it, total(*alone), atol=1e-5, rtol=1e-5)
    assert error < 1e-5
    twice = of_one_matrix(
        ([updates[0]] * 2, [weights[0]] * 2), CombineOptions("knots", density=1.0)
    )[0]
    torch.testing.assert_close(twice, total(*alone), atol=1e-5, rtol=1e-5)


@given(several(alike=True))
def test_knots_sums_adapters_that_write_to_different_outputs(found: Several) -> None:
    updates, weights = found
    size = len(updates[0].b)
    apart = []
    for number, one in enumerate(updates):
        b = torch.zeros(size * len(updates), one.rank)
        b[number * size : (number + 1) * size] = one.b
        apart.append(LowRank(one.a, b, one.scale))
    it, _ = of_one_matrix((apart, weights), CombineOptions("knots", density=1.0))
    torch.testing.assert_close(it, total(apart, weights), atol=1e-4, rtol=1e-4)


# PEFT. Its ties and dare work on A and B apart; those on whole updates, which are ours, it calls
# ties_svd and dare_linear_svd. The combination keeps use_rslora, and is then √rank times too large:
# it is not compared with that.

FOR_PEFT: dict[str, tuple[CombineOptions, dict[str, Any]]] = {
    "cat": (CombineOptions("cat"), {"combination_type": "cat"}),
    "linear": (CombineOptions("linear"), {"combination_type": "linear"}),
    "svd": (CombineOptions("svd", 3), {"combination_type": "svd", "svd_rank": 3}),
    "ties": (
        CombineOptions("ties", 3, 0.4),
        {"combination_type": "ties_svd", "svd_rank": 3, "density": 0.4},
    ),
    "dare": (
        CombineOptions("dare", 5, 1.0),
        {"combination_type": "dare_linear_svd", "svd_rank": 5, "density": 1.0},
    ),
    "dare-ties": (
        CombineOptions("dare-ties", 5, 1.0),
        {"combination_type": "dare_ties_svd", "svd_rank": 5, "density": 1.0},
    ),
}
TARGETS = {
    "llama": (["q_proj", "down_proj", "embed_tokens"], ["q_proj", "k_proj", "embed_tokens"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["c_attn", "c_fc"]),
}


def two_in_peft(family: str, rank: int, **options: Any) -> Any:
    """A toy with two adapters, `one` and `other`, the other of `rank`."""
    both = [{"r": 4, "lora_alpha": 6}, {"r": rank, "lora_alpha": 3}]
    first, second = (
        LoraConfig(task_type="CAUSAL_LM", target_modules=names, **one, **options)
        for names, one in zip(TARGETS[family], both, strict=True)
    )
    model = get_peft_model(stock(toy(family)), first, "one")
    model.add_adapter("other", second)
    for name in ("one", "other"):
        model.set_adapter(name)
        randomized(model)
    return model


def saved(model: Any, folder: Path) -> list[dict[str, LowRank]]:
    model.save_pretrained(folder)
    return [dict(load_update(folder / name).low_rank) for name in ("one", "other")]


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    """PEFT's own update of each module, (O, I)."""
    found = {}
    for full, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and name in {
            **module.lora_A,
            **module.lora_embedding_A,
        }:
            delta = module.get_delta_weight(name).detach()
            turned = name in module.lora_embedding_A or module.fan_in_fan_out
            found[full] = delta.T if turned else delta
    return found


def assert_alike(ours: Combined, theirs: dict[str, Tensor]) -> None:
    assert ours.updates.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours.updates[name].delta(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5)], ids=str)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", FOR_PEFT)
def test_it_is_what_peft_makes_of_the_same_two(
    method: str, family: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    how, options = FOR_PEFT[method]
    model = two_in_peft(family, rank=4 if method == "linear" else 2)
    updates = saved(model, tmp_path)
    model.add_weighted_adapter(["one", "other"], list(weights), "both", **options)
    assert_alike(combine(updates, weights, how), deltas(model, "both"))


@pytest.mark.filterwarnings("ignore")
def test_adapters_with_rslora_are_summed_with_their_own_scale(tmp_path: Path) -> None:
    model = two_in_peft("llama", rank=2, use_rslora=True)
    one, other = deltas(model, "one"), deltas(model, "other")
    none = torch.zeros(())
    wanted = {
        name: 0.7 * one.get(name, none) + 0.3 * other.get(name, none) for name in (*one, *other)
    }
    assert_alike(combine(saved(model, tmp_path), [0.7, 0.3], CombineOptions("cat")), wanted)
