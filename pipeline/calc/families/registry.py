"""Builds the shapes of a Hugging Face `config.json`; one function per family.

Defaults are those of transformers, which leaves them out of its files.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from pipeline.calc.architecture import Architecture
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
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{source}: the architecture {family!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
            "Give the folder of its .safetensors files instead: their headers contain every shape."
        )
    built = replace(_builder(family)(Config(values, source)), family=family, source=source)
    if built.hidden * built.vocabulary * len(built.blocks) > 2**62:
        raise UserError(f"{source}: the shapes overflow: {built.total:,} parameters are more than any memory holds.")
    return built


def _is_minigpt(values: Mapping[str, Any]) -> bool:
    """Whether this project wrote the config: OPT with GELU, without dropout and BOS token."""
    markers = {"activation_function": "gelu", "dropout": 0.0, "layerdrop": 0.0, "bos_token_id": None}
    return all(key in values and values[key] == value for key, value in markers.items())


# Each family is built by the function of its name.
GPT_LIKE = frozenset({"gpt2", "gpt3", "gpt_neox", "minigpt", "opt", "roberta"})
LLAMA_LIKE = frozenset(
    {
        *("gemma2", "gemma3_text", "gpt_oss", "llama", "mistral", "mixtral", "olmo2", "phi3"),
        *("qwen2", "qwen3", "qwen3_moe", "smollm3"),
    }
)
FAMILIES = GPT_LIKE | LLAMA_LIKE


def _builder(family: str) -> Callable[[Config], Architecture]:
    """Imports only the module of this family: MiniGPT needs no Llama."""
    module: ModuleType
    if family in GPT_LIKE:
        from pipeline.calc.families import gpt_like as module
    else:
        from pipeline.calc.families import llama_like as module
    build: Callable[[Config], Architecture] = getattr(module, family)
    return build
