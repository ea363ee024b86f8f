"""The checks of `lora doctor --gpu` on CUDA without numbers: every call runs, with the devices and
types there.
"""

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
    # what others train they train in a process without a stub
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    shrink(monkeypatch)
    seen = list(checks.CHECKS[name].run(torch.device("cuda", 0)))
    assert seen and not any(each.text.startswith("failed") for each in seen), seen


def test_several_ranks_need_two_cards() -> None:
    (seen,) = checks.ranks(torch.device("cuda", 0))
    assert seen.as_expected is None and "one card" in seen.text
