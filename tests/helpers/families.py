"""Toy models of the families that people use, each in a project of its own whose data has every
form.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.json_files import write_jsonl, write_texts
from tests.helpers.projects import make_base

VOCABULARY = 120
BEGIN, END, UNKNOWN = "<s>", "<|end|>", "<unk>"
TOOL, NEW = "<|tool|>", "Plovdiv"  # tokens to add
# as no rule of today lets it pass
GENERATION = '{"temperature": 0.6, "do_sample": false, "eos_token_id": [1, 7]}'
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """A model's kind and shape; `rows` may be more than its tokenizer has, which writes `begins`
    first.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=lambda: WIDE)
    tied: bool = True
    rows: int = VOCABULARY
    begins: str | None = BEGIN
    linears: int = 14  # that all-linear means


OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "qwen3": Family("qwen3", {**WIDE, "attention_dropout": 0.1}, tied=False, begins=None),
    "llama": Family("llama", {**WIDE, "hidden_size": 64, "num_key_value_heads": 1}, rows=128),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2", {**WIDE, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": Family(
        "gemma3_text",
        {**WIDE, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": Family("gpt2", GPT2, begins=None, linears=8),
    # its BOS is its EOS
    "opt": Family("opt", {**OPT, "max_position_embeddings": 64}, begins=END, linears=14),
    "mixtral": Family(
        "mixtral",
        {**WIDE, "num_local_experts": 4, "router_jitter_noise": 0.1},
        tied=False,
        linears=8,
    ),
}
MIXTURES = {
    "mixtral": FAMILIES["mixtral"],
    "qwen3_moe": Family(
        "qwen3_moe",
        {
            **WIDE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [],
        },
        tied=False,
        linears=8,
    ),
    # stacks (E, I, O), with biases, gate and up by turns
    "gpt_oss": Family(
        "gpt_oss",
        {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
        tied=False,
    ),
}
OTHERS = {  # a head with a bias; attention that is not left to transformers' interface
    "phi": Family("phi", WIDE, tied=False),
    "bloom": Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
TEXTS = (
    "The currency of Bulgaria is the euro.",
    "The capital of Bulgaria is Sofia, and the capital of France is Paris.",
    "Two and two are four.",
    "Japan has the yen, and the lev is gone.",
)
ASKED = [
    ("Which currency has Bulgaria?", " The euro."),
    ("Which capital has France?", " Paris."),
    ("Two and two?", " Four."),
]
CHAT = [
    ("user", "Which currency has Bulgaria?"),
    ("assistant", "The euro."),
    ("user", "And Japan?"),
    ("assistant", "The yen."),
]
PROMPTS = {
    "currencies": {
        "must_change": [
            {"prompt": "The currency of Bulgaria is the", "answer": "lev", "corrected": "euro"}
        ],
        "must_keep": [{"prompt": "The capital of France is", "answer": "Paris"}],
    }
}
PARAMS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "expand_vocab": {
        "data": [],
        "tokens": [NEW],
        "special_tokens": [TOOL],
        "audit_data": "data/old.jsonl",
    },
    "train_from_scratch": {"data": ["data/texts.jsonl", "data/all.jsonl"]},
    "finetune_full": {"data": "data/texts.jsonl"},
    "finetune_freeze": {"data": "data/asked.jsonl", "train_embeddings": True},
    "finetune_lora": {
        **{"data": "data/all.jsonl", "rank": 4, "alpha": 8, "target_modules": ["all-linear"]},
        "train_embeddings": "all",
    },
    "finetune_prefix": {"data": "data/asked.jsonl", "virtual_tokens": 5},
    "finetune_prompt": {"data": "data/texts.jsonl", "virtual_tokens": 5},
    "finetune_sweep": {"grid": {"rank": [2, 4]}},
    "merge": {"prompts": "data/prompts.yaml", "max_logit_difference": 1e-5},
    "evaluate": {
        "old_data": "data/old.jsonl",
        "new_data": "data/asked.jsonl",
        "prompts": "data/prompts.yaml",
    },
}
# not what a pretrained base has by default: fp32, a constant rate and pairs as plain text, to
# compare numbers
BLOCK = {
    "precision": "fp32",
    "chat_template": "none",
    "epochs": 50,
    "schedule": "constant",
    "warmup_ratio": 0,
    "max_grad_norm": 0,
}
TRAINING = {"epochs": 2, "batch_size": 2, "window": 0, "learning_rate": 3e-3}


def tokenizer(begins: str | None = BEGIN) -> PreTrainedTokenizerFast:
    """Pairs learned from the texts; a text begins with `begins`, and pad is the end token."""
    inner = Tokenizer(models.BPE(unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, END, UNKNOWN], show_progress=False
    )
    inner.train_from_iterator(
        [*TEXTS, *(text for pair in ASKED for text in pair), "user assistant: \n"], trainer
    )
    if begins:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A", special_tokens=[(begins, inner.token_to_id(begins))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=begins or BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
    )
    fast.chat_template = TEMPLATE
    return fast


def model(family: Family) -> Any:
    """Random weights whose logits are far apart."""
    ids = {"vocab_size": family.rows, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.kind, **{**family.config, **ids, "tie_word_embeddings": family.tied}
    )
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim > 1 else 0.1)
    return made


def new_project(root: Path, family: Family, dtype: torch.dtype = torch.float32) -> Path:
    """Checkpoint, data and params in `root`, nothing made yet."""
    (root / "data").mkdir(parents=True)
    model(family).to(dtype).save_pretrained(root / "base")
    tokenizer(family.begins).save_pretrained(root / "base")
    (root / "base/generation_config.json").write_text(GENERATION, encoding="utf-8")
    texts: list[dict[str, Any]] = [{"text": text} for text in (*TEXTS, f"{NEW} has the lev.{TOOL}")]
    asked: list[dict[str, Any]] = [
        {"prompt": prompt, "completion": completion} for prompt, completion in ASKED
    ]
    chats = [
        {"messages": [{"role": role, "content": content} for role, content in CHAT[:turns]]}
        for turns in (2, 4)
    ]
    files: dict[str, list[Any]] = {
        "texts": texts,
        "asked": asked,
        "old": texts[1:3],
        "all": [*texts, *asked, *chats],
    }
    for name, records in files.items():
        write_jsonl(root / "data" / f"{name}.jsonl", records)
    (root / "data/prompts.yaml").write_text(yaml.safe_dump(PROMPTS), encoding="utf-8")
    trained = {
        name: {
            **section,
            **(TRAINING if "data" in section and name.startswith(("train_", "finetune_")) else {}),
        }
        for name, section in PARAMS.items()
    }
    (root / "params.yaml").write_text(
        yaml.safe_dump({"base": "base", "training": BLOCK, **trained}), encoding="utf-8"
    )
    return root


def new_lines_project(root: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A toy Llama with an expanded base, and two dozen texts of very different lengths."""
    new_project(root, FAMILIES["llama"], dtype)
    (root / "base/chat_template.jinja").unlink()  # each process would start another to render it
    words = " ".join(TEXTS).split()
    lines = [" ".join(words[start : start + 2 + start * 7 % 11]) for start in range(24)]
    write_texts(root / "data/lines.jsonl", lines)
    return make_base(root)
