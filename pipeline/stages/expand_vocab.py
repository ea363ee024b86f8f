"""expand_vocab: adds embedding rows for new words, and checks that nothing else changed."""

from collections.abc import Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.lora import weight_of
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer
from pipeline.errors import UserError
from pipeline.files.artifact import write_json
from pipeline.files.base_model import base_fingerprint
from pipeline.models.base import CausalLM, packed_hidden_states, set_row_count
from pipeline.models.device import move_for_inference
from pipeline.models.load import Base, count, load_base, save_base
from pipeline.project.params.sections import ExpandVocab
from pipeline.project.runner import Event, Facts, Job, Note, Progress

AUDIT = "audit.json"


def run(job: Job) -> Generator[Event, None, Facts]:
    """Keep the old rows; a new row is their mean plus Gaussian noise. Raises UserError."""
    settings = job.project.params.expand_vocab
    folder, trust = job.artifact("pretrain"), job.project.params.origin.trust_remote_code
    old, new = load_base(folder, None, trust), load_base(folder, None, trust)
    tokenizer, words = _expand_tokenizer(job, settings, old.tokenizer)
    if words:
        add_rows(new.model, len(old.tokenizer), len(tokenizer), settings)
    else:
        yield Note("expand_vocab: no new tokens; the model is unchanged")
    new = Base(new.model, tokenizer)
    save_base(job.out, new)
    examples = read_examples(job.path(settings.audit_data), settings.audit_data)
    write_json(job.out / AUDIT, _audit(old, new, words, examples))
    yield Progress(1, 1, f"{len(words)} new words")
    return {
        "parameters": count(new.model) | {"trainable": 0},
        "new_rows": [len(old.tokenizer), len(tokenizer)] if words else [0, 0],
        "fingerprint": base_fingerprint(job.out),
    }


def _expand_tokenizer(
    job: Job, settings: ExpandVocab, old: Tokenizer
) -> tuple[Tokenizer, list[str]]:
    """A tokenizer with the tokens of the params and the words of the data, and what is new in it.

    Only a word tokenizer gets words of the data. It has no special tokens: raises UserError.
    """
    if settings.special_tokens and isinstance(old, WordTokenizer):
        raise UserError(
            "expand_vocab.special_tokens need a subword tokenizer; MiniGPT's word tokenizer has no "
            "special tokens. Put them in expand_vocab.tokens."
        )
    tokenizer, words = old, list[str]()
    if settings.data and isinstance(old, WordTokenizer):
        examples = (e for name in settings.data for e in read_examples(job.path(name), name))
        texts = (example.text for example in examples)
        tokenizer, words = old.expanded(texts)
    for tokens, special in ((settings.special_tokens, True), (settings.tokens, False)):
        if tokens:
            tokenizer, more = tokenizer.expanded(tokens, special)
            words += more
    return tokenizer, words


@torch.no_grad()
def add_rows(model: CausalLM, first: int, stop: int, settings: ExpandVocab) -> None:
    """Initialize the rows `first` to `stop` of embeddings and head."""
    # a padded model has them already
    if stop > model.shape.rows:
        set_row_count(model, stop)
    generator = torch.Generator().manual_seed(settings.seed)
    for weight in {id(w): w for w in _embedding_and_head(model)}.values():
        new = weight[first:stop]  # (n, D)
        noise = torch.randn(new.shape, generator=generator) * settings.noise_std
        new.copy_(weight[:first].float().mean(dim=0) + noise)
    if getattr(model.head, "bias", None) is not None:
        bias = model.head.get_parameter("bias").data  # (V,)
        bias[first:stop] = bias[:first].float().mean()


def _embedding_and_head(model: CausalLM) -> Iterator[Tensor]:
    return (weight_of(module) for module in (model.embeddings, model.head))  # (V, D) each


@torch.no_grad()
def _audit(old: Base, new: Base, words: list[str], examples: list[Example]) -> dict[str, Any]:
    """Compare ids, rows and logits of the old words, before and after.

    Logits are compared on sentences without new words. Raises UserError if anything changed, so
    that the artifact is not written.
    """
    V = len(old.tokenizer)
    texts = [e.text for e in examples if not old.tokenizer.unknown_words(e.text)]
    pairs = [(old.tokenizer.encode(text), new.tokenizer.encode(text)) for text in texts]
    ids = [before for before, after in pairs if before == after]
    if not ids:
        raise UserError(
            f"{examples[0].file}: every sentence has a new word, so the old answers cannot be "
            "checked. Set expand_vocab.audit_data to the pretraining data."
        )
    # both to one device, whose rounding is the same
    move_for_inference(nn.ModuleList([old.model, new.model]))
    before = [weight[:V] for weight in _embedding_and_head(old.model)]  # (V, D) each
    after = [weight[:V] for weight in _embedding_and_head(new.model)]
    # only the head's old rows: a matrix product with more columns may round differently, though the
    # model is the same
    old_head, new_head = before[1], after[1]
    hidden = zip(
        packed_hidden_states(old.model, ids), packed_hidden_states(new.model, ids), strict=True
    )
    drifts = [float((F.linear(b, new_head) - F.linear(a, old_head)).abs().max()) for a, b in hidden]
    audit = {
        "new_words": words,
        "old_ids_kept": new.tokenizer.words()[:V] == old.tokenizer.words(),
        "old_rows_identical": all(map(torch.equal, before, after)),
        "sentences_checked": len(ids),
        "drift": max(drifts),
    }
    if not audit["old_ids_kept"] or not audit["old_rows_identical"] or audit["drift"] != 0:
        raise UserError(
            f"the expanded model differs from the base on old words: {audit}. Please report this."
        )
    return audit
