"""Retention loss: the divergence from the base (the adapter disabled), against a second copy of the
base.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import Window
from pipeline.data.windows import InMemoryDataset
from pipeline.errors import UserError
from pipeline.models.load import load_base
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import Job, Note
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.registry import open_project
from pipeline.training.batches import Batch, Batches, collate
from pipeline.training.losses import CHUNK
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.retention import COMPLETION, RetentionLoss, load_retention_texts
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.json_files import write_jsonl
from tests.helpers.projects import STAGES, make_base, played
from tests.helpers.real import (
    gradient_of,
    listed,
    loss_alone,
    run_stage,
    stock,
    toy,
    trained,
    windows_of,
)

LENGTHS = (7, 2, 12, 5)
SPECS: dict[str, dict[str, Any]] = {
    "adapter alone": {},
    "embeddings and head in full": {"saved": ("embed_tokens", "lm_head")},
    "new rows": {"rows": {"embed_tokens": (90, 91, 92), "lm_head": (90, 91, 92)}},
    "dora": {"dora": True},
}


def texts(lengths: tuple[int, ...] = LENGTHS) -> InMemoryDataset:
    """Retention texts; every token has a label."""
    return listed([Window(0, w.ids, w.ids) for w in windows_of(lengths, seed=5)])


def adapted(
    name: str = "qwen3", dtype: torch.dtype = torch.float32, **spec: Any
) -> TransformersModel:
    torch.manual_seed(1)
    model = toy(name, dtype, std=0.2, tie_word_embeddings=False)
    attach(model, AdapterSpec(3, 6.0, ("q_proj", "v_proj"), **spec), torch.float32)
    return model


def far_from(base: Any, model: nn.Module, found: InMemoryDataset) -> Tensor:
    """Mean KL(base‖model), a text at a time, from all logits of two models."""
    total, tokens = torch.zeros(()), 0
    for window in found.windows:
        ids = torch.tensor([window.ids])
        with torch.no_grad():
            p = base(input_ids=ids).logits[0].float().log_softmax(-1)
        q = model(ids)[0].float().log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
        tokens += len(window.ids)
    return total / tokens


def settings(**changes: Any) -> FinetuneLora:
    return FinetuneLora(
        retention_data="t",
        **{"retention_weight": 3.0, "retention_batch_size": len(LENGTHS), **changes},
    )


def one_batch(found: InMemoryDataset) -> Batch:
    return collate(found.windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_an_adapter_of_zeros_is_exactly_its_base_and_is_pulled_nowhere(
    spec: str, dtype: torch.dtype
) -> None:
    model = adapted(dtype=dtype, **SPECS[spec])
    retain = RetentionLoss(model.train(), texts(), settings())
    optimizer = FlatOptimizer(model)
    divergence = retain.divergence(one_batch(texts()))
    rounding = 1e-9 if spec == "new rows" else 0  # a product of three rows instead of all
    assert abs(divergence.item()) <= rounding
    torch.autograd.backward(divergence)
    assert optimizer.collect_gradients().item() < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, (50, 60, 55, 64, 41, 3)], ids=["at once", "in chunks"]
)
@pytest.mark.parametrize("spec", SPECS)
def test_divergence_and_gradient_are_those_of_two_models_side_by_side(
    spec: str, lengths: tuple[int, ...], how: Any
) -> None:
    """After some training steps, so that every trainable parameter differs from the base; loss plus
    divergence.
    """
    model, base, kept = adapted(**SPECS[spec]), stock(toy("qwen3", std=0.2)), texts(lengths)
    model.checkpoint_blocks(how)
    weighted = settings(retention_batch_size=len(lengths), epochs=3, learning_rate=2e-2)
    retain = RetentionLoss(model, kept, weighted)
    learned = windows_of((6, 9, 4), seed=2)
    batches = Batches(listed(learned), 3, 0)
    _, optimizer = trained(model, batches, weighted, retain=retain)
    assert (sum(lengths) > CHUNK) == (lengths != LENGTHS)
    other = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = gradient_of(model, batches[0], optimizer, retain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), (
        "the adapter is enabled again"
    )

    loss = torch.stack([loss_alone(_as_theirs(other), window) for window in learned]).sum() / 19
    far = far_from(base, other, kept)
    assert far > 1e-3
    other.zero_grad()
    torch.autograd.backward(loss + 3.0 * far)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.divergence == pytest.approx(far.item(), rel=1e-4)
    expected = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = expected[name]
            assert p.grad is not None and wanted is not None
            assert_close(
                p.grad, wanted, rtol=2e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-8, msg=name
            )


def _as_theirs(model: TransformersModel) -> Any:
    """Called as transformers' models are."""

    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    return lambda input_ids: Answer(model(input_ids))


def test_a_model_that_cannot_read_end_to_end_retains_one_text_at_a_time() -> None:
    one, other = adapted("llama", saved=("lm_head",)), adapted("llama", saved=("lm_head",))
    other.supports_packing = False
    results = []
    for model in (one, other):
        torch.manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.normal_(std=0.3)
        retain = RetentionLoss(model.train(), texts(), settings())
        results.append(gradient_of(model, [one_batch(texts((3, 5)))], FlatOptimizer(model), retain))
    assert results[0].divergence == pytest.approx(results[1].divergence, rel=1e-4)
    assert results[0].norm == pytest.approx(results[1].norm, rel=1e-4)
    assert results[0].divergence and results[0].divergence > 1e-4


def test_every_text_has_its_turn_and_a_step_has_the_same_ones_whenever_it_comes() -> None:
    found = texts((2, 3, 4, 5, 6, 7, 8))
    model = adapted()
    one, other = (RetentionLoss(model, found, settings(retention_batch_size=3)) for _ in range(2))
    turns = [one.batches.rows(step) for step in range(6)]
    assert [other.batches.rows(step) for step in (5, 2, 0)] == [turns[5], turns[2], turns[0]]
    for epoch in (turns[:3], turns[3:]):
        assert sorted(n for step in epoch for batch in step for n in batch) == list(range(7))


# The stage


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("retain") / "p", FAMILIES["llama"]))


LORA = [
    "finetune_lora.data=data/asked.jsonl",
    "finetune_lora.epochs=15",
    "finetune_lora.learning_rate=0.02",
]
KEPT = ["finetune_lora.retention_data=data/old.jsonl", "finetune_lora.retention_weight=20"]


def test_what_is_retained_stays_closer_to_the_base_and_the_log_says_how_close(
    project: Path,
) -> None:
    run_stage(project, "finetune_lora", [*LORA, *KEPT])
    steps = read_steps(project / "artifacts/lora_adapter/loss.csv")
    with_help = steps[-1].divergence
    assert steps[0].divergence == 0
    assert with_help is not None and with_help > 0
    run_stage(project, "finetune_lora", [*LORA, *KEPT[:1], "finetune_lora.retention_weight=1e-9"])
    without = read_steps(project / "artifacts/lora_adapter/loss.csv")[-1]
    assert without.divergence is not None and with_help < without.divergence / 3
    assert steps[-1].loss < 0.5 * steps[0].loss, "the new texts are learned nevertheless"


def test_a_prompt_alone_is_completed_by_the_base_itself(project: Path) -> None:
    """Greedily, as in transformers' generate, before training."""
    prompts = ["The currency of", "Two and"]
    lines = [{"prompt": prompts[0]}, {"text": "The yen."}, {"prompt": prompts[1]}]
    write_jsonl(project / "data/mine.jsonl", lines)
    overrides = ["finetune_lora.retention_data=data/mine.jsonl", "finetune_lora.retention_weight=1"]
    whole = open_project(project / "params.yaml", overrides)
    folder = project / "artifacts/expanded"
    job = Job(whole, STAGES["finetune_lora"], project / "out", project / "runs", "", 100)
    found, notes = played(load_retention_texts(job, whole.params.finetune_lora, load_base(folder)))
    assert notes == [Note("finetune_lora: the base completes 2 prompts of data/mine.jsonl")]
    assert found is not None and [found.location(n) for n in range(3)] == [
        f"data/mine.jsonl:{n}" for n in (1, 2, 3)
    ]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    for number, prompt in ((0, prompts[0]), (2, prompts[1])):
        asked = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**asked, max_new_tokens=COMPLETION, do_sample=False)[0].tolist()
        said = said[:-1] if said[-1] == tokenizer.eos_token_id else said
        assert list(found[number].ids) == said and len(said) > asked["input_ids"].shape[1]
        assert found[number].labels == found[number].ids
    assert list(found[1].ids) == tokenizer("The yen.")["input_ids"], "without an end"


def test_a_prompt_alone_is_cut_and_refused_as_a_text_is(project: Path) -> None:
    prompt = "The currency of " * 30
    write_jsonl(project / "data/mine.jsonl", [{"prompt": prompt}])
    changes = ["retention_data=data/mine.jsonl", "retention_weight=1", "max_length=20"]
    base = load_base(project / "artifacts/expanded")

    def found(*given: str) -> Any:
        overrides = [f"finetune_lora.{change}" for change in given]
        whole = open_project(project / "params.yaml", overrides)
        job = Job(whole, STAGES["finetune_lora"], project / "out", project / "runs", "", 100)
        return played(load_retention_texts(job, whole.params.finetune_lora, base))[0]

    ids = found(*changes)[0].ids
    assert ids[:20] == base.tokenizer.encode(prompt)[:20] and len(ids) <= 20 + COMPLETION
    with pytest.raises(
        UserError, match=r"mine\.jsonl:1: \d+ tokens .* more than the model's 64 pos"
    ):
        found(*changes[:2])


def test_a_weight_without_texts_is_refused(project: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"retention_weight is set, but finetune_lora.retention_data is not. Set it to a data file",
    ):
        run_stage(project, "finetune_lora", ["finetune_lora.retention_weight=2"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_that_moved_to_a_gpu_still_has_its_base() -> None:
    model = adapted(saved=("embed_tokens", "lm_head"))
    retain = RetentionLoss(model, texts(), settings())
    model.cuda()
    assert retain.divergence(one_batch(texts()).to(torch.device("cuda"))).item() == pytest.approx(
        0, abs=1e-6
    )
