"""What each stage makes, with the repository's own params, computed again by other means."""

import json
import math
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.data.answers.prompts import read_prompts
from pipeline.data.examples import Example
from pipeline.errors import UserError
from pipeline.files.artifact import digest
from pipeline.inference.catalog import measured
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import final_loss, read_final_loss, read_steps
from pipeline.project.params.sections import Evaluate
from pipeline.project.runner import run
from pipeline.stages.evaluate import _score_new
from pipeline.stages.registry import open_project
from pipeline.stages.report import _prompt_table
from pipeline.weights.edits import AddLowRank
from tests.helpers.json_files import read_json
from tests.helpers.projects import BRIEF, METHODS, PIPELINE, ROOT, STAGES, make, make_one
from tests.helpers.side_by_side import theirs

Lora = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def metrics(finished: Path) -> Any:
    return read_json(finished / "artifacts/evaluation/metrics.json")


def test_pretraining_answers_the_seven_prompts_of_section_6(finished: Path) -> None:
    folder = finished / "artifacts/base"
    model, tokenizer = (
        theirs(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompts = [
        p for p in read_prompts(ROOT / "data/prompts.yaml", "p") if p.group == "fact_correction"
    ]
    assert len(prompts) == 7
    for prompt in prompts:
        with torch.no_grad():
            probabilities = (
                model(**tokenizer(prompt.prompt, return_tensors="pt")).logits[0, -1].softmax(0)
            )
        best = int(probabilities.argmax())
        assert tokenizer.decode([best]) == prompt.answer
        assert probabilities[best] >= 0.95


@pytest.mark.slow
def test_every_method_flattens_within_50_epochs_and_full_completes_all_8_sentences(
    metrics: Any,
) -> None:
    for method in ("full", "freeze", "lora"):
        assert metrics[method]["flat_from_epoch"] < 50
    assert (metrics["full"]["new_completed"], metrics["full"]["new_sentences"]) == (8, 8)


def test_losses_and_kept_answers_are_those_that_transformers_computes(
    finished: Path, metrics: Any
) -> None:
    """Every whole sentence with its end token, on the checkpoints as transformers opens them."""
    folders = {
        "base": "base",
        "scratch": "from_scratch",
        "expanded": "expanded",
        "full": "full_finetuned",
        "merged": "lora_merged",
    }
    answers: dict[str, torch.Tensor] = {}
    for name, folder in folders.items():
        model = theirs(finished / "artifacts" / folder)
        tokenizer = AutoTokenizer.from_pretrained(finished / "artifacts" / folder)
        losses, choices = [], []
        for text in (finished / "data/pretrain.de.txt").read_text(encoding="utf-8").splitlines():
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            losses += F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
            choices.append(logits.argmax(-1))
        loss = sum(losses) / len(losses)
        answers[name] = torch.cat(choices)
        assert metrics[name]["old_loss"] == pytest.approx(loss, abs=1e-5)
        assert metrics[name]["old_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        kept = float((answers[name] == answers["base"]).double().mean())
        assert metrics[name]["forgetting"]["answers_kept"] == pytest.approx(kept)
        rise = loss - metrics["base"]["old_loss"]
        assert metrics[name]["forgetting"]["loss_rise"] == pytest.approx(rise, abs=1e-5)


def test_completed_sentences_are_those_that_transformers_completes(
    finished: Path, metrics: Any
) -> None:
    for name, folder in {
        "scratch": "from_scratch",
        "expanded": "expanded",
        "freeze": "layer_frozen",
        "merged": "lora_merged",
    }.items():
        model = theirs(finished / "artifacts" / folder)
        tokenizer = AutoTokenizer.from_pretrained(finished / "artifacts" / folder)
        done = 0
        for text in (finished / "data/finetune.de.txt").read_text(encoding="utf-8").splitlines():
            given = tokenizer(" ".join(text.split()[:2]), return_tensors="pt")
            out = model.generate(**given, max_new_tokens=12, do_sample=False)[0]
            done += tokenizer.decode(out) == f"{text} <eos>"
        assert metrics[name]["new_completed"] == done


def test_merged_and_lora_are_one_model(metrics: Any) -> None:
    for key in ("old_loss", "new_loss"):
        assert metrics["merged"][key] == pytest.approx(metrics["lora"][key], abs=1e-5)
    assert metrics["merged"]["new_completed"] == metrics["lora"]["new_completed"]


def test_parameters_and_sizes_are_those_on_disk(finished: Path, metrics: Any) -> None:
    V, D, block = 99, 64, 49_984
    assert (
        metrics["full"]["trainable"]
        == metrics["full"]["parameters"]
        == 2 * V * D + 2 * block + 2 * D
    )
    assert metrics["freeze"]["trainable"] == 2 * V * D + block
    # A and B, and embeddings and head
    assert metrics["lora"]["trainable"] == 4_096 + 2 * V * D
    for name, folder, file in (
        ("full", "full_finetuned", "model.safetensors"),
        ("lora", "lora_adapter", "adapter_model.safetensors"),
    ):
        path = finished / "artifacts" / folder / file
        assert metrics[name]["bytes"] == path.stat().st_size
    tensors = load_file(finished / "artifacts/lora_adapter/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == metrics["lora"]["trainable"]
    share = 100 * metrics["lora"]["trainable"] / metrics["lora"]["parameters"]
    assert metrics["lora"]["trainable_percent"] == pytest.approx(share)


def test_only_what_a_method_trains_has_changed(finished: Path) -> None:
    before = load_file(finished / "artifacts/expanded/model.safetensors")

    def changed(folder: str) -> set[str]:
        after = load_file(finished / "artifacts" / folder / "model.safetensors")
        return {name for name in before if not torch.equal(before[name], after[name])}

    ends = {"model.decoder.embed_tokens.weight", "lm_head.weight"}
    last = {name for name in before if ".layers.1." in name}
    targets = {n for n in before if n.endswith("proj.weight") and "self_attn" in n}
    assert changed("layer_frozen") == ends | last
    assert changed("lora_merged") == ends | targets
    assert changed("full_finetuned") == set(before) - {"model.decoder.embed_positions.weight"}


def test_expanding_keeps_old_rows_and_says_so(finished: Path) -> None:
    audit = read_json(finished / "artifacts/expanded/audit.json")
    assert (audit["old_rows_identical"], audit["old_ids_kept"], audit["drift"]) == (True, True, 0.0)
    assert audit["sentences_checked"] == 22
    assert len(audit["new_words"]) == 25
    old = load_file(finished / "artifacts/base/model.safetensors")
    new = load_file(finished / "artifacts/expanded/model.safetensors")
    for name in old:
        assert torch.equal(new[name][: len(old[name])], old[name])
    rows, mean = new["lm_head.weight"][74:], old["lm_head.weight"].mean(0)
    assert float((rows - mean).std()) == pytest.approx(0.02, rel=0.1)
    assert float((rows - mean).mean()) == pytest.approx(0, abs=0.005)


def test_new_rows_leaves_the_old_rows_bit_identical(project: Path) -> None:
    overrides = [*BRIEF, "finetune_lora.train_embeddings=new_rows"]
    make(project, ["finetune_lora", "merge"], overrides)
    before = load_file(project / "artifacts/expanded/model.safetensors")
    after = load_file(project / "artifacts/lora_merged/model.safetensors")
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:74], before[name][:74])
        assert not torch.equal(after[name][74:], before[name][74:])


def test_the_certificate_says_that_every_delta_was_merged_once(finished: Path) -> None:
    certificate = read_json(finished / "artifacts/lora_merged/certificate.json")
    ratios = certificate["delta_ratios"]
    assert len(ratios) == 8
    assert all(ratio == pytest.approx(1, abs=1e-5) for ratio in ratios.values())
    assert certificate["max_logit_difference"] < 1e-5
    adapter = load_file(finished / "artifacts/lora_adapter/adapter_model.safetensors")
    base = load_file(finished / "artifacts/expanded/model.safetensors")
    merged = load_file(finished / "artifacts/lora_merged/model.safetensors")
    for name in ratios:
        A, B = (adapter[f"base_model.model.{name}.lora_{m}.weight"].double() for m in "AB")
        expected = base[f"{name}.weight"].double() + 0.25 * B @ A
        torch.testing.assert_close(
            merged[f"{name}.weight"].double(), expected, atol=1e-7, rtol=1e-6
        )


def test_a_merge_that_answers_otherwise_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(edit: AddLowRank, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight + 2 * edit.scale * edit.left[rows] @ edit.right

    monkeypatch.setattr("pipeline.weights.edits.AddLowRank.__call__", twice)
    before = (project / "artifacts/lora_merged/model.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"merge rejected: .*k_proj received 2.0000 times its update, not once"
    ):
        make(project, ["merge"], BRIEF, force=True)
    assert (project / "artifacts/lora_merged/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("tiny", ["finetune_lora.learning_rate=1e-6", "finetune_lora.alpha=1e-5"])
def test_an_update_near_the_rounding_of_its_weights_is_merged(project: Path, tiny: str) -> None:
    make(project, ["finetune_lora", "merge"], [*BRIEF, tiny])


def test_an_input_that_changes_while_a_stage_runs_is_refused_and_not_cached(project: Path) -> None:
    data = project / "data/finetune.de.txt"
    events = run(open_project(project / "params.yaml", BRIEF), STAGES["finetune_full"], force=True)
    next(events)
    text = data.read_text(encoding="utf-8")
    data.write_text(text + "der wind weht im winter\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"data/finetune.de.txt changed while finetune_full was running"
    ):
        list(events)


@pytest.mark.slow
def test_answers_compare_as_the_tokenizer_sees_them_and_must_be_words_it_knows(
    project: Path,
) -> None:
    prompts = project / "data/prompts.yaml"
    before = read_json(project / "artifacts/evaluation/metrics.json")
    prompts.write_text(
        prompts.read_text(encoding="utf-8").replace("answer: tisch", "answer: Tisch"),
        encoding="utf-8",
    )
    make(project, ["merge", "evaluate"], BRIEF)
    assert read_json(project / "artifacts/evaluation/metrics.json") == before
    prompts.write_text(
        prompts.read_text(encoding="utf-8").replace("answer: Tisch", "answer: tsich"),
        encoding="utf-8",
    )
    said = r"data/prompts.yaml: base has no tokens for 'tsich', the answer to 'die katze sitzt auf dem'"
    with pytest.raises(UserError, match=said):
        make(project, ["merge", "evaluate"], BRIEF)


@pytest.mark.slow
def test_decomposed_letters_in_a_data_file_change_nothing(project: Path) -> None:
    data = project / "data/finetune.de.txt"
    before = read_json(project / "artifacts/evaluation/metrics.json")
    data.write_text(
        unicodedata.normalize("NFD", data.read_text(encoding="utf-8")), encoding="utf-8"
    )
    make(project, ["evaluate"], BRIEF)
    after = read_json(project / "artifacts/evaluation/metrics.json")
    assert after == before


def test_a_changed_input_is_refused_before_it_is_used(project: Path) -> None:
    path = project / "artifacts/expanded/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        UserError, match=r"expanded/model.safetensors was changed after the artifact was made"
    ):
        make(project, ["finetune_lora"], BRIEF)


def test_a_missing_input_names_the_next_step(project: Path) -> None:
    shutil.rmtree(project / "artifacts/expanded")
    with pytest.raises(UserError, match=r"expanded does not exist. Run `lora expand-vocab`\.$"):
        make(project, ["finetune_lora"], BRIEF)


def test_a_word_that_was_never_added_is_refused_with_its_line(project: Path) -> None:
    (project / "data/finetune.de.txt").write_text(
        "der wind weht\nder hagel fällt\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"data/finetune.de.txt:2: not in the vocabulary: hagel"):
        make(project, ["finetune_lora"], BRIEF)


def test_the_file_whose_words_a_model_lacks_is_named() -> None:
    """Not the first of the files that training held examples out of."""
    tokenizer = SimpleNamespace(
        unknown_words=lambda text: [word for word in [text] if word == "möwe"]
    )
    loaded: Any = SimpleNamespace(name="lora", tokenizer=tokenizer)
    examples = [Example("hund", "known.txt", 1), Example("möwe", "new.txt", 1)]
    with pytest.raises(UserError, match=r"^new.txt has words that lora does not know"):
        _score_new(loaded, examples, Evaluate(), 0)


@pytest.mark.slow
def test_an_expanded_vocabulary_without_new_words_is_fine(project: Path) -> None:
    overrides = [
        *BRIEF,
        "expand_vocab.data=data/pretrain.de.txt",
        "train_from_scratch.data=data/pretrain.de.txt",
        *(
            f"finetune_{method}.data=data/pretrain.de.txt"
            for method in METHODS
            if f"finetune_{method}" in PIPELINE
        ),
        "finetune_lora.train_embeddings=new_rows",
        "evaluate.new_data=data/pretrain.de.txt",
    ]
    make(project, [name for name in PIPELINE if name != "pretrain"], overrides)
    assert load_base(project / "artifacts/expanded").model.shape.rows == 74


def test_predictions_hold_every_prompt_of_every_variant(finished: Path) -> None:
    predictions = read_json(finished / "artifacts/evaluation/predictions.json")
    prompts, tasks = (
        [p.prompt for p in read_prompts(ROOT / "data/prompts.yaml", "p")],
        predictions.pop("tasks"),
    )
    assert [list(row["answers"]) for rows in tasks.values() for row in rows] == [
        list(predictions)
    ] * 11
    assert list(predictions) == list(open_project(finished / "params.yaml").variants)
    for name, entries in predictions.items():
        assert [entry["prompt"] for entry in entries] == prompts
        for entry in entries:
            if entry["top_k"] is None:
                assert name == "base"
                assert entry["rule"] == "must_learn"
                continue
            found = [choice["probability"] for choice in entry["top_k"]]
            assert len(found) == 5
            assert found == sorted(found, reverse=True)
            assert 0 < sum(found) <= 1 + 1e-6


def test_a_prompt_with_a_bar_or_a_line_break_stays_one_row_of_the_report() -> None:
    entry = {
        "group": "signs",
        "rule": "must_change",
        "prompt": "a | b\nc",
        "answer": "x|y",
        "corrected": "<z>",
        "top_k": None,
    }
    table = _prompt_table({"base": [entry]}, "signs", "must_change", {"base": "Base"})
    assert table.endswith("| *a \\| b\\nc* | x\\|y | &lt;z> | unknown word |\n")


def test_the_report_states_the_numbers_that_were_measured(finished: Path, metrics: Any) -> None:
    report = (finished / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    for method, name in (
        ("scratch", "Training from scratch"),
        ("full", "Full fine-tuning"),
        ("freeze", "Layer freezing"),
        ("lora", "LoRA"),
    ):
        numbers = metrics[method]
        assert (
            f"| {name} | {numbers['trainable']:,} | {numbers['trainable_percent']:.1f}% |" in report
        )
        assert f"flat from epoch {numbers['flat_from_epoch']}" in report
        assert (
            f"{numbers['new_completed']} of {numbers['new_sentences']} new sentences are completed"
            in report
        )
        assert f"{numbers['forgetting']['answers_kept']:.0%}" in report
    for prompt in read_prompts(ROOT / "data/prompts.yaml", "p"):
        assert f"| *{prompt.prompt}* | {prompt.answer} |" in report


def test_the_picture_is_a_png_with_two_panels_of_ink(finished: Path) -> None:
    from matplotlib.image import imread

    picture = imread(finished / "artifacts/evaluation/finetuning_comparison.png")
    height, width, _ = picture.shape
    dark = (picture[..., :3].min(axis=2) < 0.6).mean(axis=0)
    assert width > 2 * height
    assert dark[: width // 2].max() > 0.5
    assert dark[width // 2 :].max() > 0.5


def test_a_manifest_says_how_its_artifact_was_made_and_nothing_that_differs(brief: Path) -> None:
    for name in (STAGES[stage].output for stage in PIPELINE):
        text = (brief / "artifacts" / name / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        assert {
            "kind",
            "method",
            "params",
            "seed",
            "inputs",
            "versions",
            "commit",
            "code",
            "files",
        } <= set(manifest)
        assert str(brief) not in text
        if name != "evaluation":
            assert manifest["parameters"]["total"] in (109_568, 112_768)
    adapter = read_json(brief / "artifacts/lora_adapter/manifest.json")
    expanded = read_json(brief / "artifacts/expanded/manifest.json")
    assert adapter["base"] == expanded["fingerprint"]


def test_nothing_is_pickled(finished: Path) -> None:
    names = {
        path.suffix
        for folder in ("artifacts", "runs")
        for path in (finished / folder).rglob("*")
        if path.is_file()
    }
    assert names <= {".json", ".jsonl", ".safetensors", ".csv", ".png", ".md", ".bin", ""}
    # a corpus's tokens, as plain numbers; one that is not learned is negative
    for path in finished.rglob("*.bin"):
        assert path.parent.parent.name == "tokens"
        tokens = np.fromfile(path, "<i4")
        assert ((tokens >= -99) & (tokens < 99)).all()


def test_freezing_everything_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match="leaves nothing to train"):
        make_one(
            project,
            "finetune_freeze",
            [*BRIEF, "finetune_freeze.last_blocks=0", "finetune_freeze.train_embeddings=false"],
        )
    with pytest.raises(UserError, match=r"finetune_freeze.last_blocks must be at most 2"):
        make_one(project, "finetune_freeze", [*BRIEF, "finetune_freeze.last_blocks=3"])


def test_adapters_beside_the_pipelines_are_evaluated_as_variants_are(
    project: Path, cli: Lora
) -> None:
    """The same adapter under another name has the same numbers; a second call keeps those of the
    first.
    """
    artifacts = project / "artifacts"
    shutil.copytree(artifacts / "lora_adapter", artifacts / "copy")
    assert cli("evaluate", "--adapter", "artifacts/copy", cwd=project)[0] == 0
    code, out, _ = cli("evaluate", "--adapter", "artifacts/sweep/rank-1", cwd=project)
    assert code == 0 and "artifacts/copy" in out and "artifacts/sweep/rank-1" in out
    alone, together = (
        read_json(artifacts / "measured/metrics.json"),
        read_json(artifacts / "evaluation/metrics.json")["lora"],
    )
    shared = alone["artifacts/copy"].keys() & together.keys()
    assert {"forgetting", "new_loss", "new_completed", "old_prompts_kept", "tasks"} <= shared
    assert {key: alone["artifacts/copy"][key] for key in shared} == {
        key: together[key] for key in shared
    }
    found = measured([artifacts])
    assert (
        found[digest(artifacts / "sweep/rank-1")]["new_loss"]
        == alone["artifacts/sweep/rank-1"]["new_loss"]
    )
    assert (
        cli(
            "evaluate",
            "--adapter",
            "artifacts/copy",
            "--set",
            "evaluate.prompt_words=1",
            cwd=project,
        )[0]
        == 0
    )
    assert list(read_json(artifacts / "measured/metrics.json")) == ["base", "artifacts/copy"], (
        "other settings: measured anew"
    )
    whole = cli("evaluate", "--adapter", "artifacts/full_finetuned", "--json", cwd=project)
    assert whole[0] == 0, whole[2]
    metrics = read_json(artifacts / "evaluation/metrics.json")["full"]
    found = json.loads(whole[1])["artifacts/full_finetuned"]
    assert found["new_loss"] == metrics["new_loss"], "a whole model too"
    code, _, err = cli("evaluate", "--adapter", "nowhere", cwd=project)
    assert code == 1 and "nowhere is not a folder" in err


def test_the_final_loss_of_a_log_needs_its_last_epoch_alone(tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    assert read_final_loss(path) is None
    lines = [f"{n},{n // 4},{1 / (n + 1)},0.1,1.0,{n}" for n in range(14)]
    for text in (
        "",
        "step,epoch,loss,learning_rate,grad_norm,tokens\n",
        *("\n".join(lines[:n]) for n in (1, 8, 14)),
    ):
        whole = text and "step,epoch,loss,learning_rate,grad_norm,tokens\n" + text
        for ending in ("\n", "", "\n14,3,0.0", "\nnonsense\n"):
            path.write_text(whole + ending, encoding="utf-8")
            assert read_final_loss(path) == final_loss(read_steps(path))
