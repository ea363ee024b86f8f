"""Builds the shapes of a Hugging Face `config.json`; one function per family.

Defaults are those of transformers, which leaves them out of its files.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.calc.architecture import Architecture
from pipeline.calc.families import gpt_like, llama_like
from pipeline.calc.families.config import Config
from pipeline.errors import UserError


def architecture(values: Mapping[str, Any], source: str) -> Architecture:
    """The shapes of a config. Raises UserError, with the known families if this one is not supported."""
    if isinstance(values.get("text_config"), Mapping):  # a vision-language model: only its language model
        text = architecture({"model_type": f"{values.get('model_type')}_text", **values["text_config"]}, source)
        return replace(text, notes=(*text.notes, "text model only: the image encoder is not counted"))
    family = values.get("model_type")
    if family == "opt" and _is_minigpt(values):
        family = "minigpt"
    build = FAMILIES.get(family) if isinstance(family, str) else None
    if build is None:
        raise UserError(
            f"{source}: the architecture {family!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
            "Give the folder of its .safetensors files instead: their headers contain every shape."
        )
    built = replace(build(Config(values, source)), family=str(family), source=source)
    if built.hidden * built.vocabulary * len(built.blocks) > 2**62:
        raise UserError(f"{source}: the shapes overflow: {built.total:,} parameters are more than any memory holds.")
    return built


def _is_minigpt(values: Mapping[str, Any]) -> bool:
    """Whether this project wrote the config: OPT with GELU, without dropout and BOS token."""
    markers = {"activation_function": "gelu", "dropout": 0.0, "layerdrop": 0.0, "bos_token_id": None}
    return all(key in values and values[key] == value for key, value in markers.items())


FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "gemma2": llama_like.gemma2,
    "gemma3_text": llama_like.gemma3,
    "gpt2": gpt_like.gpt2,
    "gpt3": gpt_like.gpt3,
    "gpt_neox": gpt_like.gpt_neox,
    "gpt_oss": llama_like.gpt_oss,
    "llama": llama_like.llama,
    "minigpt": gpt_like.minigpt,
    "mistral": llama_like.mistral,
    "mixtral": llama_like.mixtral,
    "olmo2": llama_like.olmo2,
    "opt": gpt_like.opt,
    "phi3": llama_like.phi3,
    "qwen2": llama_like.qwen2,
    "qwen3": llama_like.qwen3,
    "qwen3_moe": llama_like.qwen3_moe,
    "roberta": gpt_like.roberta,
    "smollm3": llama_like.smollm3,
}
