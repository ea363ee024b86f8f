"""expand_vocab: rows for the words that fine-tuning brings, and proof that nothing else changed (§9.1)."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from pipeline.artifact import base_fingerprint, write_json
from pipeline.data import Example, read_examples
from pipeline.errors import UserError
from pipeline.models.base import Base, count, load_base, resized, save_base
from pipeline.runner import Event, Facts, Job, Progress

AUDIT = "audit.json"


def expand_vocab(job: Job) -> Generator[Event, None, Facts]:
    """Old rows are copied bit for bit; each new one is the old rows' mean plus Gaussian noise."""
    settings = job.project.params.expand_vocab
    examples = [example for name in settings.data for example in read_examples(job.path(name), name)]
    old = load_base(job.artifact("pretrain"))
    tokenizer, words = old.tokenizer.expanded(example.text for example in examples)
    model = resized(old.model, len(tokenizer))
    generator = torch.Generator().manual_seed(settings.seed)
    for weight in {id(w): w for w in (model.embeddings.weight, model.lm_head.weight)}.values():
        _fill_new_rows(weight, len(old.tokenizer), settings.noise_std, generator)
    new = Base(model, tokenizer)
    save_base(job.out, new)
    audit = _audit(old, new, words, read_examples(job.path(settings.audit_data), settings.audit_data))
    write_json(job.out / AUDIT, audit)
    yield Progress(1, 1, f"{len(words)} new words")
    return {
        "parameters": count(model) | {"trainable": 0},
        "new_rows": [len(old.tokenizer), len(tokenizer)],
        "fingerprint": base_fingerprint(job.out),
    }


@torch.no_grad()
def _fill_new_rows(weight: Tensor, first: int, std: float, generator: torch.Generator) -> None:
    new = weight[first:]  # (n, D)
    noise = torch.randn(new.shape, generator=generator) * std
    new.copy_(weight[:first].mean(dim=0) + noise)


@torch.no_grad()
def _audit(old: Base, new: Base, words: list[str], examples: list[Example]) -> dict[str, Any]:
    """Old rows identical: yes or no; largest change of an old word's logit on sentences without new words.

    Raises UserError if anything changed: the artifact is then not written.
    """
    V = len(old.tokenizer)
    known = [example for example in examples if not old.tokenizer.unknown_words(example.text)]
    if not known:
        raise UserError(
            f"{examples[0].file}: every sentence has a new word, so none shows that old answers stay. "
            "Name the pretraining data in expand_vocab.audit_data."
        )
    audit = {
        "new_words": words,
        "old_ids_kept": new.tokenizer.words()[:V] == old.tokenizer.words(),
        "old_rows_identical": torch.equal(new.model.embeddings.weight[:V], old.model.embeddings.weight)
        and torch.equal(new.model.lm_head.weight[:V], old.model.lm_head.weight),
        "sentences_checked": len(known),
        "drift": max(_drift(old, new, example.text) for example in known),
    }
    if not audit["old_ids_kept"] or not audit["old_rows_identical"] or audit["drift"] != 0:
        raise UserError(f"the expanded model differs from the base on old words: {audit}. Please report this.")
    return audit


def _drift(old: Base, new: Base, text: str) -> float:
    """Largest change of an old word's logit. The head runs on its old rows alone, in the base's own shape:
    a matrix product of another width may round differently, which is no change of the model."""
    ids = torch.tensor([old.tokenizer.encode(text)])
    positions = torch.arange(ids.shape[1])[None]
    before = old.model(ids)
    hidden = new.model.decoder(torch.tensor([new.tokenizer.encode(text)]), positions, None)
    after = torch.nn.functional.linear(hidden, new.model.lm_head.weight[: len(old.tokenizer)])
    return float((after - before).abs().max())
