# ruff: noqa: ARG002 (a hook gets more than most methods need)
"""A fine-tuning method is one object: one that is defined here is counted, simulated and compared
like the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.memory import shortened
from pipeline.calc.architecture import Architecture, Linear
from pipeline.calc.families import architecture
from pipeline.calc.fit import GIB, changes, largest
from pipeline.calc.memory import predict
from pipeline.calc.method import (
    FinetuningMethod,
    TrainedParts,
    configure,
    matching_linears,
    trainable,
)
from pipeline.calc.report import answer, explain, side_by_side, swept
from pipeline.calc.settings import TrainingConfig, option, options_of
from pipeline.calc.sources.open_model import built_in
from pipeline.calc.tape import Ops, Value
from pipeline.errors import UserError
from pipeline.models.kernels.accelerator import GatedProduct, fuse_gates
from pipeline.models.kernels.rms_norm import fuse_rms_norms
from pipeline.models.transformers_model import from_config
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.registry import COUNTED
from pipeline.training.memory.prediction import TensorMemoryMeter


@dataclass(frozen=True)
class Scaling(FinetuningMethod):
    """l ⊙ Wx at chosen linears, as (IA)³ (Liu et al. 2022) does with keys and values; only l, of
    width O, trains.
    """

    name = "scaling"
    aliases = {"qscaling": {"precision": "nf4"}}  # noqa: RUF012

    targets: tuple[str, ...] = option(
        ("k_proj", "v_proj"), "Linears to scale.", parse=lambda text: (text,)
    )
    copies: int = option(1, "Vectors per linear, multiplied one after the other.", least=1)

    @property
    def title(self) -> str:
        return f"{self.copies} scales on {', '.join(self.targets)}"

    def adapted(self, model: Architecture) -> Mapping[str, int]:
        return dict.fromkeys(matching_linears(model, self.targets), self.copies)

    def linear_parameters(self, linear: Linear, rank: int) -> int:
        return rank * linear.outputs

    def trained_parts(self, model: Architecture) -> TrainedParts:
        names = self.adapted(model)
        return TrainedParts(
            {
                "scales": sum(
                    self.copies * linear.outputs for n, linear in model.linears() if n in names
                )
            }
        )

    def adapt(self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """The gradient of l is the sum of g·y over the rows, for which backward computes g·y (rows,
        O).
        """
        for _ in range(rank):
            size = y.elements * y.width
            y = ops.tape.op(y, saves=[y], weights=[ops.adapter_weight(linear.outputs)], back=size)
        return y


class ScaledLinear(nn.Module):
    """The same in torch."""

    def __init__(self, linear: nn.Module, outputs: int, copies: int) -> None:
        super().__init__()
        self.linear = linear
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(outputs)) for _ in range(copies))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        for scale in self.scales:
            y = y * scale
        return y


def traced(config: Mapping[str, Any], method: Scaling, run: TrainingConfig) -> int:
    """Peak of the second real step, in bytes of tensors, with torch's fused AdamW."""
    live = TensorMemoryMeter()
    with FakeTensorMode():
        model = from_config(config, torch.float32)
        model.use_attention("eager")
        model.requires_grad_(False)
        for name in matching_linears(architecture(config, "three"), method.targets):
            linear: Any = model.get_submodule(name)
            model.set_submodule(name, ScaledLinear(linear, linear.out_features, method.copies))
        if run.ours:  # as in training on a GPU
            fuse_rms_norms(model, checked=False)
            fuse_gates(model, [GatedProduct.apply], torch.device("cpu"), checked=False)
        model.train().checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        ids = torch.zeros(run.batch, run.sequence, dtype=torch.long)
        labels = torch.zeros(run.batch, run.sequence, dtype=torch.long)

        def step() -> None:
            torch.autograd.backward(
                F.cross_entropy(
                    model.logits(model.hidden_states(ids)).float().flatten(0, 1), labels.flatten()
                )
            )
            optimizer.step()
            optimizer.zero_grad()

        live.watch([*model.parameters(), *model.buffers()])
        with live:
            step()
            live.peak = live.now
            step()
    return live.peak


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    "method", [Scaling(), Scaling(("all-linear",)), Scaling(("all-linear",), copies=3)]
)
@pytest.mark.slow
def test_a_method_defined_outside_needs_the_memory_of_its_real_step(
    method: Scaling, checkpointing: str
) -> None:
    # with few words, activations are at the peak
    config = {**shortened("smollm2-135m", 3), "vocab_size": 1000}
    run = TrainingConfig(4, 256, "fp32", checkpointing=checkpointing, attention="eager")
    formula, real = (
        predict(architecture(config, "three"), method, run).peak,
        traced(config, method, run),
    )
    assert formula == pytest.approx(real, rel=0.03)
    if checkpointing == "none" and method.copies == 3:
        assert (
            formula
            > 1.2 * predict(architecture(config, "three"), Scaling(method.targets), run).peak
        )


def test_a_method_defined_outside_is_counted_compared_and_advised() -> None:
    model = built_in("qwen3-8b").shapes
    known = {**COUNTED, Scaling.name: Scaling()}
    methods, method, run = configure(model, known, "qscaling", copies=2, targets="v_proj", batch=3)
    assert (method, run.precision, run.batch) == (Scaling(("v_proj",), 2), "nf4", 3)
    assert trainable(model, method) == 36 * 2 * 1024
    result = answer(model, method, run)
    assert (result["method"], result["rank"], result["projections"]) == ("scaling", None, [])
    assert result["parameters"]["trained"] == {"scales": 36 * 2 * 1024}
    assert result["adapter_bytes"]["fp32"] == result["memory"]["adapter"] == 36 * 2 * 1024 * 4
    assert list(side_by_side(model, method, run, methods)) == [
        "full",
        "freeze",
        "scaling",
        "scaling NF4",
    ]
    assert dict(explain(model, method, run, predict(model, method, run)))["trainable"].startswith(
        "73,728 added"
    )
    assert [m for _, m, _ in swept(FULL, run, "method", ["scaling", "lora"], methods)] == [
        method,
        methods["lora"],
    ]
    assert largest(model, method, run, 24 * GIB).rank is None
    only = {name: m for name, m in methods.items() if name != "lora"}
    plain = TrainingConfig()
    assert next(changes(model, FULL, plain, 24 * GIB, {"scaling": method, **only}))[:2] == (
        "--method scaling",
        method,
    )


def test_a_methods_options_have_one_rule_and_one_help() -> None:
    model, methods = built_in("qwen3-8b").shapes, {**COUNTED, Scaling.name: Scaling()}
    assert options_of(Scaling)["copies"].help.startswith("Vectors per linear")
    wrong: Callable[..., Any] = lambda **values: configure(model, methods, "lora", **values)  # noqa: E731
    with pytest.raises(
        UserError, match="copies must be a whole number from 1 to 2,147,483,647, got 0"
    ):
        wrong(copies=0)
    with pytest.raises(UserError, match="calc has no option vectors"):
        wrong(vectors=1)
    with pytest.raises(UserError, match=f"method must be one of {', '.join(methods)}, got 'vera'"):
        configure(model, methods, "vera")
    with pytest.raises(UserError, match="'nope' matches no linear layer"):
        trainable(model, Scaling(("nope",)))


def test_every_method_has_a_name_a_title_and_options_that_others_may_share() -> None:
    for name, method in COUNTED.items():
        assert name == method.name and method.title
        assert method == type(method)() and hash(method) == hash(type(method)())
        assert all(rule.help.endswith(".") for rule in options_of(method).values())
    assert COUNTED["prefix"] != COUNTED["prompt"], (
        "equal options of different methods are not mixed up in caches"
    )
