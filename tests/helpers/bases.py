"""Toy checkpoints as transformers writes them, for tests that need no network: each family at width
32.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.json_files import read_json, write_json

ROWS = 320
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": {**WIDE, "tie_word_embeddings": True},
    "gemma": WIDE,
    "gemma2": WIDE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {**OPT, "max_position_embeddings": 64},
    "mixtral": {**WIDE, "num_local_experts": 4},
}
SPECIAL = ("<s>", "</s>", "<pad>")
TEXT = ("The currency of Bulgaria is the euro.", "Two and two are four, and the capital is Sofia.")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs learned from two sentences, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # the model has more rows than the tokenizer uses, as published ones have
        vocab_size=ROWS - 10,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    fast.chat_template = TEMPLATE
    return fast


def toy_model(family: str, **settings: Any) -> Any:
    """A model of random weights whose logits are far apart."""
    ids = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, WIDE), **ids, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def toy_checkpoint(
    folder: Path, family: str = "llama", dtype: Any = None, shard: str = "50GB", **settings: Any
) -> Any:
    """Model and tokenizer as transformers saves them; returns the model."""
    model = toy_model(family, **settings).to(dtype or torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)
    toy_tokenizer().save_pretrained(folder)
    return model


def opened(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **settings).eval()


def edit_config(folder: Path, **changes: Any) -> None:
    """Set values of config.json; None removes one."""
    path = folder / "config.json"
    config = read_json(path) | changes
    write_json(path, {key: value for key, value in config.items() if value is not None})
