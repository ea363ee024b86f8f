"""torch's CUDA build on a machine without a GPU: the choices that the program makes on a GPU are
taken, not patched.

A stub (cuda_stub/) answers what torch asks of CUDA's driver and runtime, and tensors on `cuda` lie
in the host's memory or are fake (cuda_device.py). It shows which kernel, precision and device each
path takes at each compute capability; shapes and types through every operator, those of
bitsandbytes too; what torch checks before it launches; every read of the device, and every copy
that the host waits for. It cannot show numbers, time, memory or streams, nor any Triton kernel:
those of Liger are in interpreted_liger.py.

The environment is this one where its torch is a CUDA build, else the one that `make
cuda-environment` made.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.files.digest_cache import cache_home

SOURCES = Path(__file__).with_name("cuda_stub")
ROOT = SOURCES.parents[2]
PLACE = "LORA_CUDA_ENVIRONMENT"  # environment variable: another folder


def run_with_cuda(
    *arguments: str, build: Path, capability: str = "9.0", free: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python` with these arguments where torch finds a GPU. `build`: a folder for the stub.
    `free`: a file with the GPU's free bytes, which may change meanwhile. Skips the test where there
    is no CUDA build."""
    python = _python()
    headers = subprocess.run(
        [python, "-c", "import triton; print(triton.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for library, source, options in (
        ("libcuda.so.1", "driver.c", ["-Wl,-soname,libcuda.so.1"]),
        ("runtime.so", "runtime.c", [f"-I{headers}/backends/nvidia/include"]),
    ):
        files = ["-o", f"{build / library}", f"{SOURCES / source}"]
        subprocess.run(["cc", "-shared", "-fPIC", *options, *files], check=True)
    settings = {
        "LD_LIBRARY_PATH": f"{build}",
        "LD_PRELOAD": f"{build / 'runtime.so'}",
        "PYTHONPATH": f"{ROOT}",
        "LORA_STAND_IN": "cuda",
        "LORA_STUB_CAPABILITY": capability,
        "LORA_TEST_SAMPLE": "",  # a test that was drawn runs all that it names
        **({} if free is None else {"LORA_STUB_FREE": f"{free}"}),
    }
    return subprocess.run(
        [python, *arguments], env=os.environ | settings, capture_output=True, text=True, cwd=ROOT
    )


@cache
def _python() -> Path:
    if torch.version.cuda:
        return Path(sys.executable)
    place = Path(os.environ.get(PLACE) or cache_home() / "lora-workbench" / "cuda-environment")
    python = place / "bin" / "python"
    if not python.exists():
        pytest.skip(
            f"torch {torch.__version__} is no CUDA build; `make cuda-environment` makes one in "
            f"{place} (5 GB)"
        )
    return python
