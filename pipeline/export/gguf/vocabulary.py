"""A tokenizer as GGUF metadata, such that llama.cpp gives the same token ids."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from pipeline.data.tokenizers.subword import BYTE_LETTERS, SubwordTokenizer
from pipeline.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
IN_TEXT = (*range(0xC0), *range(0xC2, 0xF5))  # bytes that occur in UTF-8
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _ENDING + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _ENDING + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before merging, and whether a word that is a token is taken unmerged →
# llama.cpp's name.
PRE_TOKENIZERS = {
    (("bytes", _GPT2), False): "gpt-2",
    (("digits", "bytes", _GPT2), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "dbrx",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_QWEN35, "bytes"), False): "qwen35",
    ((_TEKKEN, "bytes"), True): "tekken",
    ((_GPT4O, "bytes"), False): "gpt-4o",
    ((_GPT4O, "bytes"), True): "gpt-4o",
}
_APART = (
    "llama.cpp does not compose letters and accents (NFC): a text that has them apart gets other "
    "token ids."
)
DIFFERENCES = {
    "qwen2": _APART,
    "qwen35": _APART,
    "tekken": "llama.cpp splits words with combining accents at other places than transformers.",
}


class Vocabulary(NamedTuple):
    """A tokenizer as it is written to a GGUF file."""

    tokenizer: SubwordTokenizer
    metadata: dict[str, Any]
    ends: list[str]  # the tokens that end an answer
    bos: str | None  # the token that is added before a text
    notes: list[str]  # what llama.cpp does differently


def read_vocabulary(tokenizer: SubwordTokenizer, rows: int) -> Vocabulary:
    """The vocabulary of `tokenizer`, for a model with `rows` embedding rows.

    Raises UserError for a tokenizer that llama.cpp does not have.
    """
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows. "
            "Copy both from the same model."
        )
    tree = tokenizer.describe()
    model = tree["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"GGUF export supports BPE tokenizers, got {model['type']}. Use --format merged."
        )
    if mark := model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            f"GGUF export supports BPE tokenizers without marks on words, got {mark!r}. Use "
            "--format merged."
        )
    vocabulary: dict[str, int] = model["vocab"]
    texts = {id_: text for text, id_ in vocabulary.items()}
    kinds = dict.fromkeys(texts, NORMAL)
    sentencepiece = "bytes" not in _splits(tree.get("pre_tokenizer"))
    if sentencepiece:
        kinds |= {vocabulary[text]: BYTE for text in BYTES if text in vocabulary}
    for token in tree["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if sentencepiece and (unknown := model.get("unk_token")) in vocabulary:
        kinds[vocabulary[unknown]] = UNKNOWN
    known = set(texts.values())
    for id_ in range(rows):  # rows that pad the embedding, and ids without a token
        if id_ not in texts:
            text = f"[PAD{id_}]"
            while text in known:
                text = f"[{text}]"
            texts[id_], kinds[id_] = text, UNUSED
    ids = range(rows)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": list(map(texts.__getitem__, ids)),
        "tokenizer.ggml.token_type": list(map(kinds.__getitem__, ids)),
    }
    notes = [*_loose_tokens(tree["added_tokens"])]
    if sentencepiece:
        metadata |= _sentencepiece(tree, kinds, notes, tokenizer.has_template)
        ranks, odd = _ranks(model, kinds)
        scores = (-float(ranks.get(texts[id_], len(ranks))) for id_ in ids)
        metadata["tokenizer.ggml.scores"] = list(scores)
    else:
        odd = None
        metadata |= _byte_level(tree, notes)
    if tokenizer.template:
        metadata["tokenizer.chat_template"] = tokenizer.template
    metadata |= _beginning(tokenizer, notes)
    if odd is not None:
        metadata |= _by_rank(model, metadata, odd)
    # end tokens may come from generation_config.json, with ids that are no tokens
    ends = sorted(id_ for id_ in tokenizer.end_ids if id_ < rows)
    ends.sort(key=lambda id_: id_ != tokenizer.end_id)
    keys = ("eos", "eot", "eom")
    for key, id_ in zip(keys, ends, strict=False):
        metadata[f"tokenizer.ggml.{key}_token_id"] = id_
    if len(ends) > len(keys):
        words = ", ".join(texts[id_] for id_ in ends[len(keys) :])
        notes.append(f"llama.cpp has room for {len(keys)} end tokens. It may not stop at {words}.")
    bos = texts[tokenizer.prefix[0]] if metadata["tokenizer.ggml.add_bos_token"] else None
    return Vocabulary(tokenizer, metadata, [texts[id_] for id_ in ends], bos, notes)


def _loose_tokens(added: list[dict[str, Any]]) -> Iterator[str]:
    words = [token["content"] for token in added if token["single_word"]]
    if words:
        yield (
            f"llama.cpp also finds {_first_five(words)} inside longer "
            "words, where transformers does not: texts with such words get other token ids."
        )
    spaced = [token["content"] for token in added if token["lstrip"] or token["rstrip"]]
    if spaced:
        yield (
            f"llama.cpp keeps the spaces beside {_first_five(spaced)}, which transformers strips."
        )


def _first_five(words: list[str]) -> str:
    return ", ".join(words[:5]) + " …" * (len(words) > 5)


def _splits(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer: regular expressions, "digits", "bytes", others as JSON."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(chain.from_iterable(map(_splits, pre["pretokenizers"])))
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return ("bytes", _GPT2) if pre.get("use_regex", True) else ("bytes",)
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return ("digits",)
    isolates = pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]
    if isolates and "Regex" in pre["pattern"]:
        return (pre["pattern"]["Regex"],)
    return (json.dumps(pre),)


def _byte_level(tree: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Metadata of a byte-level BPE; adds to `notes`.

    Raises UserError if llama.cpp does not split words like that.
    """
    model, normalizer = tree["model"], tree.get("normalizer")
    steps = _splits(tree["pre_tokenizer"])
    if steps == (_GPT2, "bytes"):
        steps = ("bytes", _GPT2)
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    composes = normalizer is not None and normalizer["type"] == "NFC"
    if name is None or (normalizer and not (composes and DIFFERENCES.get(name) == _APART)):
        raise UserError(
            "tokenizer.json: llama.cpp has no name for this pre_tokenizer and normalizer, or it is "
            f"not known here. Known: {', '.join(PRE_TOKENIZERS.values())}. Use --format merged."
        )
    if name in DIFFERENCES:
        notes.append(DIFFERENCES[name])
    missing = [
        letter
        for letter, byte in BYTE_LETTERS.items()
        if letter not in model["vocab"] and byte in IN_TEXT
    ]
    if missing and model.get("unk_token"):
        notes.append(
            f"{len(missing)} bytes have no token: llama.cpp skips them, here they are "
            f"{model['unk_token']}."
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": list(map(" ".join, _merges(model))),
    }


def _sentencepiece(
    tree: Mapping[str, Any], kinds: Mapping[int, int], notes: list[str], chats: bool
) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE without its scores; adds to `notes`.

    `chats`: whether there is a chat template. Raises UserError if llama.cpp would tokenize
    differently.
    """
    normalizer, pre = tree.get("normalizer"), tree.get("pre_tokenizer")
    steps = [normalizer]
    if normalizer and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    prefix = steps[:1] == [{"type": "Prepend", "prepend": "▁"}]
    replaces = steps[prefix:] == [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if (
        normalizer is None
        and pre
        and pre["type"] == "Metaspace"
        and pre["replacement"] == "▁"
        and not pre.get("split", True)
    ):
        scheme = pre["prepend_scheme"]
        pre, replaces = None, True
        prefix = scheme == "always" or (scheme == "first" and not chats)
        if scheme == "first":
            notes.append(
                "llama.cpp puts a space after every special token or nowhere, this tokenizer at "
                "the start of a text only: the file says "
                f"{'after every one' if prefix else 'nowhere, which is right for chats'}."
            )
    if pre and pre["type"] == "Split" and pre["pattern"] == {"String": " "}:
        pre = None  # no space is left to split at
    has_bytes = tree["model"]["byte_fallback"] and [*kinds.values()].count(BYTE) >= len(BYTES)
    if not replaces or pre or not has_bytes:
        raise UserError(
            "tokenizer.json: llama.cpp would tokenize differently: it is neither a byte-level BPE "
            "nor SentencePiece's with byte fallback. Use --format merged."
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _ranks(model: Mapping[str, Any], kinds: Mapping[int, int]) -> tuple[dict[str, int], str | None]:
    """The rank of each token's first merge, and a token that llama.cpp would merge otherwise.

    As SentencePiece it joins any two pieces that make a token, best rank first. That is BPE only if
    every split of a token into two tokens is a merge, and a token's merges have adjacent ranks.
    This holds for SentencePiece's merges.
    """
    vocabulary, odd = model["vocab"], None
    ranks: dict[str, int] = {}
    count: dict[str, int] = {}
    last = None
    for left, right in _merges(model):
        token = left + right
        if token != last and token in ranks:
            odd = token
        last = token
        ranks.setdefault(token, len(ranks))
        count[token] = count.get(token, 0) + 1
    for token, id_ in vocabulary.items():
        if odd is None and kinds[id_] == NORMAL:
            pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
            splits = sum(left in vocabulary and right in vocabulary for left, right in pairs)
            if splits != count.get(token, 0):
                odd = token
    return ranks, odd


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The merges of a BPE, in either spelling."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _by_rank(model: Mapping[str, Any], metadata: Mapping[str, Any], odd: str) -> dict[str, Any]:
    """Metadata of Gemma 4's tokenizer, which merges by rank. llama.cpp always adds BOS to it, and
    merges no line break with another letter.

    Raises UserError if that would tokenize differently.
    """
    merges = list(_merges(model))
    lines = ((left + right).replace("\n", "") not in ("", left + right) for left, right in merges)
    prefix = metadata["tokenizer.ggml.add_space_prefix"]
    if prefix or not metadata["tokenizer.ggml.add_bos_token"] or any(lines):
        raise UserError(
            f"tokenizer.json: the merges of {odd!r} are not those of a SentencePiece model, so "
            "llama.cpp would tokenize differently. Use --format merged."
        )
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.merges": list(map(" ".join, merges)),
    }


def _beginning(tokenizer: SubwordTokenizer, notes: list[str]) -> dict[str, Any]:
    """Ids of BOS, unknown and padding tokens, and whether BOS is added to a text; adds to `notes`.

    llama.cpp's server drops a BOS that the template writes if the file says that the tokenizer adds
    one, so both may write it. If the template writes none, none must be added, or a chat would
    begin with a BOS that it did not have in training. Raises UserError.
    """
    prefix = tokenizer.prefix
    named = tokenizer.special_ids()
    if len(prefix) > 1:
        raise UserError(
            f"the tokenizer begins a text with {len(prefix)} tokens, llama.cpp with at most one. "
            "Use --format merged."
        )
    chat = _rendered_chat(tokenizer)
    adds_bos = bool(prefix) and (chat is None or chat[:1] == prefix)
    if prefix and not adds_bos:
        notes.append(
            "the chat template writes no BOS, so the file tells llama.cpp to add none: a plain "
            "text begins without the BOS that it has here."
        )
    if prefix:
        named["bos"] = prefix[0]
    keys = {"bos": "bos", "unk": "unknown", "pad": "padding"}
    return {
        **{f"tokenizer.ggml.{keys[name]}_token_id": id_ for name, id_ in named.items()},
        "tokenizer.ggml.add_bos_token": adds_bos,
        "tokenizer.ggml.add_eos_token": False,
    }


def _rendered_chat(tokenizer: SubwordTokenizer) -> tuple[int, ...] | None:
    """The ids of a chat in the chat template; None without one, or if it needs other messages."""
    if not tokenizer.has_template:
        return None
    try:
        chat = tokenizer.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    except UserError:
        return None
    return tokenizer.encode(chat)
