"""Several GPUs: memory and traffic of each layout against steps of toy models on processes over
gloo.
"""

import weakref
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.calc import parallel
from pipeline.calc.families import architecture
from pipeline.calc.fit import gpu, gpus, of_size
from pipeline.calc.memory import predict
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import built_in, names
from pipeline.models.base import CausalLM
from pipeline.models.quantized_linear import quantize
from pipeline.models.transformers_model import from_config
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.lora import Lora
from pipeline.training.batches import Batch
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.sharding import shard
from pipeline.training.step import loss_of
from tests.helpers.errors import user_error
from tests.helpers.ranks import run_ranks

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SHAPES = architecture(LLAMA, "toy")
RUN = TrainingConfig(batch=2, sequence=8, precision="fp32", checkpointing="none", context=0)
QWEN = built_in("qwen3-8b").shapes


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`bytes` that each kind of collective made, and the `peak` of gathered weights that are alive
    at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.peak, self._gathered = 0, list[weakref.ref[Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and ("gather" in name or "reduce" in name):
            kind = "gather" if "gather" in name else "scatter" if "scatter" in name else "reduce"
            made = args[0] if namespace == "c10d" else out
            made = made if isinstance(made, list | tuple) else [made]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in made)
            self._gathered += [weakref.ref(t) for t in made if kind == "gather"]
        elif name == "split_with_sizes_copy":  # of what was gathered, into the weights
            self._gathered += [weakref.ref(t) for t in kwargs["out"]]
        alive = [t for one in self._gathered if (t := one()) is not None]
        storages = {s.data_ptr(): s.nbytes() for t in alive if (s := t.untyped_storage()).nbytes()}
        self.peak = max(self.peak, sum(storages.values()))
        return out


def bytes_of(tensors: Any) -> int:
    """Of this rank's part."""
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def batch() -> Batch:
    ids = torch.arange(RUN.tokens).view(RUN.batch, RUN.sequence)
    return Batch(ids, torch.arange(RUN.sequence).expand_as(ids), ids.flatten(), None)


def gradients_of(model: CausalLM) -> None:
    loss_of(model, batch()).backward()  # type: ignore[no-untyped-call]


def sharded_step(spec: AdapterSpec, run: TrainingConfig) -> dict[str, int]:
    """What one rank has and makes in a LoRA step on a sharded base."""
    torch.manual_seed(0)
    quantized = run.precision != "fp32"
    model = from_config(LLAMA, torch.bfloat16 if quantized else torch.float32)
    if quantized:
        quantize(model, run.precision, None, torch.device("cpu"))  # type: ignore[arg-type]
    attach(model, spec, torch.float32)
    model.checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
    shard(model, torch.device("cpu"))
    optimizer = FlatOptimizer(model.train())
    gradients_of(model)  # the first backward also fetches for the forwards that had none
    with Collectives() as seen:
        loss = loss_of(model, batch())
        forward, seen.peak = Collected(seen.bytes["gather"], seen.peak), 0
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.collect_gradients()
    return {
        "frozen": bytes_of(p for p in model.parameters() if not p.requires_grad),
        "gathered_forward": forward.bytes,
        "gathered_backward": seen.bytes["gather"] - forward.bytes,
        "reduced_gradients": seen.bytes["reduce"],
        "scattered_gradients": seen.bytes["scatter"],
        "peak_forward": forward.peak,
        "peak_backward": seen.peak,
    }


class Collected(NamedTuple):
    bytes: int
    peak: int


EVERY = ("q_proj", "down_proj")
UPPER = tuple(
    f"model.layers.{n}.{name}" for n in (2, 3) for name in ("self_attn.q_proj", "mlp.down_proj")
)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("change", "targets"),
    [
        ({}, EVERY),
        ({"checkpointing": "full"}, EVERY),
        ({"precision": "nf4-dq"}, EVERY),
        ({}, UPPER),
    ],
    ids=["plain", "checkpointed", "quantized", "upper blocks"],
)
@pytest.mark.slow
def test_a_sharded_step_holds_and_gathers_what_is_predicted(
    count: int, change: dict[str, str], targets: tuple[str, ...]
) -> None:
    run, method = replace(RUN, **change), Lora(rank=4, alpha=8.0, targets=targets)  # type: ignore[arg-type]
    traffic = parallel.layout(
        "sharded", SHAPES, method, run, parallel.Devices(count, gpu("h100"))
    ).traffic
    predicted = traffic._asdict()
    block = count * parallel.share_bytes(SHAPES.blocks[0], run, count)
    predicted |= {f"peak_{phase}": blocks * block for phase, blocks in parallel.GATHERED.items()}
    predicted["frozen"] = (
        parallel.shard(SHAPES, method, run, count).weights - predicted["peak_backward"]
    )
    assert predicted.pop("reduced_activations") == 0
    # of each linear's 4 scales of scales some ranks have padding
    tolerance = 0.01 if run.precision != "fp32" else 0
    for found in run_ranks(count, sharded_step, AdapterSpec(4, 8.0, targets), run):
        assert found == pytest.approx(predicted, rel=tolerance)


def fully_sharded_step() -> dict[str, int]:
    """The same of full fine-tuning, whose blocks FSDP2 shards with gradients; the rest is on every
    rank.
    """
    from torch.distributed.fsdp import fully_shard

    model = from_config(LLAMA, torch.float32)
    rest = {*model.parameters()} - {*model.blocks.parameters()}
    for module in (*model.blocks, model.body):
        fully_shard(module, reshard_after_forward=True, ignored_params=rest)
    gradients_of(model)
    with Collectives() as seen:
        loss = loss_of(model, batch())
        forward = seen.bytes["gather"]
        loss.backward()  # type: ignore[no-untyped-call]
    return {
        "weights": bytes_of(model.parameters()),
        "gathered_forward": forward,
        "gathered_backward": seen.bytes["gather"] - forward,
        "scattered_gradients": seen.bytes["scatter"] * torch.distributed.get_world_size(),
    }


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_full_fine_tuning_gathers_and_scatters_what_is_predicted(count: int) -> None:
    traffic = parallel.layout(
        "sharded", SHAPES, FULL, RUN, parallel.Devices(count, gpu("h100"))
    ).traffic._asdict()
    block = count * parallel.share_bytes(SHAPES.blocks[0], RUN, count)
    weights = (
        parallel.shard(SHAPES, FULL, RUN, count).weights - parallel.GATHERED["backward"] * block
    )
    rest = 4 * (SHAPES.total - sum(block.parameters for block in SHAPES.blocks))
    assert (traffic.pop("reduced_gradients"), traffic.pop("reduced_activations")) == (rest, 0)
    assert run_ranks(count, fully_sharded_step) == [{"weights": weights, **traffic}] * count


def tensor_parallel_step(run: TrainingConfig) -> dict[str, int]:
    """What one rank has and makes in a step of full fine-tuning, as torch's own tensor parallelism
    splits it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model = from_config(LLAMA, torch.float32)
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    for block in model.blocks:
        plan = {
            # one sum of the gradients of q's, k's and v's input, and one of gate's and up's
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Replicate()},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
            **{
                f"self_attn.{name}_proj": ColwiseParallel(output_layouts=Shard(-1))
                for name in "qkv"
            },
            **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
            "self_attn.o_proj": RowwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
    model.checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
    model.train()
    with Collectives() as seen:
        gradients_of(model)
    return {"weights": bytes_of(model.parameters()), "reduced_activations": seen.bytes["reduce"]}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.slow
def test_a_tensor_parallel_step_holds_and_sums_what_is_predicted(
    count: int, checkpointing: str
) -> None:
    run = replace(RUN, checkpointing=checkpointing)
    found = parallel.layout("tensor", SHAPES, FULL, run, parallel.Devices(count, gpu("h100")))
    predicted = {
        "weights": found.memory.weights,
        "reduced_activations": found.traffic.reduced_activations,
    }
    assert run_ranks(count, tensor_parallel_step, run) == [predicted] * count


def test_the_factor_of_lora_that_is_whole_on_every_device_gets_a_part_of_its_gradient_from_each() -> (
    None
):
    x, dy = torch.randn(6, 8), torch.randn(6, 4)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    whole = torch.autograd.grad(x @ A.T @ B.T, (A, B), dy)
    by_outputs = [
        torch.autograd.grad(x @ A.T @ B[part].T, A, dy[:, part])[0]
        for part in (slice(2), slice(2, 4))
    ]
    by_inputs = [
        torch.autograd.grad(x[:, part] @ A[:, part].T @ B.T, B, dy)[0]
        for part in (slice(5), slice(5, 8))
    ]
    torch.testing.assert_close([sum(by_outputs), sum(by_inputs)], list(whole))
    # by outputs and by inputs, which both leave 4 × 128 whole
    method = Lora(rank=4, targets=("k_proj", "down_proj"))
    found = parallel.layout("tensor", SHAPES, method, RUN, parallel.Devices(2, gpu("h100")))
    assert found.traffic.reduced_gradients == 4 * (4 * 128 * 2) * 4


def test_one_device_exchanges_nothing_and_several_in_rings() -> None:
    traffic = parallel.Traffic(80, 80, 8, 40, 160)
    assert traffic.received(1) == parallel.Traffic(0, 0, 0, 0, 0)
    assert traffic.received(4) == parallel.Traffic(60, 60, 6, 60, 240)


@pytest.mark.parametrize("name", parallel.LAYOUTS)
def test_the_largest_that_fits_fits_and_one_more_does_not(name: str) -> None:
    run, method, devices = (
        replace(RUN, precision="bf16", context=2**29),
        Lora(),
        parallel.parse_devices("4x24GB"),
    )

    def fits(run: TrainingConfig) -> bool:
        return parallel.layout(name, QWEN, method, run, devices).memory.peak <= devices.gpu.bytes

    def with_(key: str, value: int) -> TrainingConfig:
        return replace(run, **{key: value})  # type: ignore[arg-type]

    for key, value in parallel.largest_of(name, QWEN, method, run, devices).items():
        assert fits(with_(key, value)) and not fits(with_(key, value + 1))


@pytest.mark.parametrize("name", ["sharded", "tensor"])
def test_the_least_number_of_devices_holds_the_run_and_fewer_do_not(name: str) -> None:
    run, method, card = replace(RUN, precision="bf16"), Lora(), gpu("rtx3060")
    count = parallel.least(name, QWEN, method, run, card)
    assert count is not None and count > 1

    def peak(count: int) -> int:
        return parallel.layout(name, QWEN, method, run, parallel.Devices(count, card)).memory.peak

    assert peak(count) <= card.bytes
    assert all(
        peak(n) > card.bytes for n in range(1, count) if parallel.why_not(name, QWEN, n) is None
    )
    assert parallel.least("replicated", QWEN, method, run, card) is None


def test_a_step_is_bound_by_products_or_by_the_link() -> None:
    run = TrainingConfig(batch=1, sequence=2048)
    fast, slow = (
        parallel.layout("sharded", QWEN, Lora(), run, parallel.Devices(8, gpu(n)))
        for n in ("h100", "l40s")
    )
    assert fast.compute is not None and fast.exchange is not None and fast.exchange < fast.compute
    assert slow.compute is not None and slow.step is not None and slow.step > 2.5 * slow.compute
    tensor = parallel.layout("tensor", QWEN, Lora(), run, parallel.Devices(8, gpu("h100")))
    assert tensor.compute is not None and tensor.exchange is not None
    assert tensor.step == pytest.approx(tensor.compute + tensor.exchange), "sums are waited for"


@pytest.mark.parametrize(
    ("model", "count", "reason"),
    [
        ("qwen3-8b", 16, "8 key and value heads cannot be divided among 16 GPUs"),
        ("qwen2.5-7b", 3, "28 heads cannot be divided among 3 GPUs"),
        ("deepseek-v3", 2, "tensor parallel is counted for plain attention"),
    ],
)
def test_what_tensor_parallelism_cannot_divide_is_said(model: str, count: int, reason: str) -> None:
    found = parallel.why_not("tensor", built_in(model).shapes, count)
    assert found is not None and found.startswith(reason)
    assert parallel.why_not("sharded", built_in(model).shapes, count) is None


@pytest.mark.parametrize("name", names())
def test_a_tensor_share_has_a_part_of_the_blocks_and_all_of_the_rest(name: str) -> None:
    model = built_in(name).shapes
    if parallel.why_not("tensor", model, 2):
        return
    local = parallel.tensor_share(model, 2)
    blocks = sum(block.parameters for block in model.blocks)
    replicated = model.total - blocks
    assert replicated + blocks / 2 <= local.total < replicated + 0.51 * blocks
    method = Lora(targets=("all-linear",))
    assert predict(local, method, RUN).peak < predict(model, method, RUN).peak


def test_devices_are_named_as_their_sellers_do() -> None:
    assert parallel.parse_devices("8xH100") == (8, gpu("h100"))
    assert parallel.parse_devices("2 x A100-40GB") == (2, gpu("a100-40"))
    assert parallel.parse_devices("2×rtx 4090") == (2, gpu("rtx4090"))
    assert parallel.parse_devices("2xA100 80 GB") == (2, gpu("a100-80"))
    count, card = parallel.parse_devices("4x24GB")
    assert (count, card.bytes, card.link) == (4, 24 * 2**30, None)


@pytest.mark.parametrize(
    "text", ["8", "x8", "0xh100", "2000xh100", "8xnix", "-1xh100", "4x0GB", "8x", "8x\x1b[2J"]
)
def test_other_devices_are_refused_in_one_line(text: str) -> None:
    said = user_error(parallel.parse_devices, text)
    assert said.isprintable()


def test_a_size_that_no_gpu_has_is_refused_by_the_options_name_with_both_limits() -> None:
    rule = "takes GiB of memory, which must be more than 0 and below 1,048,576"
    assert user_error(parallel.parse_devices, "4x0GB") == f"gpus {rule}, got 0."
    assert user_error(of_size, 2e6) == f"fit {rule}, got 2e+06."


def test_every_card_that_computes_has_a_link() -> None:
    assert all(
        (card.link is None) == (card.tflops is None) == (not card.via) for card in gpus().values()
    )
