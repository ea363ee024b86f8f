"""Qwen 3, whose queries and keys are normalized, and with a mixture of experts in every block."""

from pipeline.export.gguf.families import Family, gate_and_up, mixture, rotary

FAMILY = Family(
    {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"},
    lambda config: {**rotary(config, ("default", "linear", "yarn")), **mixture(config)},
    {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        # llama.cpp makes the weights of a token's experts sum to 1
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    split=gate_and_up,
)
