"""Runs a model in mlx-lm, to compare an export with it. Imported only if mlx-lm is installed."""

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_adapters, load_model, load_tokenizer
from torch import Tensor

from pipeline.data.tokenizers.template_process import Rendered
from pipeline.models.load import read_config
from pipeline.models.save import reported, rope_settings


class MLX:
    """A checkpoint in mlx-lm with an adapter in its format; fp32, so that rounding is small."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        """Raises UserError if mlx-lm cannot open them."""
        self.name = f"mlx-lm {version('mlx-lm')}"
        self._base = base
        config = read_config(base)
        # mlx-lm takes its own default for a rotary setting that it does not find.
        settings = {key: value for key, value in rope_settings(config).items() if key not in config}
        with reported(str(base), trusted=False, hint="Export with --format merged"):
            self._model, _ = load_model(base, model_config=settings)
            if adapter is not None:
                load_adapters(self._model, str(adapter))
            self._model.eval()
            self._model.set_dtype(mx.float32)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._base)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V) in fp32."""
        return torch.tensor(self._model(mx.array([list(ids)]))[0].tolist())

    def encode(self, text: str) -> list[int]:
        """The ids that `mlx_lm.generate` reads for a text, or for a `Rendered` chat."""
        return list(self._tokenizer.encode(text, add_special_tokens=not isinstance(text, Rendered)))

    def generate(self, ids: Sequence[int], limit: int) -> tuple[list[int], float]:
        """The greedy continuation, up to an end token or `limit` tokens, and tokens per second."""
        start = perf_counter()
        new: list[int] = []
        for token, _ in generate_step(mx.array(list(ids)), self._model, max_tokens=limit):
            if token in self._tokenizer.eos_token_ids:
                break
            new.append(int(token))
        return new, len(new) / (perf_counter() - start)
