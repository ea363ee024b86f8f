"""A training step on a device without numbers waits for it once, and makes everything there: see
`stand_in`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.models import device
from pipeline.models.base import CausalLM, LowBitLinear
from pipeline.models.kernels import runs_flash_attention
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.models.quantized_linear import Quantization, quantize
from pipeline.models.virtual_tokens import PrefixTokens, PromptTokens
from pipeline.project.params.sections import Training
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.batched import ManyAdapters
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.parallel.sharding import _buffers_to_parameters
from pipeline.training.preferences.batches import AnswerBatches, Answers
from pipeline.training.preferences.losses import WITH_REFERENCE, PreferencePath
from pipeline.training.retention import RetentionLoss
from pipeline.training.step import Evaluation, Learner
from pipeline.training.task import TrainingTask, build_optimizer
from tests.helpers.real import ROWS, listed, toy, windows_of, with_lora
from tests.helpers.stand_in import READ, STAND_IN, Seen, refuse, to_stand_in, watched

# More than the keys that a block of queries sees together, and than any dimension of a toy.
LENGTHS = (590, 700, 650, 12, 640, 30, 20, 601)
ROW = 580  # tokens: no tensor may have two dimensions of so many
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def data(
    lengths: Sequence[int] = LENGTHS, asked: Callable[[int], int] = lambda length: length // 3
) -> Any:
    return listed(windows_of(lengths, asked))


def on_stand_in(model: CausalLM) -> CausalLM:
    """The model there, ready to train. What a model supports is tried once, before."""
    assert model.supports_packing
    return to_stand_in(model).train()


def seen_in_steps(model: CausalLM, task: TrainingTask, count: int = 2) -> Seen:
    """What happened in `count` steps after the first, which makes the optimizer's state."""
    optimizer = build_optimizer(model, *(learner.settings for learner in task.learners))
    records = steps(task, optimizer)
    with watched(ROW) as seen:
        next(records)
        seen.clear()
        for _ in range(count):
            assert next(records)
    return seen


def step_of(model: CausalLM, settings: Training | None = None, **task: Any) -> Seen:
    """Two steps of one learner, of two batches each."""
    settings = settings or Training(epochs=9)
    batches = Batches(data(), 2, 0, 2)
    return seen_in_steps(
        model, TrainingTask.of_one(on_stand_in(model), batches, settings, None, **task)
    )


ONE_READ = {READ: 2}  # in two steps
on_cuda = pytest.mark.skipif(STAND_IN.type == "meta", reason="it runs on CUDA: test_on_cuda.py")
COPIES = 2 * 2  # of micro-batches, in two steps of two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "opt"])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_a_lora_step_is_read_once_and_copies_a_batch_once(family: str, dtype: torch.dtype) -> None:
    targets = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    seen = step_of(with_lora(toy(family, dtype), names=targets))
    refuse(seen, ONE_READ)
    # beside each batch what attention must know of its lengths: once, or once for each of two
    # windows
    tables = (
        {"gemma2": 2, "gemma3": 2}.get(family, 1)
        if dtype == torch.bfloat16 or "gemma" in family
        else 0
    )
    assert seen.queued.total() <= COPIES * (1 + tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.slow
def test_experts_with_lora_are_not_counted_on_the_host(name: str, dtype: torch.dtype) -> None:
    model = toy(name, dtype)
    attach(model, AdapterSpec(3, 6.0, ("q_proj",), parameters=EXPERTS))
    seen = step_of(model)
    if runs_flash_attention(STAND_IN):
        refuse(seen, ONE_READ)
        return
    # before Ampere there is no kernel for all experts: they are counted, once a layer
    layers, counted = 2, "models/experts/mixture.py:_expert_by_expert"
    refuse(
        seen,
        {
            **ONE_READ,
            **dict.fromkeys((f"{counted} bincount", f"{counted} _to_copy"), layers * COPIES),
        },
    )


def full(model: CausalLM) -> None:
    model.requires_grad_(True)


def freeze(model: CausalLM) -> None:
    model.requires_grad_(False)
    model.blocks[-1].requires_grad_(True)


def lora(model: CausalLM, **spec: Any) -> None:
    attach(model, AdapterSpec(3, 6.0, ALL, **spec))


def prefix(model: CausalLM) -> None:
    model.requires_grad_(False)
    assert model.supports_prefix
    model.set_virtual_tokens(PrefixTokens(torch.randn(5, 2 * 2 * 2 * 16), 2, 2))


def prompt(model: CausalLM) -> None:
    model.requires_grad_(False)
    model.set_virtual_tokens(PromptTokens(torch.randn(5, 32)))


METHODS: dict[str, Callable[[CausalLM], None]] = {
    "full": full,
    "freeze": freeze,
    "prefix": prefix,
    "prompt": prompt,
    "DoRA": partial(lora, dora=True),
    "embeddings in full": partial(lora, saved=("embed_tokens", "lm_head")),
    "new rows": partial(lora, rows={"embed_tokens": (3, 4), "lm_head": (3, 4)}),
    "rank and alpha by layer": partial(lora, ranks={"q_proj": 5}, rslora=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(3)
def test_every_method_trains_there(method: str, dtype: torch.dtype) -> None:
    model = toy("qwen3", dtype)
    METHODS[method](model)
    refuse(step_of(model), ONE_READ)


SETTINGS: dict[str, dict[str, Any]] = {
    "clipped, warm-up": {"max_grad_norm": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
    "SGD": {"optimizer": "sgd", "weight_decay": 0.1},
    "8-bit moments": {"optimizer": "adamw-8bit"},
    "fp16": {"precision": "fp16"},
    "dropout and noise": {"lora_dropout": 0.1, "neftune_alpha": 5.0},
    "LoRA+": {"loraplus_ratio": 4.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_there(name: str) -> None:
    settings = FinetuneLora(epochs=9, **SETTINGS[name])
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    model = toy("llama", dtype)
    lora(model, dropout=settings.lora_dropout)
    seen = step_of(model, settings)
    refuse(seen, ONE_READ)


@on_cuda
@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_quantized_base_trains_there(family: str, kind: Quantization, how: Any) -> None:
    model = toy(family, torch.bfloat16)
    quantize(model, kind, torch.bfloat16, STAND_IN)
    attach(model, AdapterSpec(3, 6.0, ("c_attn",) if family == "gpt2" else ALL))
    model.checkpoint_blocks(how)
    refuse(step_of(model), ONE_READ)


@on_cuda
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
def test_a_quantized_base_trains_where_sharding_made_parameters_of_its_codes(
    kind: Quantization,
) -> None:
    model = toy("llama", torch.bfloat16)
    quantize(model, kind, torch.bfloat16, STAND_IN)
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            _buffers_to_parameters(module)
    attach(model, AdapterSpec(3, 6.0, ALL))
    refuse(step_of(model), ONE_READ)


@on_cuda
def test_a_model_answers_on_the_cpu_while_the_gpu_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tmp_path / "free"
    monkeypatch.setenv("LORA_STUB_FREE", f"{free}")
    monkeypatch.setenv("LORA_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)  # none kept
    model = toy("llama", torch.bfloat16)
    size = device.model_bytes(model)
    for room, place in ((size - 1, "cpu"), (size, "cuda")):
        free.write_text(f"{room}")
        assert device.move_for_inference(model).device.type == place


@pytest.mark.slow
def test_paged_moments_are_copied_back_and_forth_and_nothing_else_is() -> None:
    model = toy("llama", torch.bfloat16)
    lora(model)
    seen = step_of(model, FinetuneLora(epochs=9, optimizer="paged-adamw-8bit"))
    # they are in the host's memory, which is their purpose
    moments = "training/optimizer/__init__.py:_update_chunk copy_"
    assert seen.reads.pop(moments) == 2 * 4
    refuse(seen, ONE_READ)


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.slow
def test_blocks_that_run_again_in_backward_copy_nothing_again(how: Any) -> None:
    model = toy("gemma2", torch.bfloat16)
    lora(model)
    model.checkpoint_blocks(how)
    seen = step_of(model)
    refuse(seen, ONE_READ)
    assert seen.queued.total() <= COPIES * 3


@pytest.mark.parametrize(
    "saved", [(), ("embed_tokens", "lm_head")], ids=["adapter", "embeddings in full"]
)
@pytest.mark.slow
def test_retention_is_read_with_the_loss(saved: tuple[str, ...]) -> None:
    model = toy("llama", torch.bfloat16)
    lora(model, saved=saved)
    settings = FinetuneLora(
        epochs=9, retention_data="kept.txt", retention_weight=0.5, retention_batch_size=2
    )
    on_stand_in(model)
    refuse(
        step_of(model, settings, retain=RetentionLoss(model, data((610, 33)), settings)), ONE_READ
    )


@pytest.mark.slow
def test_an_evaluation_is_read_once_however_many_batches_it_has() -> None:
    model = toy("llama", torch.bfloat16)
    lora(model)
    evaluation = Evaluation(Batches(data(), 1, None), 1, 2)
    refuse(step_of(model, evaluation=evaluation), {READ: 4})  # two steps, two evaluations


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 3, 5)], ids=["equal ranks", "unequal ranks"])
@pytest.mark.parametrize("lengths", [(601,) * 6, LENGTHS], ids=["equal lengths", "ragged"])
@pytest.mark.parametrize("family", ["llama", "minigpt"])
def test_many_adapters_are_read_at_once(
    family: str, lengths: Sequence[int], ranks: Sequence[int]
) -> None:
    model: CausalLM = toy("llama", torch.bfloat16) if family == "llama" else minigpt()
    names = ("q_proj", "v_proj")
    routing = attach_many(
        model, [partial(attach, model, AdapterSpec(rank, 6.0, names)) for rank in ranks]
    )
    path = ManyAdapters(model, routing)
    assert path.supports_packing  # without the adapters: before `on_stand_in` asks the model
    on_stand_in(model)
    learners = [
        Learner(FinetuneLora(epochs=9, seed=n), Batches(data(lengths), 2, n), name=f"{n}")
        for n in range(3)
    ]
    refuse(seen_in_steps(model, TrainingTask(model, learners, path)), ONE_READ)


def test_a_sweep_goes_on_without_those_that_were_stopped() -> None:
    model = toy("llama", torch.bfloat16)
    names = ("q_proj", "v_proj")
    routing = attach_many(
        model, [partial(attach, model, AdapterSpec(3, 6.0, names)) for _ in range(3)]
    )
    path = ManyAdapters(model, routing)
    assert path.supports_packing  # without the adapters: before `on_stand_in` asks the model
    on_stand_in(model)
    learners = [
        Learner(FinetuneLora(epochs=9), Batches(data((601,) * 6), 2, 0), name=f"{n}")
        for n in range(3)
    ]
    learners[1].stop(0, "it was stopped")
    refuse(seen_in_steps(model, TrainingTask(model, learners, path)), ONE_READ)


def minigpt() -> MiniGPT:
    return MiniGPT(MiniGPTConfig(ROWS, 0, 1, d_model=32, max_positions=800))


@pytest.mark.parametrize(
    "lengths", [LENGTHS, (30, 20, 10, 30, 7, 20), (601,) * 4], ids=["long", "short", "equal"]
)
@pytest.mark.parametrize("virtual", [False, True], ids=["", "prefix"])
def test_minigpt_masks_nothing_there(lengths: Sequence[int], virtual: bool) -> None:
    model = minigpt()
    if virtual:
        model.requires_grad_(False)
        model.set_virtual_tokens(PrefixTokens(torch.randn(5, 2 * 2 * 32), 2, 4))
    task = TrainingTask.of_one(
        on_stand_in(model), Batches(data(lengths), 4, 0), Training(epochs=9), None
    )
    optimizer = build_optimizer(model, task.settings)
    records = steps(task, optimizer)
    with watched(min(ROW, max(50, max(lengths) - 1))) as seen:
        next(records)
        seen.clear()
        next(records)
    refuse(seen, {READ: 1})


LOSSES: Mapping[str, dict[str, Any]] = {
    "dpo": {"rpo_alpha": 0.5},
    "ipo": {},
    "kto": {},
    "orpo": {},
    "simpo": {},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.slow
def test_preferences_are_read_twice_a_step(loss: Any) -> None:
    """Once for losses and norm, and once for the rewards, after the update was queued."""
    settings = FinetuneDpo(epochs=9, loss=loss, **LOSSES[loss])
    model = toy("llama", torch.bfloat16)
    lora(model)
    windows = windows_of((590, 610, 601, 40, 30, 620, 12, 600), lambda length: length // 2)
    more: dict[str, Any] = {"whole": loss == "orpo"}
    if loss == "kto":
        more["desirable"] = (True, False, True, False)
    reference = torch.zeros(len(windows)) if loss in WITH_REFERENCE else None
    answers = Answers(windows, lambda _: "f.jsonl:1", ((range(4), 1.0),), reference, **more)
    path = PreferencePath(on_stand_in(model), settings)
    learner = Learner(settings, AnswerBatches(answers, 1, 0, 2))
    refuse(seen_in_steps(model, TrainingTask(model, [learner], path)), {READ: 4})


@pytest.mark.slow
def test_the_next_step_is_made_before_the_present_one_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an accelerator alone: while it computes, the host is free."""
    order = list[str]()
    read, numbers = Batches._read, device.read_numbers

    def noted(batches: Batches, number: int) -> Any:
        order.append(f"make {number}")
        return read(batches, number)

    def noted_read(tensors: Sequence[torch.Tensor]) -> list[float]:
        order.append("read")
        return numbers(tensors)

    monkeypatch.setattr(Batches, "_read", noted)
    monkeypatch.setattr("pipeline.training.step.read_numbers", noted_read)
    model = toy("llama", torch.bfloat16)
    lora(model)
    step_of(model)
    assert order == ["make 0", *(word for n in range(1, 4) for word in (f"make {n}", "read"))]


def test_read_ahead_or_not_the_batches_are_the_same() -> None:
    ahead, plain = Batches(data(), 2, 0, 2), Batches(data(), 2, 0, 2)
    for number in range(2 * len(plain) + 1):
        for one, other in zip(ahead[number], plain[number], strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        ahead.read_ahead()
