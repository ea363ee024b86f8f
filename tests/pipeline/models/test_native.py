"""The kernels of native.c against plain torch: numbers, gradients, odd sizes, and where they cannot
be.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from pipeline.adapters.attach import adapter_layers, attach
from pipeline.adapters.config import AdapterSpec
from pipeline.models.kernels import native as module
from pipeline.models.kernels.cross_entropy import cross_entropy
from pipeline.models.kernels.decode import fast_decoding
from pipeline.models.kernels.llama_block import TrainingBlock, _Rotary, _SwiGLU
from pipeline.models.kernels.native import SWITCH, native, supports
from pipeline.models.kernels.packed_attention import register
from pipeline.models.kernels.rms_norm import RMSNorm
from pipeline.models.kernels.short_attention import FusedAttention, _ShortAttention, blocks
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.stages.methods.lora import FinetuneLora, Lora
from pipeline.training.batches import Batch, collate
from pipeline.training.memory.prediction import TensorMemoryMeter, predict_peak_memory
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.preferences.batches import AnswerBatch, Answers, answer_batch
from pipeline.training.preferences.losses import preference
from pipeline.training.step import loss_of
from pipeline.training.task import prepare_model
from tests.helpers.real import windows_of

BF16 = torch.bfloat16
needs_native = pytest.mark.skipif(native() is None, reason="needs a C compiler")
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "vocab_size": 101,
    "head_dim": 32,
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIGS = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "mistral": MistralConfig,
}
TARGETS = {
    "attention": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
}


def near(ours: Tensor, exact: Tensor, share: float = 0.01) -> None:
    """Within some roundings of bf16 of what wider numbers give."""
    assert (ours.double() - exact.double()).norm() <= share * exact.double().norm() + 1e-6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16).requires_grad_()


def compare(ours: Callable[..., Any], exact: Callable[..., Any], *inputs: Tensor) -> None:
    """Outputs and gradients of `ours` in bf16 are those of `exact` in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for function, given_ in ((ours, inputs), (exact, wide)):
        out = function(*given_)
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        towards = [torch.randn(x.shape).to(x.dtype) for x in outs]
        results.append([*outs, *torch.autograd.grad(outs, given_, towards)])
    for mine, theirs in zip(*results, strict=True):
        near(mine, theirs)


@needs_native
@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=5),
    st.sampled_from([(4, 2, 32), (3, 1, 64), (2, 2, 96)]),
)
def test_attention_is_that_of_plain_products(
    lengths: list[int], sizes: tuple[int, int, int]
) -> None:
    (H, G, K), T = sizes, sum(lengths)
    torch.manual_seed(T)
    compare(
        lambda *qkv: FusedAttention.apply(*qkv, tuple(lengths), 0.2),  # type: ignore[no-untyped-call]
        lambda *qkv: _ShortAttention.apply(
            *(x.transpose(1, 2) for x in qkv), tuple(blocks(lengths)), 0.2
        ),  # type: ignore[no-untyped-call]
        *(normal(1, T, heads, K) for heads in (H, G, G)),
    )


@needs_native
def test_layouts_of_queries_and_keys_do_not_matter() -> None:
    wide = normal(2, 9, 4, 64).detach()
    q, k = wide[..., 32:], wide.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :2, :32]
    assert not q.is_contiguous() and not k.is_contiguous()
    results = [
        FusedAttention.apply(*each, (9,), 0.2)  # type: ignore[no-untyped-call]
        for each in ((q, k, k), [x.contiguous() for x in (q, k, k)])
    ]
    assert torch.equal(*results)


@needs_native
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 9))
def test_passes_between_the_products_are_the_mathematics(rows: int, vectors: int) -> None:
    width = 32 * vectors
    torch.manual_seed(rows)
    compare(
        _SwiGLU.apply, lambda gate, up: F.silu(gate) * up, normal(rows, width), normal(rows, width)
    )
    weight = torch.nn.Parameter(normal(width).detach(), requires_grad=False)

    def norm(x: Tensor) -> Tensor:
        scale: Tensor = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (
            1 + weight.to(x.dtype)
        )
        return x * scale

    ours = RMSNorm(weight, 1e-5, 1.0)
    compare(ours, norm, normal(rows, width))
    compare(
        ours.of_sum, lambda x, y: (x + y, norm(x + y)), normal(rows, width), normal(rows, width)
    )
    cos, sin = (torch.randn(1, rows, width).to(BF16) for _ in range(2))

    def turned(*each: Tensor) -> tuple[Tensor, ...]:
        halves = [x.chunk(2, -1) for x in each]
        rolled = [torch.cat((-second, first), -1) for first, second in halves]
        tables = [table.unsqueeze(2).to(each[0].dtype) for table in (cos, sin)]
        return tuple(x * tables[0] + y * tables[1] for x, y in zip(each, rolled, strict=True))

    # a pair's two angles are equal, as in every model: a rotation's gradient is then the rotation
    # back
    cos, sin = (torch.cat([table[..., : width // 2]] * 2, -1) for table in (cos, sin))
    compare(
        lambda q, k: _Rotary.apply(q, k, cos, sin),  # type: ignore[no-untyped-call]
        turned,
        normal(1, rows, 3, width),
        normal(1, rows, 1, width),
    )


@needs_native
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 90), st.integers(0, 5))
def test_cross_entropy_of_any_number_of_rows_and_words(rows: int, words: int, scale: int) -> None:
    torch.manual_seed(words)
    logits = (torch.randn(rows, words) * 4**scale).to(BF16).requires_grad_()
    labels = torch.randint(words, (rows,))
    wide = logits.detach().double().requires_grad_()
    exact, losses = F.cross_entropy(wide, labels, reduction="none"), cross_entropy(logits, labels)
    near(losses.detach(), exact.detach(), 1e-5)
    for weights in (torch.ones(rows), torch.randn(rows)):
        sums = torch.dot(losses, weights), torch.dot(exact, weights.double())
        ours, theirs = (
            torch.autograd.grad(each, x, retain_graph=True)[0]
            for each, x in zip(sums, (logits, wide), strict=True)
        )
        near(ours, theirs)


@needs_native
def test_nan_stays_nan() -> None:
    x = torch.full((1, 2, 2, 32), float("nan"), dtype=BF16)
    assert FusedAttention.apply(x, x, x, (2,), 1.0).isnan().all()  # type: ignore[no-untyped-call]
    assert _SwiGLU.apply(x, x).isnan().all()  # type: ignore[no-untyped-call]
    assert cross_entropy(x[0, 0], torch.zeros(2, dtype=torch.long)).isnan().all()


@needs_native
@pytest.mark.parametrize("label", [-100, -1, 40])
def test_a_label_without_a_logit_is_an_error_and_no_access_beside_them(label: int) -> None:
    with pytest.raises(IndexError, match="not one of the 40 logits"):
        cross_entropy(torch.zeros(2, 40, dtype=BF16), torch.tensor([3, label]))


def made(kind: str) -> TransformersModel:
    torch.manual_seed(0)
    config = CONFIGS[kind](**SIZES, **HEADS, attention_dropout=0.0)
    return TransformersModel(
        AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation=register())
    )


def adapted(kind: str, targets: Sequence[str]) -> TransformersModel:
    model = made(kind)
    attach(model, AdapterSpec(4, 8, tuple(targets)), torch.float32)
    for _, layer in adapter_layers(model):
        torch.nn.init.normal_(layer.get_parameter("lora_B"), std=0.1)
    return model


def gradients(model: TransformersModel, lengths: Sequence[int]) -> list[Tensor]:
    """Hidden states of packed sequences, and the gradients of all that trains."""
    ids = torch.arange(sum(lengths))[None] % 97
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = model.hidden_states(ids, positions, lengths)
    torch.manual_seed(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [hidden, *torch.autograd.grad(hidden, trained, torch.randn(hidden.shape).to(BF16))]


@needs_native
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.slow
def test_a_fused_block_has_the_outputs_and_gradients_of_the_original(
    kind: str, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.adapters.lora.FOLD_BELOW", 0)
    theirs = adapted(kind, TARGETS[targets]).train()
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).float()
    ours.prepare_cpu_training()
    assert all(isinstance(block, TrainingBlock) for block in ours.blocks)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, plain, wanted in zip(
        *(gradients(each, [7, 30, 3]) for each in (ours, theirs, exact)), strict=True
    ):
        error, usual = ((x.float() - wanted).norm() for x in (mine, plain))
        assert error <= max(2 * usual, 0.02 * wanted.norm())
    # beyond LONGEST
    for mine, plain in zip(*(gradients(each, [600, 5]) for each in (ours, theirs)), strict=True):
        near(mine, plain, 0.1)
    again = gradients(ours, [7, 30, 3])
    assert all(map(torch.equal, again, gradients(ours, [7, 30, 3])))
    ours.checkpoint_blocks("full")
    assert all(map(torch.equal, again, gradients(ours, [7, 30, 3])))


def simpo(model: TransformersModel, batch: Batch) -> Tensor:
    assert isinstance(batch, AnswerBatch)
    return preference(model, batch, FinetuneDpo(loss="simpo")).loss


@needs_native
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_last_block_computes_only_labelled_rows(
    kind: str, checkpointing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.adapters.lora.FOLD_BELOW", 0)
    model = adapted(kind, TARGETS["all"]).train()
    prepare_model(model, checkpointing)
    index, lengths = torch.tensor([2, 3, 8, 20, 39]), [7, 30, 3]
    ids, positions = (
        torch.arange(40)[None] % 97,
        torch.cat([torch.arange(length) for length in lengths])[None],
    )
    norm, rows = model.blocks[-1].get_submodule("post_attention_layernorm"), list[int]()
    assert isinstance(norm, RMSNorm)
    of_sum = norm.of_sum

    def counted(x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(x.shape[1])
        return of_sum(x, added)

    monkeypatch.setattr(norm, "of_sum", counted)

    def of_labels(states: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        towards = torch.randn(len(index), SIZES["hidden_size"]).to(BF16)
        out = states()
        return [
            out,
            *torch.autograd.grad(out, [p for p in model.parameters() if p.requires_grad], towards),
        ]

    def labelled() -> list[Tensor]:
        return of_labels(lambda: model.labelled_states(ids, positions, lengths, index))

    plain = of_labels(
        lambda: model.hidden_states(ids, positions, lengths)[0].index_select(0, index)
    )
    assert set(rows) == {40}
    rows.clear()
    for mine, expected in zip(labelled(), plain, strict=True):
        near(mine, expected, 0.02)
    assert set(rows) == {5}
    assert all(map(torch.equal, labelled(), labelled()))
    # dropout draws its numbers for every row, as it does in a sweep
    model.blocks[-1].get_submodule("self_attn.o_proj").keep = lambda x: torch.ones_like(
        x, dtype=torch.bool
    )  # type: ignore[assignment]
    rows.clear()
    near(labelled()[0], plain[0], 0.02)
    assert set(rows) == {40}
    model.eval()
    assert labelled()[0].shape == plain[0].shape


@needs_native
@pytest.mark.usefixtures("restored_threads")
def test_threads_do_not_change_a_number() -> None:
    q, k = normal(1, 90, 4, 32), normal(1, 90, 2, 32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = FusedAttention.apply(q, k, k, (50, 40), 0.2)  # type: ignore[no-untyped-call]
        results.append([out, *torch.autograd.grad(out, [q, k], torch.ones_like(out))])
    assert all(map(torch.equal, *results))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_native
def test_blocks_that_combine_the_same_parts_otherwise_keep_their_forward() -> None:
    model = made("gemma").train()  # its activation is GELU
    model.prepare_cpu_training()
    assert not any(isinstance(block, TrainingBlock) for block in model.blocks)


@needs_native
@pytest.mark.parametrize("window", [8, None])
@torch.no_grad()
def test_a_window_of_the_config_hides_keys_in_training_too(window: int | None) -> None:
    """Mistral's attention reads it there, and has no attribute of that name."""
    config = CONFIGS["mistral"](**SIZES, **HEADS, sliding_window=window)
    whole = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation=register())
    model, ids = TransformersModel(whole).train(), torch.arange(40)[None]
    before = model.hidden_states(ids)
    model.prepare_cpu_training()
    assert model.trains_natively == (window is None)
    near(model.hidden_states(ids), before, 0.05)


@needs_native
@torch.no_grad()
def test_queries_that_grow_with_their_position_do_so_in_training_too() -> None:
    """Ministral 3's, from a position on that no short probe reaches."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "llama_4_scaling_beta": 2.0}
    sizes = {**SIZES, **HEADS, "max_position_embeddings": 64, "sliding_window": None}
    config = AutoConfig.for_model(
        "ministral3", rope_parameters={**rope, "original_max_position_embeddings": 16}, **sizes
    )
    whole = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation=register())
    for p in whole.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    model, ids = TransformersModel(whole).train(), torch.arange(40)[None]
    before = model.hidden_states(ids)
    model.prepare_cpu_training()
    near(model.hidden_states(ids), before, 0.1)


@needs_native
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.slow
def test_a_steps_memory_is_what_the_calculator_predicts(checkpointing: Any, pairs: bool) -> None:
    wide = {
        **SIZES,
        "hidden_size": 192,
        "intermediate_size": 512,
        "vocab_size": 4096,
        "model_type": "llama",
    }
    model = from_config({**wide, **HEADS}, BF16).train().requires_grad_(False)
    attach(model, AdapterSpec(8, 16, TARGETS["attention"]), BF16)
    prepare_model(model, checkpointing)
    windows = windows_of((60, 90, 70, 140))
    batch = (
        answer_batch(Answers(windows, str, ((range(2), 1.0),)), range(2))
        if pairs
        else collate(windows)
    )
    optimizer, live = FlatOptimizer(model), TensorMemoryMeter()
    for context in (nullcontext(), live):
        live.watch([*model.parameters(), *model.buffers(), *optimizer.tensors()])
        with context:
            torch.autograd.backward(simpo(model, batch) if pairs else loss_of(model, batch))
            optimizer.collect_gradients()
            optimizer.step(1e-3)
    training = FinetuneLora(
        precision="bf16", adapter_precision="bf16", gradient_checkpointing=checkpointing
    )
    predicted = predict_peak_memory(model, Lora(8, 16.0, TARGETS["attention"]), training, batch)
    assert predicted == pytest.approx(live.peak, rel=0.03)


@needs_native
def test_fast_decoding_takes_over_fused_blocks() -> None:
    model = made("llama").eval()
    ids = torch.arange(5)[None]
    expected = model(ids)
    model.prepare_cpu_training()
    with torch.no_grad(), fast_decoding(model) as replaced:
        if not replaced:
            pytest.skip("this build of torch packs no weights")
        cache = model.new_cache()
        model(ids[:, :4], cache=cache)
        near(model(ids[:, 4:], cache=cache), expected[:, 4:], 0.05)
    near(model(ids), expected, 0.02)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, in which the library is compiled anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    yield tmp_path / "lora-workbench" / "native"
    native.cache_clear()


@needs_native
@pytest.mark.slow
def test_the_library_is_compiled_once_and_for_this_source(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native() is not None
    (first,) = fresh.iterdir()
    stamp = first.stat().st_mtime_ns
    native.cache_clear()
    assert native() is not None and first.stat().st_mtime_ns == stamp
    changed = fresh.parent / "native.c"
    changed.write_text(module.SOURCE.read_text() + "\n")
    monkeypatch.setattr(module, "SOURCE", changed)
    native.cache_clear()
    assert native() is not None and len([*fresh.iterdir()]) == 2


def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert native() is None


@pytest.mark.parametrize("how", ["switch", "compiler", "error"])
def test_without_the_library_plain_torch_computes(
    how: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "switch":
        monkeypatch.setenv(SWITCH, "0")
    elif how == "compiler":
        monkeypatch.setenv("PATH", "")
    else:
        broken = fresh.parent.parent / "broken.c"
        broken.write_text("int broken(")
        monkeypatch.setattr(module, "SOURCE", broken)
    assert native() is None and not supports(torch.zeros(16, dtype=BF16))
    model = adapted("llama", TARGETS["all"]).train()
    model.prepare_cpu_training()
    assert all(x.isfinite().all() for x in gradients(model, [5, 3]))
