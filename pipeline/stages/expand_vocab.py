"""expand_vocab: rows for the words that fine-tuning brings, and proof that nothing else changed (§9.1)."""

from collections.abc import Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adapters.lora import weight_of
from pipeline.data.examples import Example, read_examples
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.files.base_model import base_fingerprint
from pipeline.models.base import CausalLM, packed_hidden_states, set_row_count
from pipeline.models.load import Base, count, load_base, save_base
from pipeline.project.params.sections import ExpandVocab
from pipeline.project.runner import Event, Facts, Job, Note, Progress

AUDIT = "audit.json"


def expand_vocab(job: Job) -> Generator[Event, None, Facts]:
    """Old rows are copied bit for bit; each new one is the old rows' mean plus Gaussian noise."""
    settings = job.project.params.expand_vocab
    folder, trust = job.artifact("pretrain"), job.project.params.pretrain.trust_remote_code
    old, new = load_base(folder, None, trust), load_base(folder, None, trust)
    tokenizer, words = _expanded(job, settings, old.tokenizer)
    if words:
        add_rows(new.model, len(old.tokenizer), len(tokenizer), settings)
    else:
        yield Note("expand_vocab: no new tokens; the model stays as it is")
    new = Base(new.model, tokenizer)
    save_base(job.out, new)
    audit = _audit(old, new, words, read_examples(job.path(settings.audit_data), settings.audit_data))
    write_json(job.out / AUDIT, audit)
    yield Progress(1, 1, f"{len(words)} new words")
    return {
        "parameters": count(new.model) | {"trainable": 0},
        "new_rows": [len(old.tokenizer), len(tokenizer)] if words else [0, 0],
        "fingerprint": base_fingerprint(job.out),
    }


def _expanded(job: Job, settings: ExpandVocab, old: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """The tokenizer with what params name, and, where words are its tokens, with the words of the data.

    Raises UserError for special tokens where there is no such thing.
    """
    if settings.special_tokens and isinstance(old, WordTokenizer):
        raise UserError(
            "expand_vocab.special_tokens are for a base that splits words; MiniGPT's tokens are words, all alike. "
            "Name them in expand_vocab.tokens."
        )
    tokenizer, words = old, list[str]()
    if settings.data and isinstance(old, WordTokenizer):
        texts = (e.text for name in settings.data for e in read_examples(job.path(name), name))
        tokenizer, words = old.expanded(texts)
    for tokens, special in ((settings.special_tokens, True), (settings.tokens, False)):
        if tokens:
            tokenizer, more = tokenizer.expanded(tokens, special)
            words += more
    return tokenizer, words


def add_rows(model: CausalLM, first: int, stop: int, settings: ExpandVocab) -> None:
    """Rows `first` to `stop` of embedding and head. Models are often padded: those rows may be there already."""
    if stop > model.shape.rows:
        set_row_count(model, stop)
    generator = torch.Generator().manual_seed(settings.seed)
    for weight in {id(w): w for w in _ends(model)}.values():
        _fill_rows(weight, first, stop, settings.noise_std, generator)
    if getattr(model.head, "bias", None) is not None:
        bias = model.head.get_parameter("bias").data  # (V,)
        bias[first:stop] = bias[:first].float().mean()


def _ends(model: CausalLM) -> Iterator[Tensor]:
    return (weight_of(end) for end in (model.embeddings, model.head))


@torch.no_grad()
def _fill_rows(weight: Tensor, first: int, stop: int, std: float, generator: torch.Generator) -> None:
    new = weight[first:stop]  # (n, D)
    noise = torch.randn(new.shape, generator=generator) * std
    new.copy_(weight[:first].float().mean(dim=0) + noise)


@torch.no_grad()
def _audit(old: Base, new: Base, words: list[str], examples: list[Example]) -> dict[str, Any]:
    """Old rows identical: yes or no; largest change of an old word's logit on sentences without new words.

    Raises UserError if anything changed: the artifact is then not written.
    """
    V = len(old.tokenizer)
    known = [e for e in examples if not old.tokenizer.unknown_words(e.text)]
    known = [e for e in known if old.tokenizer.encode(e.text) == new.tokenizer.encode(e.text)]
    if not known:
        raise UserError(
            f"{examples[0].file}: every sentence has a new word, so none shows that old answers stay. "
            "Name the pretraining data in expand_vocab.audit_data."
        )
    pairs = zip(_ends(old.model), _ends(new.model), strict=True)
    audit = {
        "new_words": words,
        "old_ids_kept": new.tokenizer.words()[:V] == old.tokenizer.words(),
        "old_rows_identical": all(torch.equal(after[:V], before[:V]) for before, after in pairs),
        "sentences_checked": len(known),
        "drift": _drift(old, new, known),
    }
    if not audit["old_ids_kept"] or not audit["old_rows_identical"] or audit["drift"] != 0:
        raise UserError(f"the expanded model differs from the base on old words: {audit}. Please report this.")
    return audit


def _drift(old: Base, new: Base, examples: list[Example]) -> float:
    """Largest change of an old word's logit. The head runs on its old rows alone, in the base's own shape:
    a matrix product of another width may round differently, which is no change of the model."""
    V = len(old.tokenizer)
    ids = [old.tokenizer.encode(example.text) for example in examples]
    (_, before), (_, after) = _ends(old.model), _ends(new.model)
    pairs = zip(packed_hidden_states(old.model, ids), packed_hidden_states(new.model, ids), strict=True)
    return max(float((F.linear(b, after[:V]) - F.linear(a, before[:V])).abs().max()) for a, b in pairs)
