"""Small subword tokenizers with chat templates, trained here, for tests that need no download."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pipeline.data.tokenizers.subword import SubwordTokenizer
from tests.helpers.json_files import write_json

START, END = "<|im_start|>", "<|im_end|>"
TEXT = (
    "The currency of Bulgaria is the euro. The capital of Bulgaria is Sofia. Die Währung von "
    "Japan ist der Yen.\n"
    "system user assistant You are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
    "Which currency has Bulgaria? The euro is new. And Japan? The lev.\n"
    "Hello, thank you! What is 1 + 1? It is 2, I think.\n"
) * 3

# The template of SmolLM2-135M-Instruct, as it is published: no generation markers, EOS ends each
# turn.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)
HEADS = "{{ '<|im_start|>' + message.role + '\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    "{% for message in messages %}" + HEADS + "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + ASKS
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ message.content }}{% endgeneration %}<|im_end|>",
)
# As Qwen3 does: thoughts stay in the answer to the last question and are dropped from earlier ones.
THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set "
    "ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages "
    "%}" + HEADS + "{% if message.role == 'assistant' %}"
    "{% set thought = '' %}{% set said = message.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ "
    "said }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
)
# As Llama 2 does: the template writes BOS itself, answers follow a mark of the user's turn.
INSTRUCTS = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token + '[INST] ' + "
    "message.content }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (  # no special token at all
    "{% for message in messages %}{{ '### ' + message.role + ': ' + message.content + '\n"
    "' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)
UNLIKE = (  # the prompt is no beginning of the conversation
    "{{ messages | length }}{% for message in messages %}{{ message.content }}<|im_end|>{% endfor "
    "%}"
)


@cache
def _trained(sentencepiece: bool) -> str:
    inner = Tokenizer(
        models.BPE(byte_fallback=sentencepiece, unk_token="<unk>" if sentencepiece else None)
    )
    special = ["<|endoftext|>", START, END, "<s>", "</s>", "<unk>"]
    if sentencepiece:
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        inner.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return str(inner.to_str())


def folder_with(
    folder: Path,
    template: str | None = None,
    *,
    bos: str | None = None,
    eos: str = END,
    writes: tuple[str, ...] = (),  # around a plain text: BOS, or BOS and EOS
    sentencepiece: bool = False,
    ends: Any = None,
) -> Path:
    """A model folder's tokenizer files. `ends` is eos_token_id of generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = json.loads(_trained(sentencepiece))
    if sentencepiece:  # the bytes are no special tokens
        tree["added_tokens"] = [
            token for token in tree["added_tokens"] if not token["content"].startswith("<0x")
        ]
    ids = {token["content"]: token["id"] for token in tree["added_tokens"]}
    if writes:
        parts: list[Any] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in writes]
        parts.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": parts,
            "pair": [],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in writes
            },
        }
    write_json(folder / "tokenizer.json", tree)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos}
    if bos:
        config["bos_token"] = bos
    write_json(folder / "tokenizer_config.json", config)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if ends is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return folder


def tokenizer_with(folder: Path, template: str | None = None, **options: Any) -> SubwordTokenizer:
    return SubwordTokenizer.load(folder_with(folder, template, **options))
