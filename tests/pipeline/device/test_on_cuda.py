"""The tests of this folder again, on a CUDA device without numbers: see `cuda_environment`."""

import re
from pathlib import Path

import pytest

from tests.helpers.cuda_environment import run_with_cuda
from tests.helpers.stand_in import STAND_IN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STAND_IN.type == "cuda", reason="this is the run on cuda"),
]
# What a capability decides: which attention, which product of experts, which precision.
DECIDED = "once_and_copies or on_the_host or fp16 or retention_is or no_more or host_checks"


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.9", "9.0", "12.0"])
def test_what_runs_without_numbers_runs_on_cuda(capability: str, tmp_path: Path) -> None:
    selected = [] if capability == "9.0" else ["-k", DECIDED]
    done = run_with_cuda(
        *(
            "-m",
            "pytest",
            f"{Path(__file__).parent}",
            "-q",
            "-m",
            "not rest",
            "-p",
            "no:cacheprovider",
            *selected,
        ),
        build=tmp_path,
        capability=capability,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20
