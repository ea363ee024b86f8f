"""GPT-2: learned positions, q, k and v in one matrix, weights stored as (in, out)."""

from typing import Any

from pipeline.export.gguf.families import Config, Family, Layout


def _settings(config: Config) -> dict[str, Any]:
    return {
        "block_count": config["n_layer"],
        "context_length": config["n_positions"],
        "embedding_length": config["n_embd"],
        "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
        "attention.head_count": config["n_head"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "vocab_size": config["vocab_size"],
    }


FAMILY = Family(
    {"gpt2": "gpt2"},
    _settings,
    {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    lambda _config, name: Layout(
        transposed=name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    ),
)
