"""Preference losses against TRL's own trainers on the same batches: losses, rewards and gradients; KTO's estimate of
the divergence, ORPO's likelihood of the prompt."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.attach import tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import IGNORED, Window
from pipeline.training.losses import log_probs
from tests.helpers.real import ROWS, stock, toy, with_lora
from tests.helpers.trl import CASES, compared


def sequences(count: int, seed: int = 0) -> list[Window]:
    """Prompts with answers; two and two have the same prompt."""
    found = []
    for pair in range(count // 2):
        prompt = torch.randint(3, ROWS, (5 + pair,), generator=torch.Generator().manual_seed(seed + pair)).tolist()
        for number, answer in enumerate((3 + pair % 3, 6 - pair % 2)):
            own = torch.Generator().manual_seed(1000 + seed + 2 * pair + number)
            ids = [*prompt, *torch.randint(3, ROWS, (answer,), generator=own).tolist()]
            labels = [IGNORED] * (len(prompt) - 1) + ids[len(prompt) :]
            found.append(Window(0, tuple(ids[:-1]), tuple(labels)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_rewards_and_gradients_are_trls(tmp_path: Path, case: str) -> None:
    ours, spec = toy("llama"), AdapterSpec(3, 6.0, ("q_proj", "v_proj"))
    plain = stock(ours)
    with_lora(ours)
    found = compared(ours, plain, spec, sequences(6), case, tmp_path)
    assert_close(*found.losses, atol=1e-5, rtol=1e-5)
    for mine, wanted in found.rewards:
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert found.gradients.keys() == tensors(ours, spec).keys()
    for gradient, theirs in found.gradients.values():
        assert gradient.abs().max() > 0
        assert_close(gradient, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trains_head", [False, True])
def test_log_probs_and_their_gradients_are_autograds_however_they_are_chunked(trains_head: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    head.requires_grad_(trains_head)
    labels, upstream = torch.randint(50, (11,)), torch.randn(11)
    plain = torch.randn(11, 8, requires_grad=True)
    values = head(plain).log_softmax(-1)[range(11), labels]
    parameters: list[Tensor] = [plain, *([head.weight] if trains_head else [])]
    wanted = torch.autograd.grad((values * upstream).sum(), parameters)
    for size in (1, 4, 11, 128):
        found = log_probs(head, plain, labels, size, [*head.parameters()] if trains_head else [])
        assert_close(found, values)
        assert_close(torch.autograd.grad((found * upstream).sum(), parameters), wanted)
