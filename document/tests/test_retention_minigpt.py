"""Keep what it knows, on MiniGPT: §6's knowledge correction with and without texts to retain."""

import shutil
from pathlib import Path

from pipeline.data.answers.prompts import read_prompts
from pipeline.data.formats import read_examples
from pipeline.inference import engine
from pipeline.inference.score import score, score_answers
from tests.helpers.projects import make

CORRECTION = (
    "finetune_lora.data=data/knowledge_correction.de.txt",
    "finetune_lora.train_embeddings=new_rows",
)


def corrected(root: Path, weight: float) -> tuple[list[bool], list[bool], float]:
    """(corrected, kept) of §6's prompts, and the divergence from the base on the pretraining
    sentences.
    """
    make(root, ["finetune_lora"], (*CORRECTION, f"finetune_lora.retention_weight={weight}"))
    base = engine.load(root / "artifacts/expanded")
    tuned = engine.load(root / "artifacts/expanded", root / "artifacts/lora_adapter")
    prompts = [
        p
        for p in read_prompts(root / "data/prompts.yaml", "p")
        if p.group == "knowledge_correction"
    ]
    answers = score_answers(tuned, [(p.prompt, p.corrected) for p in prompts])
    examples = read_examples(root / "data/pretrain.de.txt", "d")
    change, keep = (
        [answer.first for p, answer in zip(prompts, answers, strict=True) if p.rule == rule]
        for rule in ("must_change", "must_keep")
    )
    return change, keep, score(tuned, examples, score(base, examples)).divergence


def test_the_correction_is_learned_and_moves_the_rest_by_less_than_half(
    finished: Path, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    shutil.copytree(finished, root)
    *_, without = corrected(root, 0)
    change, keep, retained = corrected(root, 5)
    assert change == [True]
    assert keep == [True, True]
    assert retained < without / 2
