"""How A and B begin: BA = 0 where it is promised, PEFT's distributions, and PiSSA beside PEFT's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import LoRALinear, factors, principal
from pipeline.adapters.peft import load_adapter, save_adapter
from pipeline.errors import UserError
from pipeline.project.params.sections import Init
from tests.helpers.checkpoints import token_ids
from tests.helpers.real import ROWS, stock, toy
from tests.helpers.side_by_side import logits
from tests.pipeline.adapters.test_experts import Largest

INITS: tuple[Init, ...] = get_args(Init)
IDS = token_ids(ROWS, 3, 9)


def layer_of(init: Init, rank: int = 6, shape: tuple[int, int] = (40, 24)) -> LoRALinear:
    torch.manual_seed(0)
    outputs, inputs = shape
    return LoRALinear(nn.Linear(inputs, outputs), rank, 0.5, init=init)


@pytest.mark.parametrize("init", [init for init in INITS if init not in ("orthogonal", "pissa")])
def test_ba_is_exactly_zero_at_the_start_and_a_is_not(init: Init) -> None:
    layer, x = layer_of(init), torch.randn(5, 24)
    assert torch.equal(layer(x), layer.base(x))
    assert not layer.lora_B.any() and layer.lora_A.all()


def test_orthogonal_starts_with_a_and_b_of_full_rank_whose_product_is_zero() -> None:
    layer = layer_of("orthogonal")
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    # half of R each, on different rows
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3
    assert (B @ A).abs().max() < 1e-6 < 1e-3 < min(A.abs().max(), B.abs().max())


@pytest.mark.parametrize("init", [init for init in INITS if init != "pissa"])
def test_a_and_b_have_pefts_spread(init: Init) -> None:
    """Of PEFT's own A and B under its name; our `document` is its `gaussian`."""
    ours = layer_of(init, 8, (600, 500))
    theirs: Any = nn.Sequential(nn.Linear(500, 600))
    named: Any = {"kaiming": True, "document": "gaussian"}.get(init, init)
    peft = get_peft_model(
        theirs, LoraConfig(r=8, target_modules=["0"], init_lora_weights=named)
    ).base_model.model[0]
    factor = 0.01 * 8 if init == "document" else 1
    for mine, other in (
        (ours.lora_A, peft.lora_A.default.weight),
        (ours.lora_B, peft.lora_B.default.weight),
    ):
        expected = other.detach() * factor
        torch.testing.assert_close(mine.detach().std(), expected.std(), rtol=0.05, atol=0)
        if init == "kaiming":  # uniform: it has an end
            torch.testing.assert_close(
                mine.detach().abs().max(), expected.abs().max(), rtol=0.01, atol=0
            )


def test_an_odd_rank_has_no_two_orthogonal_halves() -> None:
    with pytest.raises(UserError, match="orthogonal needs an even rank, got 3"):
        layer_of("orthogonal", 3)


# PiSSA


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (300, 260)], ids=str)
def test_pissa_takes_the_nearest_part_of_that_rank(shape: tuple[int, int]) -> None:
    """Eckart and Young: what is left of W has the singular values that were not taken."""
    layer = layer_of("pissa", shape=shape)
    weight = layer.base.weight.detach()  # type: ignore[operator]
    left = weight - layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(
        torch.linalg.svdvals(left)[: -layer.lora_A.shape[0]], values[6:], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(40, 24), (300, 260)], ids=["folded", "not folded"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_pissa_leaves_base_plus_adapter_equal_to_the_base(
    shape: tuple[int, int], dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(shape[1], shape[0]), torch.randn(5, shape[1])
    before = base.weight.detach().clone()
    layer = LoRALinear(base, 6, 0.5, dtype, "pissa")
    torch.testing.assert_close(layer(x), base(x), atol=2e-6, rtol=1e-5)
    assert torch.equal(base.weight, before)
    assert layer.lora_A.norm() > 0.1 < layer.lora_B.norm()


def test_pissa_of_a_weight_with_fewer_singular_values_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"takes 9 singular values of a weight that has 8. Set finetune_lora.rank to 8",
    ):
        principal(torch.randn(8, 20), 9, 1.0)


@pytest.mark.parametrize("shape", [(300, 8), (8, 300)], ids=str)
def test_pissa_makes_no_matrix_that_is_larger_than_the_weight(shape: tuple[int, int]) -> None:
    with Largest() as made:
        A, B = principal(torch.randn(shape), 2, 1.0)
    assert made.elements == 8 * 300 and (A.shape, B.shape) == ((2, shape[1]), (shape[0], 2))


def test_pissa_takes_as_many_singular_values_as_there_are() -> None:
    weight = torch.randn(8, 20, dtype=torch.float64)
    A, B = principal(weight, 8, 2.0)
    torch.testing.assert_close(2 * B @ A, weight)
    # the square root of each singular value on either side
    torch.testing.assert_close(A @ A.T, B.T @ B)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_trains_as_pefts_on_its_residual_and_is_saved_for_the_base_as_it_was(
    tmp_path: Path, rslora: bool
) -> None:
    """PEFT subtracts BA from W, ours from the update: the same function, the same gradients, two
    files.
    """
    base = toy("llama", std=0.1)
    spec = AdapterSpec(4, 6.0, ("q_proj", "down_proj"), ranks={r".*1.*q_proj": 3}, rslora=rslora)
    options = {"rank_pattern": dict(spec.ranks), "use_rslora": rslora, "init_lora_weights": "pissa"}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(spec.targets), **options)
    theirs, ours = get_peft_model(stock(base), config), toy("llama", std=0.1)
    attach(ours, spec, init="pissa")
    steps: list[tuple[Any, Callable[[], Tensor]]] = [
        (theirs, lambda: theirs(input_ids=IDS).logits),
        (ours, lambda: ours(IDS)),
    ]
    for model, forward in steps:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                forward()[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
            )
            torch.autograd.backward(loss)
            optimizer.step()
    found, wanted = logits(ours, IDS), logits(theirs, IDS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - logits(base, IDS)).abs().max() > 0.1, "nothing was learned"
    save_adapter(tmp_path, ours, spec, "base")
    again = toy("llama", std=0.1)
    read = load_adapter(again, Path("base"), tmp_path)
    assert isinstance(read, AdapterSpec) and read.rank == 8
    torch.testing.assert_close(logits(again, IDS), found, atol=1e-5, rtol=1e-5)
    reopened = logits(PeftModel.from_pretrained(stock(base), tmp_path), IDS)
    torch.testing.assert_close(reopened, found, atol=1e-5, rtol=1e-5)


def test_the_factors_of_pissa_are_of_what_changed() -> None:
    layer = layer_of("pissa")
    with torch.no_grad():
        layer.lora_B.add_(1)
    left, right = factors(layer)
    torch.testing.assert_close(
        left @ right, torch.ones(40, 6) @ layer.lora_A.detach(), atol=1e-5, rtol=1e-4
    )
