"""GGUF files of toy Llamas, written here tensor by tensor, and copies of GGUF files with something
changed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.bases import toy_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp stores them: the halves of each head interleaved."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def name_of(module: str) -> str:
    prefix, _, rest = module.removeprefix("model.layers.").partition(".")
    return NAMES.get(module) or f"blk.{prefix}.{NAMES[rest]}"


def heads_of(config: Any) -> dict[str, int]:
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(
    path: Path,
    model: Any,
    architecture: str = "llama",
    tokenizer: Any = None,
    pre: str = "gpt-2",
    **general: Any,
) -> None:
    """A Llama of transformers and a byte-level tokenizer (default: the toy one) in GGUF,
    unquantized.

    `general`: what the file says of itself.
    """
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    rows = config.vocab_size
    writer.add_name("toy")
    for key, value in general.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(rows)
    fast = tokenizer or toy_tokenizer()
    state = json.loads(fast.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([fast.convert_ids_to_tokens(i) or f"<unused{i}>" for i in range(rows)])
    # kinds of tokens: 1 normal, 3 control, 5 unused
    writer.add_token_types([3 if i < 3 else 1 if i < len(fast) else 5 for i in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if fast.chat_template:
        writer.add_chat_template(fast.chat_template)
    for name, tensor in model.state_dict().items():
        new = name_of(name.removesuffix(".weight"))
        heads = heads_of(config).get(new.split(".")[-1])
        writer.add_tensor(
            f"{new}.weight",
            (turned(tensor, heads) if heads else tensor).float().contiguous().numpy(),
        )
    finish(writer)


def write_adapter(path: Path, adapter: Path, config: Any, alpha: float) -> None:
    """A PEFT adapter on linear layers of a Llama, for llama.cpp's --lora."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, matrix = (
            name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        )
        new = name_of(module)
        heads = heads_of(config).get(new.split(".")[-1]) if matrix == "B" else None
        data = turned(tensor, heads) if heads else tensor
        writer.add_tensor(f"{new}.weight.lora_{matrix.lower()}", data.float().contiguous().numpy())
    finish(writer)


def rewritten(
    source: Path,
    target: Path,
    fields: Mapping[str, Any] | None = None,
    change: Callable[[str, Any], Any] = lambda _, data: data,
) -> Path:
    """A copy of a GGUF file with other values of `fields` (None removes one), and every tensor as
    `change(name, data)` returns it. Returns `target`.
    """
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    values = {
        key: [field.contents(), *field.types[:2]]
        for key, field in reader.fields.items()
        if "." in key
    }
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        str: gguf.GGUFValueType.STRING,
    }
    for key, value in (fields or {}).items():
        values[key] = [value, *(values[key][1:] if key in values else [kinds[type(value)]])]
    for key, (value, *types) in values.items():
        if value is not None and key != "general.architecture" and not key.startswith("GGUF."):
            writer.add_key_value(key, value, *types)
    for tensor in reader.tensors:
        writer.add_tensor(
            tensor.name, change(tensor.name, tensor.data), raw_dtype=tensor.tensor_type
        )
    finish(writer)
    return target
