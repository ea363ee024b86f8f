"""The simulated step against a traced one, phase by phase, on small models whose activations are
most of it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.calc.architecture import Architecture
from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.method import trained_split
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.step import Step, run_step
from pipeline.calc.tape import ROUNDING
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.lora import COUNTED as LORA
from pipeline.stages.methods.lora import Lora
from pipeline.stages.registry import COUNTED
from pipeline.training.losses import chunked_mean, cross_entropy, divergence
from pipeline.training.memory import trace
from pipeline.training.memory.prediction import TensorMemoryMeter
from tests.helpers.delta_net import use_delta_net_kernels

SIZES = {
    **{"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0}
DELTA = {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32},
    "gpt2": {"n_embd": 128, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 256},
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "qwen3_moe": {"head_dim": 32, **EXPERTS},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 4},
    "glm4_moe": {"head_dim": 32, "use_qk_norm": True, **ROUTED},
    "deepseek_v3": {
        **{
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 48,
        },
        **{"n_group": 2, "topk_group": 1, **ROUTED, "num_key_value_heads": 4},
    },
    "llama4_text": {"head_dim": 32, "num_local_experts": 4, "intermediate_size_mlp": 256},
    "qwen3_5_text": {"head_dim": 32, **DELTA, "linear_value_head_dim": 48},
    "qwen3_5_moe_text": {"head_dim": 32, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 64},
    "gemma4_text": {
        **{
            "head_dim": 32,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
        },
        **{
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            **EXPERTS,
            "top_k_experts": 2,
        },
    },
}


class Phases(NamedTuple):
    """Bytes of a step beyond the weights: peak of forward, what it keeps for backward, peak of
    that, what is left.
    """

    forward: int
    kept: int
    backward: int
    gradients: int


def config_of(family: str, blocks: int, **changes: Any) -> dict[str, Any]:
    """`blocks` equal ones."""
    config = {
        "model_type": family,
        **SIZES,
        **FAMILIES.get(family, {}),
        "num_hidden_layers": blocks,
        **changes,
    }
    if family == "gpt2":
        config = {
            "model_type": family,
            "vocab_size": config["vocab_size"],
            "n_layer": blocks,
            **FAMILIES[family],
        }
        config["n_inner"] = changes.get("n_inner")
    if family in ("qwen3_5_text", "qwen3_5_moe_text", "gemma4_text"):
        config["layer_types"] = [config.pop("layer_type", "full_attention")] * blocks
    if family == "llama4_text":
        config |= {"moe_layers": list(range(blocks)), "no_rope_layers": [1] * blocks}
    return config


def traced(config: Mapping[str, Any], method: Any, run: TrainingConfig) -> Phases:
    live = TensorMemoryMeter()
    with FakeTensorMode():
        model = trace._build_model(config, run)
        trace._make_trainable(model, method, torch.float32)
        model.train().checkpoint_blocks(run.checkpointing)  # type: ignore[arg-type]
        ids, labels = (torch.zeros(run.batch, run.sequence, dtype=torch.long) for _ in range(2))
        live.watch([*model.parameters(), *model.buffers(), ids, labels])
        with live:
            start = live.now
            loss = loss_of(model, ids, labels, run)
            forward, kept = live.peak - start, live.now - start
            live.peak = live.now
            torch.autograd.backward(loss)
    return Phases(forward, kept, live.peak - start, live.now - start)


def loss_of(model: Any, ids: Tensor, labels: Tensor, run: TrainingConfig) -> Tensor:
    if run.loss == "full":
        return F.cross_entropy(
            model.logits(model.hidden_states(ids)).float().flatten(0, 1), labels.flatten()
        )
    trained = [p for p in model.head.parameters() if p.requires_grad]
    if run.loss == "chunked":
        rows, targets = model.hidden_states(ids).flatten(0, 1), labels.flatten()
        return chunked_mean(cross_entropy(model.logits), rows, targets, run.chunk, trained)
    with torch.no_grad():
        before = model.hidden_states(ids).flatten(0, 1)
    rows = model.hidden_states(ids).flatten(0, 1)
    return chunked_mean(divergence(model.logits, model.logits), rows, before, run.chunk, trained)


def simulated(config: Mapping[str, Any] | Architecture, method: Any, run: TrainingConfig) -> Phases:
    step = Step(
        config if isinstance(config, Architecture) else architecture(config, "small"), method, run
    )
    tape, ids = step.tape, 2 * -(-8 * run.tokens // ROUNDING) * ROUNDING
    loss = step.forward()
    forward, kept = tape.peak, sum(tape.live.values())
    tape.peak = -1
    tape.backward(loss)
    return Phases(forward - ids, kept - ids, tape.peak - ids, sum(tape.live.values()) - ids)


def run_of(family: str, **changes: Any) -> TrainingConfig:
    # values as wide as keys for torch's fused kernel
    attention = "eager" if family == "deepseek_v3" else "sdpa"
    return replace(
        TrainingConfig(2, 256, checkpointing="none", attention=attention, trainer="torch"),
        **changes,
    )


KINDS = {"lora": LORA, "full": FULL}
STEPS = [
    (family, kind) for family in FAMILIES for kind in KINDS if (family, kind) != ("gpt2", "lora")
]
# The routers of these two compute in fp32 and keep a copy of their input if they train, which is
# not counted: of blocks as narrow as these a larger share than of real ones. The backward of
# experts is a few tensors off in three families.
KEPT = {("glm4_moe", "full"): 0.08, ("deepseek_v3", "full"): 0.03}
PLAIN = ("llama", "gemma2", "gemma3_text", "phi3", "olmo2", "qwen3_moe")
BACKWARD = {"glm4_moe": 0.08, "deepseek_v3": 0.04, "llama4_text": 0.12}


@pytest.mark.parametrize(("family", "kind"), STEPS)
@pytest.mark.sampled(3)
def test_a_block_keeps_and_needs_what_a_traced_block_does(family: str, kind: str) -> None:
    """What a second block adds is a block's own, and not of the embeddings, the tables or the
    loss.
    """
    run = run_of(family)
    (one, two), (few, more) = (
        [phases(config_of(family, blocks), KINDS[kind], run) for blocks in (1, 2)]
        for phases in (simulated, traced)
    )
    experts = "num_experts_per_tok" in FAMILIES[family] or family in ("gpt_oss", "llama4_text")
    tolerance = KEPT.get((family, kind), 0.02 if experts else 0.01)
    assert two.kept - one.kept == pytest.approx(more.kept - few.kept, rel=tolerance)
    # LayerNorm's two vectors and a router's bias are rounded up separately
    rounding = 0 if kind == "lora" or family in PLAIN else 0.01
    assert two.gradients - one.gradients == pytest.approx(
        more.gradients - few.gradients, rel=rounding
    )
    assert one.backward == pytest.approx(few.backward, rel=BACKWARD.get(family, 0.03))


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_neox", "phi3", "deepseek_v3", "qwen3_5_text"]
)
def test_backward_through_attention_needs_what_the_traced_one_does(family: str) -> None:
    """With few inner neurons attention is at the peak, not the feed-forward behind it."""
    config, run = (
        config_of(family, 1, intermediate_size=16, moe_intermediate_size=16),
        run_of(family),
    )
    ours, theirs = simulated(config, LORA, run), traced(config, LORA, run)
    assert ours.backward == pytest.approx(theirs.backward, rel=0.02)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "full"), ("gpt_neox", "full"), ("opt", "lora"), ("gemma2", "lora")],
)
def test_backward_through_a_wide_feed_forward_needs_what_the_traced_one_does(
    family: str, kind: str
) -> None:
    """Its activation is at the peak: GPT-2's is several operations."""
    config, run = (
        config_of(family, 1, intermediate_size=4096, ffn_dim=4096, n_inner=4096),
        run_of(family),
    )
    ours, theirs = simulated(config, KINDS[kind], run), traced(config, KINDS[kind], run)
    assert ours.kept == pytest.approx(theirs.kept, rel=0.01)
    assert ours.backward == pytest.approx(theirs.backward, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_our_step_needs_what_the_traced_one_does(family: str, cpu: bool, kind: str) -> None:
    """With our kernels for norms, and on a GPU for gated feed-forwards too."""
    run = run_of(family, trainer="ours", cpu=cpu)
    config = config_of(family, 2, intermediate_size=1024)
    formula = predict(architecture(config, family), KINDS[kind], run).peak
    assert formula == pytest.approx(trace.traced_peak(config, KINDS[kind], run), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_delta_net_keeps_and_needs_what_the_traced_one_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few inner neurons and wide heads its backward is at the peak: the kernel's own tensors,
    not kept ones.
    """
    use_delta_net_kernels(monkeypatch)
    run = run_of("qwen3_5_text")
    wide = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_value_heads": 16}
    for changes in ({"intermediate_size": 256}, {"intermediate_size": 16, **wide}):
        config = config_of("qwen3_5_text", 1, layer_type="linear_attention", **changes)
        ours, theirs = simulated(config, KINDS[kind], run), traced(config, KINDS[kind], run)
        assert ours.kept == pytest.approx(theirs.kept, rel=0.01)
        assert ours.backward == pytest.approx(theirs.backward, rel=0.03)
        assert ours.forward == pytest.approx(theirs.forward, rel=0.03)


CAPPED = {"final_logit_softcapping": 30.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(
            ("llama", {}),
            ("granite", {}),
            ("gemma2", CAPPED),
            ("gemma2", {"final_logit_softcapping": None}),
        ),
        *(("gemma4_text", CAPPED), ("gemma4_text", {"final_logit_softcapping": None})),
    ],
)
def test_the_loss_keeps_and_needs_what_the_traced_one_does(
    family: str, changes: dict[str, Any]
) -> None:
    """With many words, logits are most of it."""
    run, method = run_of(family), LORA if changes else FULL
    config = config_of(family, 1, vocab_size=8192, **changes)
    ours, theirs = simulated(config, method, run), traced(config, method, run)
    assert ours.kept == pytest.approx(theirs.kept, rel=0.01)
    assert ours.backward == pytest.approx(theirs.backward, rel=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_normalized_have_no_weight_that_trains(kind: str) -> None:
    """Gemma 4 without experts, with as many heads of keys as of queries."""
    changes = {"enable_moe_block": False, "num_global_key_value_heads": 4}
    run, configs = (
        run_of("gemma4_text"),
        [config_of("gemma4_text", blocks, **changes) for blocks in (1, 2)],
    )
    (one, two), (few, more) = (
        [phases(c, KINDS[kind], run) for c in configs] for phases in (simulated, traced)
    )
    assert two.kept - one.kept == pytest.approx(more.kept - few.kept, rel=0.02)
    assert two.gradients - one.gradients == more.gradients - few.gradients


def test_our_kernels_on_a_cpu_keep_no_copies_in_fp32() -> None:
    """native.c: the loss keeps the gradient of the logits in their dtype, norms and SwiGLU work in
    place.
    """
    shapes = architecture(config_of("llama", 1, vocab_size=8192), "small")
    native, plain = (
        simulated(
            structs.replace(shapes, blocks=()),
            FULL,
            run_of("llama", trainer="ours", cpu=True, native=native),
        )
        for native in (True, False)
    )
    words = 512 * 8192
    assert plain.kept - native.kept == words * (4 - 2)  # log-probabilities in fp32 instead
    assert native.kept == pytest.approx(words * 2, rel=0.1)
    block, copies = (
        simulated(shapes, FULL, run_of("llama", trainer="ours", cpu=True, native=native))
        for native in (True, False)
    )
    assert block.kept < copies.kept - words * (4 - 2), (
        "gate and up alone, without the activation between them"
    )
    assert block.forward < copies.forward and block.backward < copies.backward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("loss", "chunk"), [("chunked", 64), ("chunked", 192), ("divergence", 64), ("divergence", 512)]
)
def test_a_loss_in_chunks_needs_what_the_traced_one_does(loss: str, chunk: int, kind: str) -> None:
    """Its peak is in forward, where the gradient of each chunk is computed."""
    run = run_of("llama", loss=loss, chunk=chunk)
    config = config_of("llama", 1, vocab_size=8192)
    ours, theirs = simulated(config, KINDS[kind], run), traced(config, KINDS[kind], run)
    assert ours.forward == pytest.approx(
        theirs.forward, rel=0.015 if loss == "divergence" else 0.005
    )
    if chunk < run.tokens:  # a single chunk is not computed in forward, and less is counted
        assert ours.kept == pytest.approx(theirs.kept, rel=0.03)


def test_a_fused_loss_has_the_logits_of_a_chunk_and_keeps_the_gradient_of_its_input() -> None:
    run = run_of("llama", loss="fused", label_share=0.75)
    shapes = structs.replace(
        architecture(config_of("llama", 1, vocab_size=262144), "small"), blocks=()
    )
    found, plain = (
        simulated(shapes, FULL, replace(run, loss=loss)) for loss in ("fused", "labels")
    )
    labels = 384
    # the logits of 256 rows; x and its rows that have labels
    assert found.forward - found.kept == 2 * (256 * 262144 + 512 * 128 + labels * 128)
    assert (
        plain.kept - found.kept == labels * 262144 * 4
    )  # instead of the log-probabilities in fp32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "sequence"), [(4, 64), (8, 128)])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_attention_to_short_sequences_needs_what_the_traced_one_does(
    family: str, batch: int, sequence: int, kind: str
) -> None:
    """Our products on a CPU, which save the weights of all tokens."""
    run = run_of(
        family, trainer="ours", cpu=True, attention="short", batch=batch, sequence=sequence
    )
    config = config_of(family, 2, intermediate_size=64)
    formula = predict(architecture(config, family), KINDS[kind], run).peak
    assert formula == pytest.approx(trace.traced_peak(config, KINDS[kind], run), rel=0.07)


# what a method adds


def test_logits_of_new_rows_are_kept_beside_those_of_the_others() -> None:
    """PEFT's trainable rows: embedding and head have a few more, whose logits are joined with the
    base's.
    """
    config, run = config_of("llama", 1, vocab_size=8192, tie_word_embeddings=False), run_of("llama")
    plain, few, many = (simulated(config, Lora(new_rows=rows), run) for rows in (0, 512, 1024))
    # of both tables
    assert few.gradients - plain.gradients == many.gradients - few.gradients == 2 * 512 * 128 * 4
    assert plain.kept < few.kept == many.kept and plain.backward <= few.backward, (
        "the sum of both is kept by neither"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager", "short"])
@pytest.mark.parametrize("name", [*COUNTED, "rows", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "qwen3_moe"])
def test_every_method_frees_all_but_the_gradients_of_what_it_trains(
    family: str, name: str, attention: str
) -> None:
    special = {
        "rows": Lora(embeddings="new_rows", new_rows=8),
        "dora": Lora(dora=True, lora_dropout=0.1),
    }
    method = special.get(name) or COUNTED[name]
    shapes, run = architecture(config_of(family, 2), family), run_of(family, attention=attention)
    for checkpointing in ("none", "full"):
        live = run_step(shapes, method, replace(run, checkpointing=checkpointing)).live
        added, base = trained_split(shapes, method)
        assert live["activations"] == live["logits"] == 0
        assert live["gradients"] == pytest.approx(4 * added + 2 * base, rel=0.02, abs=64 * ROUNDING)
