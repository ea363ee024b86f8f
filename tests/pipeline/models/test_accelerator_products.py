"""What a training step on an accelerator launches fewer kernels for, computed here on the CPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.lora import DoRALinear, LoRALinear
from pipeline.models import trial
from pipeline.models.base import CausalLM
from pipeline.models.generate import read_side_by_side
from pipeline.models.kernels import accelerator
from pipeline.models.kernels.accelerator import block as accelerator_block
from pipeline.models.kernels.accelerator import fuse, products, weights
from pipeline.models.kernels.accelerator.block import AcceleratorBlock
from pipeline.models.kernels.accelerator.products import linears
from pipeline.models.pages import PagePool, SequenceCache
from pipeline.models.quantized_linear import QuantizedLinear, quantize
from pipeline.training.batches import collate
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.step import loss_of
from tests.helpers.real import toy, windows_of, with_lora

CPU = torch.device("cpu")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer(
    kind: type[LoRALinear] | None, outputs: int, bias: bool, low_bit: bool = False
) -> nn.Module:
    """A frozen linear with 512 inputs, and random factors in fp32, too large to be folded."""
    base: Any = nn.Linear(512, outputs, bias)
    if low_bit:
        base = QuantizedLinear(base, "nf4-dq", CPU)
    base.requires_grad_(False)
    if kind is None:
        return base  # type: ignore[no-any-return]
    made = kind(base, 3, 2.0)
    nn.init.normal_(made.lora_B, std=0.1)
    made.folds = False
    if isinstance(made, DoRALinear):
        nn.init.uniform_(made.magnitude, 0.5, 2)
    return made


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """The same in mathematics, without a function of ours."""
    base: Any = getattr(module, "base", module)
    W = base.weight
    if not isinstance(module, LoRALinear):
        return F.linear(x, W, base.bias)
    W = W + module.scale * module.lora_B @ module.lora_A
    if isinstance(module, DoRALinear):
        W = (module.magnitude / W.detach().norm(dim=1))[:, None] * W
    return F.linear(x, W, base.bias)


GROUPS = {
    "LoRA": [layer(LoRALinear, 40, False), layer(LoRALinear, 24, False)],
    "biases": [layer(LoRALinear, 40, True), layer(LoRALinear, 24, True)],
    "one is frozen": [layer(LoRALinear, 40, True), layer(None, 24, False)],
    "frozen": [layer(None, 40, True)],
    "DoRA": [layer(DoRALinear, 40, False), layer(DoRALinear, 24, True)],
    "NF4": [layer(LoRALinear, 40, True, True), layer(None, 64, False, True)],
}


@pytest.mark.parametrize("group", GROUPS)
def test_linears_that_share_an_input_have_the_gradients_of_plain_mathematics(group: str) -> None:
    modules = GROUPS[group]
    x = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(0))
    results = []
    for compute in (linears, lambda x, modules: [plain(module, x) for module in modules]):
        leaf = x.clone().requires_grad_()
        outs = compute(leaf, modules)
        squares = [(out * torch.linspace(-1, 1, out.shape[-1])).square().sum() for out in outs]
        total = torch.stack(squares).sum()
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        results.append([*outs, *torch.autograd.grad(total, [leaf, *trained])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.dist(ours, theirs) < 1e-4 * theirs.norm()


def test_gradients_of_several_batches_are_added_in_the_optimizers_buffer() -> None:
    """Its bf16 copies are read, and follow its updates; the sums stay in fp32."""
    module = layer(LoRALinear, 40, False).to(torch.bfloat16)
    assert isinstance(module, LoRALinear)
    for factor in (module.lora_A, module.lora_B):
        factor.data = factor.data.float()
    optimizer = FlatOptimizer(module, narrow=torch.bfloat16)
    xs = torch.randn(3, 7, 512, dtype=torch.bfloat16).unbind()
    expected = torch.zeros(40, 3)
    for x in xs:
        torch.autograd.backward(linears(x, [module])[0].sum())
        low = (x @ module.lora_A.to(x.dtype).T).float()  # (7, R)
        expected += module.scale * torch.ones(40, 7) @ low
    assert module.lora_B.grad is not None and module.lora_B.grad.dtype == torch.float32
    assert torch.dist(module.lora_B.grad, expected) < 0.02 * expected.norm()

    before = module.lora_B.clone()
    optimizer.collect_gradients()
    optimizer.step(0.1)
    assert not torch.equal(before, module.lora_B)
    assert torch.equal(module.lora_B.in_16_bits, module.lora_B.to(torch.bfloat16))  # type: ignore[attr-defined]


def test_doras_norms_are_computed_once_between_two_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer(DoRALinear, 40, False)
    assert isinstance(module, DoRALinear)
    optimizer = FlatOptimizer(module, narrow=torch.float32)
    computed = list[Tensor]()
    norms = DoRALinear._norms

    def counted(self: DoRALinear, A: Tensor, B: Tensor) -> Tensor:
        computed.append(norms(self, A, B))
        return computed[-1]

    monkeypatch.setattr(DoRALinear, "_norms", counted)
    for update in (1, 2):
        for _ in range(2):
            torch.autograd.backward(linears(torch.ones(1, 4, 512), [module])[0].sum())
        assert len(computed) == update
        optimizer.collect_gradients()
        optimizer.step(0.1)
    assert not torch.equal(*computed)
    W = module.base.weight + module.scale * module.lora_B @ module.lora_A  # type: ignore[operator]
    assert torch.allclose(module._norms_of_step()[0], W.norm(dim=1), rtol=1e-4)

    # of another optimizer the copies begin to count anew
    optimizer = FlatOptimizer(module, narrow=torch.float32)
    module._norms_of_step()
    with torch.no_grad():
        optimizer.weights.mul_(2)
    FlatOptimizer(module, narrow=torch.float32)
    W = module.base.weight + module.scale * module.lora_B @ module.lora_A  # type: ignore[operator]
    assert torch.allclose(module._norms_of_step()[0], W.norm(dim=1), rtol=1e-4)


def gradients(model: CausalLM, lengths: Sequence[int]) -> list[Tensor]:
    """The loss of a packed row, and the gradients of all that trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = loss_of(model, collate(windows_of(lengths, lambda length: length // 2)))
    return [loss, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_fused_block_trains_as_the_familys_own(
    family: str, biased: bool, dora: bool, checkpointing: Any
) -> None:
    settings: Any = {"attention_bias": biased, "mlp_bias": biased}
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = with_lora(toy(family, **settings), names=TARGETS, dora=dora)
        model.train().checkpoint_blocks(checkpointing)
        if fused:
            fuse(model, CPU)
            assert all(isinstance(block, AcceleratorBlock) for block in model.blocks)
        results.append(gradients(model, (9, 5, 12)))
    for ours, theirs in zip(*reversed(results), strict=True):
        assert torch.dist(ours, theirs) <= 1e-4 * theirs.norm() + 1e-6


def test_a_block_that_computes_something_else_is_left_alone() -> None:
    model = toy("llama")
    kind = type(model.blocks[0])

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *inputs: Any, **options: Any) -> Tensor:
            out: Tensor = super().forward(*inputs, **options) * 2
            return out

    for block in model.blocks:
        block.__class__ = Doubled
    fuse(model.train(), CPU)
    assert not any(isinstance(block, AcceleratorBlock) for block in model.blocks)


@torch.no_grad()
def test_answers_take_the_fused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read a cache of pages as the family's own forward reads it."""
    model = with_lora(toy("qwen3"), names=TARGETS).eval()

    def read() -> list[Tensor]:
        pool = PagePool(16)
        caches = [SequenceCache(pool, 16) for _ in range(2)]
        return [read_side_by_side(model, caches, parts) for parts in ([[1, 2, 3], [4]], [[5], [6]])]

    expected = read()
    fuse(model, CPU)
    for block in model.blocks:  # its own forward does not run any more
        kind = type(block).__mro__[2]
        monkeypatch.setattr(kind, "forward", None)
    assert torch.allclose(torch.stack(read()), torch.stack(expected), atol=1e-4)


@torch.no_grad()
def test_an_answer_multiplies_by_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of few bits is dequantized in training, where there are many rows."""
    model = toy("llama")
    quantize(model, "nf4", None, CPU)
    for adapted in with_lora(model, names=TARGETS).modules():
        if isinstance(adapted, LoRALinear):
            adapted.folds = False
    fuse(model.eval(), CPU)
    inputs = list[tuple[int, ...]]()
    forward = QuantizedLinear.forward

    def counted(layer: QuantizedLinear, x: Tensor) -> Tensor:
        inputs.append((*x.shape,))
        return forward(layer, x)

    monkeypatch.setattr(QuantizedLinear, "forward", counted)
    model(torch.arange(3)[None])
    assert len(inputs) == 7 * len(model.blocks)


def test_turning_back_is_the_transpose_of_turning() -> None:
    q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
    angles = torch.randn(1, 6, 4).repeat(1, 1, 2)
    turned, _ = accelerator_block.rotate(q, k, angles.cos(), angles.sin())
    half = torch.cat((-q[..., 4:], q[..., :4]), -1)
    expected = q * angles.cos()[:, None] + half * angles.sin()[:, None]
    grad = torch.randn_like(q)
    ours, theirs = (torch.autograd.grad(out, q, grad)[0] for out in (turned, expected))
    assert torch.allclose(turned, expected, atol=1e-6) and torch.allclose(ours, theirs, atol=1e-6)
    assert accelerator._same_rotation(accelerator_block.rotate, accelerator_block.rotate, CPU)


@pytest.mark.parametrize(
    ("fast", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.bfloat16)]
)
def test_kernels_are_tried_in_what_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch, fast: str, dtype: torch.dtype
) -> None:
    tried = list[torch.dtype]()
    monkeypatch.setattr(trial, "fast_precision", lambda _: fast)
    monkeypatch.setattr(trial, "uses_cpu_kernels", lambda _: False)
    for module, name in ((products, "adds_in_fp32"), (weights, "dequantizes_nf4")):
        monkeypatch.setattr(module, name, lambda _, dtype: tried.append(dtype))
    assert not trial.try_kernels(CPU) and tried == [dtype] * 2


@pytest.mark.parametrize(("capability", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
def test_our_kernels_compile_for_a_card(capability: int, dtype: str) -> None:
    """To machine code, which needs no card."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models.kernels.accelerator import triton_kernels

    pointers = {
        "codes": "*u8",
        "scales": "*u8",
        "labels": "*i64",
        "logits": f"*{dtype}",
        "out": f"*{dtype}",
    }
    fixed = {"CAP": 30.0, "GRADIENT": True, "COLUMNS": 4096}
    fixed |= {"BLOCK": 64, "SCALE_BLOCK": 256, "DOUBLE": True, "COUNT": 1024}
    for kernel in (triton_kernels.cross_entropy, triton_kernels.dequantize_nf4):
        types = dict.fromkeys(kernel.arg_names, "*fp32")
        types |= {name: pointers[name] for name in types if name in pointers}
        types |= {name: "i32" for name in types if name in ("V", "count")}
        constants = {name: fixed[name] for name in types if name in fixed}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
