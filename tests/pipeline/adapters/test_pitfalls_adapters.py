"""What goes wrong with adapters and merges in other tools, by the numbers of our list; ours does
the right thing.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.inference.engine import load
from pipeline.inference.model_pool import ModelPool
from pipeline.models.base import CausalLM
from pipeline.models.quantized_linear import QuantizedLinear, quantize
from pipeline.project.params.sections import Quantization
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint, edit_adapter_config, token_ids
from tests.helpers.json_files import read_json
from tests.helpers.projects import folder_bytes
from tests.helpers.real import toy, with_lora
from tests.helpers.side_by_side import logits, ours, theirs
from tests.pipeline.adapters.test_peft import foreign
from tests.pipeline.training.test_training_parts import step_of

BASE, ADAPTER = Path("artifacts/expanded"), Path("artifacts/lora_adapter")  # in a project
OLD, ALL, WIDTH = 74, 99, 64  # rows before and after expand_vocab
ENDS = ("embed_tokens", "lm_head")
IDS = token_ids(OLD, 4, 9)
NEW_IDS = torch.arange(OLD, ALL)[None]
CPU = torch.device("cpu")


def finetune(cli: Lora, project: Path, *overrides: str) -> tuple[int, str, str]:
    """`lora finetune lora`, two epochs."""
    words = [word for one in ("epochs=2", *overrides) for word in ("--set", f"finetune_lora.{one}")]
    return cli("finetune", "lora", "--force", *words, cwd=project)


# 1 and 2: what does not fit is refused


def test_pitfall_1_a_target_that_matches_nothing_is_refused(cli: Lora, project: Path) -> None:
    before = folder_bytes(project / ADAPTER)
    code, out, err = finetune(cli, project, "target_modules=[q_proj, gate_proj]")
    assert (code, out) == (1, "")
    assert (
        "'gate_proj' matches no linear layer. The model has fc1, fc2, k_proj, lm_head, out_proj"
        in err
    )
    assert folder_bytes(project / ADAPTER) == before


def test_pitfall_1_an_adapter_with_such_a_target_is_refused(cli: Lora, project: Path) -> None:
    foreign(project / ADAPTER)
    edit_adapter_config(
        project / ADAPTER, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "gate_proj"]
    )
    code, out, err = cli("adapters", "verify", str(ADAPTER), cwd=project)
    assert (code, out) == (1, "")
    assert "'gate_proj' matches no linear layer" in err


def renamed(project: Path) -> None:
    values = {
        name.replace("decoder", "encoder"): value
        for name, value in foreign(project / ADAPTER).items()
    }
    save_file(values, project / ADAPTER / "adapter_model.safetensors")


def with_more_layers(project: Path) -> None:
    values = foreign(project / ADAPTER)
    more = {name.replace("layers.1.", "layers.2."): value.clone() for name, value in values.items()}
    save_file(values | more, project / ADAPTER / "adapter_model.safetensors")


def on_another_base(project: Path) -> None:
    path = project / BASE / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            renamed,
            "does not fit: missing base_model.model.model.decoder.embed_tokens.weight and 16 more",
        ),
        (
            with_more_layers,
            "does not fit: not expected base_model.model.model.decoder.layers.2.self_attn.k_proj",
        ),
        (on_another_base, "was trained on another base: the sha256 of its tensors is"),
    ],
)
def test_pitfall_2_an_adapter_that_does_not_fit_gives_no_answer(
    cli: Lora, project: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(project)
    code, out, err = cli("prompt", "die katze sitzt", "--adapter", str(ADAPTER), cwd=project)
    assert (code, out) == (1, ""), "never the base's answer in its place"
    assert reason in err


# 3: tied embeddings

TIED = {
    "linears": AdapterSpec(3, 6.0, ("q_proj",)),
    "rows": AdapterSpec(3, 6.0, ("q_proj",), rows={"embed_tokens": (5, 41)}),
    "in full": AdapterSpec(3, 6.0, ("q_proj",), saved=ENDS),
    "embedding": AdapterSpec(3, 6.0, ("q_proj", "embed_tokens")),
    "head": AdapterSpec(3, 6.0, ("q_proj", "lm_head")),
    "both": AdapterSpec(3, 6.0, ("q_proj", *ENDS)),
}


def merged_ends(tied: Tensor, saved: dict[str, Tensor], spec: AdapterSpec) -> tuple[Tensor, Tensor]:
    """Embedding and head (V, D) as they must be merged, of the one matrix that they were."""
    embedding, head = tied.clone(), tied.clone()
    first, last = "base_model.model.model.decoder.embed_tokens", "base_model.model.lm_head"
    if spec.saved:
        embedding, head = saved[f"{first}.weight"], saved[f"{last}.weight"]
    if spec.rows:
        ids = list(spec.rows["embed_tokens"])
        embedding[ids] = head[ids] = saved[f"{first}.token_adapter.trainable_tokens_delta"]
    if "embed_tokens" in spec.targets:
        embedding += 2 * (saved[f"{first}.lora_embedding_B"] @ saved[f"{first}.lora_embedding_A"]).T
    if "lm_head" in spec.targets:
        head += 2 * saved[f"{last}.lora_B.weight"] @ saved[f"{last}.lora_A.weight"]
    return embedding, head


@pytest.mark.parametrize("name", TIED)
def test_pitfall_3_a_tied_pair_is_merged_exactly_once(cli: Lora, tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "base", tie_embeddings=True)
    trained = adapter(tmp_path / "adapter", base, TIED[name])
    code, _, err = cli(
        "merge", "--adapter", "adapter", "--base", "base", "--out", "merged", cwd=tmp_path
    )
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tied = load_file(base / "model.safetensors")["model.decoder.embed_tokens.weight"]
    saved = load_file(trained / "adapter_model.safetensors")
    found = [end.weight for end in (merged.get_input_embeddings(), merged.get_output_embeddings())]
    for weight, expected in zip(found, merged_ends(tied, saved, TIED[name]), strict=True):
        torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=1e-6)
    assert (found[0] is found[1]) == (name in ("linears", "rows", "in full")), (
        "untied only where the two differ"
    )
    torch.testing.assert_close(
        logits(merged, IDS), logits(ours(base, trained), IDS), atol=1e-4, rtol=1e-4
    )


# 4 to 7: new tokens


@pytest.mark.parametrize("embeddings", ["all", "new_rows", "none"])
def test_pitfall_4_rows_of_new_tokens_are_there_when_an_adapter_is_loaded(
    cli: Lora, project: Path, monkeypatch: pytest.MonkeyPatch, embeddings: str
) -> None:
    """Those that it trains lie in its file; where it trains none, they lie in the base that it is
    bound to.
    """
    trained = []

    def seen(folder: Path, model: CausalLM, spec: AdapterSpec, base_name: str) -> None:
        trained.append(logits(model, NEW_IDS))
        save_adapter(folder, model, spec, base_name)

    monkeypatch.setattr("pipeline.adapters.peft.save_adapter", seen)
    assert finetune(cli, project, f"train_embeddings={embeddings}")[0] == 0
    base, tuned = project / BASE, project / ADAPTER
    for found in (
        logits(ours(base, tuned), NEW_IDS),
        logits(theirs(base, tuned), NEW_IDS),
    ):
        torch.testing.assert_close(found, trained[0], atol=1e-5, rtol=1e-5)
    saved = load_file(tuned / "adapter_model.safetensors")
    rows = [value[-(ALL - OLD) :] for key, value in saved.items() if ".lora_" not in key]
    before = load_file(base / "model.safetensors")["lm_head.weight"][OLD:]
    assert len(rows) == (0 if embeddings == "none" else 2)
    assert all(row.shape == before.shape and (row != before).any(dim=1).all() for row in rows), (
        "each has learned"
    )


def bound(_: Path) -> None:
    """As it was trained, with its manifest."""


def of_rows(project: Path) -> None:
    foreign(project / ADAPTER)
    adapter(
        project / ADAPTER,
        project / BASE,
        AdapterSpec(3, 6.0, ("q_proj",), rows=dict.fromkeys(ENDS, (3, ALL - 1))),
    )


def of_whole_ends(project: Path) -> None:
    foreign(project / ADAPTER)


def of_an_update(project: Path) -> None:
    foreign(project / ADAPTER)
    adapter(project / ADAPTER, project / BASE, AdapterSpec(3, 6.0, ("q_proj", "embed_tokens")))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (bound, "was trained on another base: the sha256 of its tensors is"),
        (of_rows, "trains row 98, but artifacts/base has 74 rows"),
        (of_whole_ends, "lm_head.weight has shape [99, 64], expected [74, 64]"),
        (of_an_update, "embed_tokens.lora_embedding_A has shape [3, 99], expected [3, 74]"),
    ],
)
def test_pitfall_5_a_base_with_other_rows_is_refused_with_the_reason(
    cli: Lora, project: Path, kind: Callable[[Path], None], reason: str
) -> None:
    kind(project)
    assert cli("adapters", "verify", str(ADAPTER), cwd=project)[0] == 0, (
        "it fits the base that it was made on"
    )
    for command in (
        ("adapters", "verify", str(ADAPTER)),
        ("merge", "--adapter", str(ADAPTER), "--out", "merged"),
    ):
        code, out, err = cli(*command, "--base", "artifacts/base", cwd=project)
        assert (code, out) == (1, "")
        assert reason in err
    assert not (project / "merged").exists()


def test_pitfall_6_an_adapter_of_new_rows_holds_no_matrix_of_the_vocabulary(
    cli: Lora, project: Path
) -> None:
    assert finetune(cli, project, "train_embeddings=new_rows")[0] == 0
    path = project / ADAPTER / "adapter_model.safetensors"
    rows, low_rank = 2 * (ALL - OLD) * WIDTH, 8 * 4 * (WIDTH + WIDTH)  # eight projections of rank 4
    assert sum(value.numel() for value in load_file(path).values()) == rows + low_rank
    assert path.stat().st_size < 4 * (rows + low_rank + OLD * WIDTH), (
        "its header and no table besides"
    )


def test_pitfall_6_nor_does_an_update_of_the_embedding(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    path = (
        adapter(tmp_path / "adapter", base, AdapterSpec(3, 6.0, ("embed_tokens",)))
        / "adapter_model.safetensors"
    )
    assert sum(value.numel() for value in load_file(path).values()) == 3 * (OLD + WIDTH)


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_pitfall_7_an_adapter_of_new_tokens_is_exported_within_vllms_rules(
    cli: Lora, tmp_path: Path, tied: bool
) -> None:
    base = checkpoint(tmp_path / "base", tie_embeddings=tied)
    rows = dict.fromkeys(ENDS[: 1 if tied else 2], (70, 71, 72, 73))
    trained = adapter(
        tmp_path / "adapter", base, AdapterSpec(3, 6.0, ("q_proj", "fc1"), rows=rows, rslora=True)
    )
    code, out, err = cli(
        "export", "adapter", "--format", "vllm", "--base", "base", "--out", "served", cwd=tmp_path
    )
    assert code == 0, err
    config = read_json(tmp_path / "served/adapter_config.json")
    for key in (
        "modules_to_save",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "lora_bias",
    ):
        assert not config[key]
    assert config["bias"] == "none"
    saved = load_file(tmp_path / "served/adapter_model.safetensors")
    kinds = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    assert all(key.endswith(kinds) for key in saved)
    widest = max(len(value) for key, value in saved.items() if "_A" in key)
    assert f"--max-lora-rank {min(rank for rank in RANKS if rank >= widest)} " in out
    served = theirs(base, tmp_path / "served")
    ids = torch.cat((IDS, torch.tensor([[70, 71, 72, 73, 3, 70, 4, 71, 72]])))
    torch.testing.assert_close(
        logits(served, ids), logits(ours(base, trained), ids), atol=1e-4, rtol=1e-4
    )


def test_pitfall_7_what_vllm_cannot_take_is_refused_with_what_to_do(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    code, out, err = cli(
        "export", str(ADAPTER), "--format", "vllm", "--out", str(tmp_path / "served"), cwd=brief
    )
    assert (code, out) == (1, "")
    assert "was trained in full (modules_to_save)" in err
    assert "or train again with finetune_lora.train_embeddings set to new_rows or none and" in err
    assert not (tmp_path / "served").exists()


# 8 to 10: merging


def test_pitfall_8_an_adapter_of_a_base_in_four_bits_is_merged_to_answer_as_it_was_trained(
    cli: Lora, project: Path
) -> None:
    assert finetune(cli, project, "quantization=nf4-dq")[0] == 0
    code, _, err = cli("merge", "--set", "merge.max_logit_difference=1e-5", cwd=project)
    assert code == 0, err
    merged = logits(theirs(project / "artifacts/lora_merged"), IDS)
    trained = load(project / BASE, project / ADAPTER).model
    assert isinstance(trained.get_submodule("model.decoder.layers.0.fc1"), QuantizedLinear)
    torch.testing.assert_close(merged, logits(trained, IDS), atol=1e-4, rtol=1e-4)
    on_stored = logits(load(project / BASE, project / ADAPTER, quantization="none").model, IDS)
    assert (on_stored - merged).abs().max() > 0.01, (
        "what a merge into the stored weights would have changed"
    )
    certificate = read_json(project / "artifacts/lora_merged/certificate.json")
    assert certificate["trained_on"] == "nf4-dq"
    assert certificate["max_logit_difference"] < 1e-5
    assert certificate["merged_on_stored_weights"]["max_logit_difference"] > 0.01
    assert certificate["merged_on_stored_weights"]["divergence"] > certificate["divergence"]


def test_pitfall_9_the_merged_model_answers_as_base_and_adapter(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    how = ("--format", "merged", "--out", str(out), "--prompts", "data/prompts.yaml")
    code, said, err = cli("export", str(ADAPTER), *how, cwd=brief)
    assert code == 0, err
    assert "8 matrices hold their update 1.0000 to 1.0000 times  largest logit difference" in said
    merged = logits(theirs(out), IDS)
    torch.testing.assert_close(
        merged, logits(theirs(brief / BASE, brief / ADAPTER), IDS), atol=1e-5, rtol=1e-5
    )
    assert read_json(out / "certificate.json")["max_logit_difference"] < 1e-5


def test_pitfall_9_a_merge_that_answers_otherwise_is_refused(
    cli: Lora, brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_edit: object, weight: Tensor, _rows: slice) -> Tensor:
        return weight

    monkeypatch.setattr("pipeline.weights.edits.AddLowRank.__call__", nothing)
    code, out, err = cli(
        "merge", "--adapter", str(ADAPTER), "--out", str(tmp_path / "merged"), cwd=brief
    )
    assert (code, out) == (1, "")
    assert "received 0.0000 times its update, not once" in err
    assert not (tmp_path / "merged").exists()


def toy_in_bf16(tmp_path: Path, *adapters: str, alpha: float = 6.0) -> Path:
    """A folder `base` and adapters on it, each of other numbers."""
    toy_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    for seed, name in enumerate(adapters):
        adapter(
            tmp_path / name, tmp_path / "base", AdapterSpec(3, alpha, ("q_proj", "down_proj")), seed
        )
    return tmp_path / "base"


def test_pitfall_9_what_rounding_takes_from_an_update_is_said(cli: Lora, tmp_path: Path) -> None:
    toy_in_bf16(tmp_path, "tiny", alpha=0.01)
    merge = ("merge", "--adapter", "tiny", "--base", "base", "--out", "merged")
    code, _, err = cli(*merge, cwd=tmp_path)
    assert code == 0
    assert "rounding leaves" in err and "Write them in fp32 (--precision fp32)" in " ".join(
        err.split()
    )
    code, out, err = cli(*merge, "--precision", "fp32", cwd=tmp_path)
    assert (code, err) == (0, "merged: the earlier result there is replaced.\n")
    assert "hold their update 1.0000 to 1.0000 times" in out


def test_pitfall_10_a_merge_changes_neither_base_nor_adapter(cli: Lora, tmp_path: Path) -> None:
    base = toy_in_bf16(tmp_path, "one")
    before = [folder_bytes(folder) for folder in (base, tmp_path / "one")]
    merge = ("merge", "--adapter", "one", "--base", "base", "--out")
    assert cli(*merge, "merged", cwd=tmp_path)[0] == 0
    for inside in ("base", "one"):
        code, _, err = cli(*merge, inside, cwd=tmp_path)
        assert code == 1
        assert "Name another folder with --out" in err
    assert [folder_bytes(folder) for folder in (base, tmp_path / "one")] == before
    name = "model.layers.0.self_attn.q_proj"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    saved = load_file(tmp_path / "one/adapter_model.safetensors")
    update = (
        2
        * saved[f"base_model.model.{name}.lora_B.weight"]
        @ saved[f"base_model.model.{name}.lora_A.weight"]
    )
    assert (weight + update - update != weight).float().mean() > 0.05, (
        "taken off again it would not be the base"
    )


def test_pitfall_10_adapters_that_are_switched_answer_to_the_last_bit_as_loaded_anew(
    tmp_path: Path,
) -> None:
    base = toy_in_bf16(tmp_path, "one", "two")
    models, answers = ModelPool(), {}
    for name in ("base", "one", "two", "one", "base", "two"):
        models.load("model", base, None if name == "base" else tmp_path / name)
        answers[name] = logits(models.get("model").at(1).model, IDS)
        fresh = load(base, None if name == "base" else tmp_path / name).model
        assert torch.equal(answers[name], logits(fresh, IDS)), name
    assert not torch.equal(answers["one"], answers["base"])
    assert not torch.equal(answers["one"], answers["two"])


# 19: checkpointing over frozen embeddings


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("kind", ["none", "nf4-dq"])
def test_pitfall_19_blocks_that_run_again_over_frozen_embeddings_give_the_same_gradients(
    kind: Quantization, how: Literal["selective", "full"]
) -> None:
    found = []
    for checkpointing in ("none", how):
        model = toy("llama", num_hidden_layers=4)
        if kind != "none":
            quantize(model, kind, None, CPU)
        assert not with_lora(model).embeddings.weight.requires_grad
        found.append(step_of(model, checkpointing))
    (loss, plain, most), (again, grads, least) = found
    assert again == loss
    assert grads.keys() == plain.keys() and len(grads) == 4 * 2 * 2
    assert all(
        grad.abs().max() > 0 and torch.equal(grad, plain[name]) for name, grad in grads.items()
    )
    assert least < most


def test_pitfall_19_and_the_same_adapter(cli: Lora, project: Path) -> None:
    files = []
    for how in ("none", "full"):
        assert (
            finetune(cli, project, "train_embeddings=none", f"gradient_checkpointing={how}")[0] == 0
        )
        files.append((project / ADAPTER / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    saved = load_file(project / ADAPTER / "adapter_model.safetensors")
    assert all(value.any() for key, value in saved.items() if "lora_B" in key), (
        "each matrix has learned"
    )


# 24: forgetting


def test_pitfall_24_forgetting_is_seen_before_anything_ships(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    metrics = read_json(brief / "artifacts/evaluation/metrics.json")
    forgot = metrics["lora"]["forgetting"]
    rise, kept = f"{forgot['loss_rise']:+.3f}", f"{forgot['answers_kept']:.0%}"
    (line,) = (
        line for line in cli("report", cwd=brief)[1].splitlines() if line.split()[:1] == ["lora"]
    )
    assert rise in line and kept in line
    report = (brief / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    (line,) = (line for line in report.splitlines() if line.startswith("| LoRA |"))
    assert rise in line and kept in line
    (line,) = (
        line
        for line in cli("adapters", cwd=brief)[1].splitlines()
        if line.startswith("lora_adapter")
    )
    assert rise in line
    said = (
        f"forgetting: loss on the old data {forgot['loss_rise']:+.4f} nats per token",
        f"forgetting: divergence from the base {forgot['divergence']:.4f} nats per token",
        f"forgetting: {forgot['answers_kept']:.1%} of the base's first choices kept",
    )
    cards = [cli("adapters", "card", str(ADAPTER), cwd=brief)[1]]
    for form in ("peft", "merged"):
        assert (
            cli("export", str(ADAPTER), "--format", form, "--out", str(tmp_path / form), cwd=brief)[
                0
            ]
            == 0
        )
        cards.append((tmp_path / form / "README.md").read_text(encoding="utf-8"))
    assert all(f"- {text}\n" in card for card in cards for text in said)


def test_pitfall_24_what_was_not_measured_is_said_too(cli: Lora, project: Path) -> None:
    shutil.rmtree(project / "artifacts/evaluation")
    assert (
        "not evaluated: run `lora evaluate`"
        in cli("adapters", "card", str(ADAPTER), cwd=project)[1]
    )
