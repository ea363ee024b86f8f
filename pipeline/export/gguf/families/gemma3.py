"""The text models of Gemma 3: other rotary positions in windows, normalized queries and keys."""

from typing import Any

from pipeline.export.gguf.families import (
    Config,
    Family,
    attention,
    rope,
    unsupported,
    window_period,
)
from pipeline.export.gguf.families.gemma2 import FIXED, norm_layout, query_scale

LARGE = 62  # blocks of the 27B


def _settings(config: Config) -> dict[str, Any]:
    query_scale(config, LARGE)
    whole, windows = (
        config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention")
    )
    local = rope(windows, ("default",))["rope.freq_base"]
    if local != 10_000:  # the default of every llama.cpp; old ones know no key for it
        raise unsupported("rope_parameters.sliding_attention.rope_theta", local)
    return {
        **attention(config),
        **rope(whole, ("default", "linear")),
        "rope.freq_base_swa": local,
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": window_period(config),
    }


FAMILY = Family(
    {"gemma3_text": "gemma3"},
    _settings,
    {**FIXED, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    norm_layout,
)
