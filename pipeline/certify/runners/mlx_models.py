"""Runs a checkpoint in mlx-lm, with an adapter in its format.

Run as a file, by the Python of an environment in which this package is not installed.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))


class Models:
    """A base, and an adapter on it; fp32, so that rounding is small."""

    def __init__(self) -> None:
        import_module("mlx_lm")
        self.name = f"mlx-lm {version('mlx-lm')}"
        self._model: Any = None

    def open(self, base: str, adapter: str | None, **_: object) -> dict[str, Any]:
        """Open a checkpoint, with an adapter if given."""
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.utils import load_adapters, load_model

        self._model = None
        model, _ = load_model(Path(base))
        unread: list[str] = []
        missing: list[str] = []
        if adapter is not None:
            load_adapters(model, adapter)
            stored: Any = mx.load(str(Path(adapter) / "adapters.safetensors"))
            loaded = dict(tree_flatten(model.parameters()))
            unread = [
                key
                for key, value in stored.items()
                if key not in loaded
                or loaded[key].shape != value.shape
                or not bool((loaded[key].astype(mx.float32) == value.astype(mx.float32)).all())
            ]
            missing = [
                key for key in loaded if key not in stored and key.endswith((".lora_a", ".lora_b"))
            ]
        model.eval()
        model.set_dtype(mx.float32)
        self._model = model
        rows = int(model(mx.array([[0]])).shape[-1])
        return {"rows": rows, "unread": sorted(unread), "missing": sorted(missing)}

    def logits(self, ids: Sequence[int]) -> bytes:
        """fp32 (T, V)."""
        import mlx.core as mx
        import numpy as np

        out = self._model(mx.array([list(ids)]))[0].astype(mx.float32)
        return bytes(np.ascontiguousarray(np.array(out)).data)

    def generate(self, ids: Sequence[int], limit: int, ends: Sequence[int]) -> list[int]:
        """The greedy continuation without its end token."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        new: list[int] = []
        for token, _ in generate_step(mx.array(list(ids)), self._model, max_tokens=limit):
            if int(token) in ends:
                break
            new.append(int(token))
        return new


if __name__ == "__main__":
    import_module("transformers_models").serve(Models)
