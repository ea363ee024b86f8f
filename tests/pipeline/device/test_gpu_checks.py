"""The checks of `lora doctor --gpu` on CUDA without numbers: every call runs, with the devices and
types there.
"""

from functools import partial

import pytest
import torch

from pipeline.models.kernels import accelerator
from pipeline.stages.gpu_checks import checks
from tests.helpers.small_checks import shrink
from tests.helpers.stand_in import STAND_IN

pytestmark = pytest.mark.skipif(
    STAND_IN.type != "cuda", reason="it needs torch's CUDA build: see test_on_cuda.py"
)


@pytest.mark.parametrize("name", [name for name in checks.CHECKS if name != "several ranks"])
def test_a_check_runs_to_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DEVICE", "cuda")
    # Triton would compile for the stub, each time in vain
    monkeypatch.setattr(accelerator, "liger", lambda _: None)
    # the driver's part of the profiler finds no driver
    profile = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
    monkeypatch.setattr(torch.profiler, "profile", profile)
    shrink(monkeypatch)
    seen = list(checks.CHECKS[name].run(torch.device("cuda", 0)))
    assert seen and not any(each.text.startswith("failed") for each in seen), seen


def test_several_ranks_need_two_cards() -> None:
    (seen,) = checks.ranks(torch.device("cuda", 0))
    assert seen.as_expected is None and "one card" in seen.text
