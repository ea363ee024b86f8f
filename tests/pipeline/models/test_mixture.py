"""Mixtures: which products a device computes, transformers' numbers, and our kernels in Triton's
interpreter.

The interpreter shows what the kernels compute, in fp32 and fp16 (it multiplies bf16 as whole
numbers), not that they run or how fast. Compiling shows that each generation of GPUs has code for
them.
"""

import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from pipeline.models.experts import grouped_product, mixture
from pipeline.models.experts.grouped_product import has_kernel_of_torch, runs_grouped_product
from pipeline.project.probes import held
from tests.helpers.families import MIXTURES
from tests.helpers.projects import ROOT
from tests.helpers.real import ROWS, stock, toy

IDS = torch.randint(0, ROWS, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_on_a_cpu_experts_are_transformers_own_to_the_last_bit(
    name: str, dtype: torch.dtype
) -> None:
    model = toy(name, dtype, std=0.1)
    ours = model(IDS)
    model._model[0].set_experts_implementation("grouped_mm")
    assert torch.equal(ours, model(IDS))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MIXTURES)
def test_our_experts_are_transformers_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU without torch's kernel computes them, here with torch's products."""
    model, seen = toy(name, std=0.1), []
    expected = stock(model)(input_ids=IDS).logits
    mixed = mixture.mixed

    def watched(*args: Any) -> Tensor:
        seen.append(args[0])
        return mixed(*args)

    monkeypatch.setattr(mixture, "mixed", watched)
    for module, function, answer in (
        (mixture, "uses_cpu_kernels", False),
        (mixture, "has_kernel_of_torch", False),
        (mixture, "runs_grouped_product", True),
        (grouped_product, "has_kernel_of_torch", True),
    ):
        monkeypatch.setattr(module, function, lambda _, answer=answer: answer)
    assert_close(model(IDS), expected, atol=1e-4, rtol=1e-4)
    assert seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_is_read_for_experts_in_any_dtype(name: str, dtype: torch.dtype) -> None:
    """`meta` has no numbers, so that whoever reads one ends here, forward or backward."""
    model = toy(name, dtype).to("meta")
    model(IDS.to("meta")).float().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


class Idle:
    """A kernel that computes nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args: args[3].zero_()


WRONG = {"product": Idle(), "outer_product": Idle()}


def rows(dtype: torch.dtype, **device: Any) -> Any:
    facts = {"is_cuda": False, "is_meta": False, "device": torch.device("cuda")} | device
    return SimpleNamespace(dtype=dtype, **facts)


@pytest.mark.parametrize(
    ("capability", "of_torch", "ours"),
    [
        ((7, 5), False, False),
        ((8, 0), False, True),
        ((8, 9), False, True),
        ((9, 0), True, True),
        ((10, 0), True, True),
        ((12, 0), False, True),
    ],
    ids=str,
)
def test_a_gpu_takes_torchs_kernel_where_it_has_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], of_torch: bool, ours: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(grouped_product, "find_spec", lambda name: name)
    monkeypatch.setattr(grouped_product, "_works", lambda *_: True)
    on_gpu = {
        dtype: rows(dtype, is_cuda=True) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert [has_kernel_of_torch(x) for x in on_gpu.values()] == [of_torch, False, False]
    assert [runs_grouped_product(x) for x in on_gpu.values()] == [of_torch or ours, ours, ours]
    # AMD has numbers of its own, and torch no such kernel
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert not any(map(has_kernel_of_torch, on_gpu.values()))
    monkeypatch.setattr(grouped_product, "find_spec", lambda _: None)
    assert not any(map(runs_grouped_product, on_gpu.values()))


def test_a_kernel_that_does_not_work_is_noted_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no compiler")

    for kernels, said in (
        (broken, "RuntimeError: no compiler"),
        (lambda: SimpleNamespace(**WRONG), "its numbers are not"),
    ):
        monkeypatch.setattr(grouped_product, "kernels", kernels)
        grouped_product._works.cache_clear()
        with held() as found:
            assert not grouped_product._works(torch.device("cpu"), torch.float32)
        (finding,) = found
        assert finding.said.startswith(said) and finding.slower == "they are computed one by one"
    grouped_product._works.cache_clear()


CASES = (((5, 0, 65), 24, 40), ((100, 0, 3, 197), 130, 96), ((0, 1, 0, 8), 8, 200), ((0, 0), 8, 8))


def compare() -> None:
    """Our kernels with each expert's own product, and their gradients. Run where Triton
    interprets.
    """
    generator = torch.Generator().manual_seed(0)
    for (counts, outputs, inputs), dtype, transposed in product(
        CASES, (torch.float32, torch.float16), (False, True)
    ):
        sides = (inputs, outputs) if transposed else (outputs, inputs)
        x, stored = (
            torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            for shape in ((sum(counts), inputs), (len(counts), *sides))
        )
        weight, ends = stored.mT if transposed else stored, torch.tensor(counts).cumsum(0).int()
        ours = grouped_product._product(x, weight, ends)
        plain = torch.cat(
            [share @ weight[expert].T for expert, share in enumerate(torch.split(x, [*counts]))]
        )
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert_close(ours, plain, atol=tolerance, rtol=tolerance)
        grad = torch.randn(plain.shape, generator=generator).to(dtype)
        found, expected = (torch.autograd.grad(out, (x, stored), grad) for out in (ours, plain))
        assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_our_kernels_give_each_experts_product_and_its_gradients() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    command = [sys.executable, "-c", f"from {__name__} import compare; compare()"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize(
    ("dtype", "inner", "precision"), [("bf16", 64, "ieee"), ("fp32", 32, "ieee")]
)
def test_our_kernels_compile_for_every_gpu(
    capability: int, dtype: str, inner: int, precision: str
) -> None:
    triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {"product": {"ROWS": 64, "INNER": inner}, "outer_product": {"ROWS": 32, "INNER": 64}}
    for name, chosen in sizes.items():
        kernel = getattr(grouped_product.kernels(), name)
        constants = {"COLUMNS": 64, "PRECISION": precision, **chosen}
        tensors = dict.fromkeys(("x", "weight", "left", "right", "out"), f"*{dtype}") | {
            "ends": "*i32"
        }
        types = {
            key: "constexpr" if key in constants else tensors.get(key, "i32")
            for key in kernel.arg_names
        }
        by_place = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=by_place),
            target=GPUTarget("cuda", capability, 32),
        )
        assert compiled.asm["cubin"] and compiled.metadata.shared < 99 * 1024
        assert ("mma" in compiled.asm["ptx"]) == (dtype == "bf16")


def test_torchs_fallback_reads_where_the_rows_of_each_expert_end() -> None:
    """Which is why ours exists: where it no longer does, this fails."""
    ends = torch.tensor([3, 8], dtype=torch.int32)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        F.grouped_mm(torch.randn(8, 16), torch.randn(2, 16, 8), offs=ends)
    reads = {event.key: event.count for event in seen.key_averages()}
    assert reads["aten::item"] >= len(ends)
