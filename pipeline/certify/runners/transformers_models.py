"""Runs a model in transformers with an adapter loaded by PEFT, transformers or TRL.

Run as a file, by the Python of an environment in which this package is not installed.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

# Models up to this many parameters are copied for another adapter, larger ones read again.
COPIED = 10**9
PREFIX = "base_model.model."  # of PEFT's keys in files
LIBRARIES = {
    "peft": ("peft", "transformers"),
    "transformers": ("transformers", "peft"),
    "trl": ("trl", "peft", "transformers"),
}


def _import_worker() -> Any:
    """`pipeline.files.worker` beside this file, without the packages that lie around `pipeline`."""
    root = Path(__file__).parents[2]
    for name, folder in (("pipeline", root), ("pipeline.files", root / "files")):
        spec = spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    from pipeline.files import worker

    return worker


class Models:
    """A base, and an adapter on it."""

    def __init__(self, engine: str, device: str) -> None:
        # all that loading needs: an environment without it cannot be used
        libraries = [import_module(name) for name in LIBRARIES[engine]]
        self.name = ", ".join(f"{lib.__name__} {lib.__version__}" for lib in libraries)
        self._engine, self._device = engine, device
        self._folder: str | None = None
        self._base: Any = None
        self._model: Any = None
        self._of_base: tuple[list[str], list[str]] = [], []

    def open(self, base: str, adapter: str | None, trust_remote_code: bool) -> dict[str, Any]:
        """Open a checkpoint in fp32, with an adapter if given."""
        self._model = None
        if base != self._folder:
            self._base = self._folder = None
            self._base = self._read_base(base, trust_remote_code)
            self._folder = base
        unread, missing = self._of_base
        model = self._base
        if adapter is not None:
            model = self._with_adapter(adapter)
            found_unread, found_missing = self._compare_keys(model, adapter)
            unread, missing = [*unread, *found_unread], [*missing, *found_missing]
        self._model = model.eval()
        rows = int(model.get_output_embeddings().weight.shape[0])
        return {"rows": rows, "unread": unread, "missing": missing}

    def _read_base(self, folder: str, trust_remote_code: bool) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, __version__

        # transformers 5 renamed the option
        key = "torch_dtype" if int(__version__.partition(".")[0]) < 5 else "dtype"
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            **{key: torch.float32},
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        unread, missing = (
            sorted(map(str, info.get(key, ()))) for key in ("unexpected_keys", "missing_keys")
        )
        self._of_base = unread, missing
        return model.to(self._device)

    def _with_adapter(self, adapter: str) -> Any:
        """The base with an adapter; the base itself stays as it is."""
        if self._base.num_parameters() <= COPIED:
            model = copy.deepcopy(self._base)
        else:
            model, self._base, self._folder = self._base, None, None
        if self._engine == "transformers":
            model.load_adapter(adapter)
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter)

    def _compare_keys(self, model: Any, adapter: str) -> tuple[list[str], list[str]]:
        """Keys of the adapter's file that were not loaded as they are, and keys it lacks.

        By what PEFT would save of the model, so that keys are compared in the file's spelling.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        stored = load_file(Path(adapter) / "adapter_model.safetensors")
        if self._engine == "transformers":
            loaded = {PREFIX + key: value for key, value in model.get_adapter_state_dict().items()}
        else:
            loaded = get_peft_model_state_dict(model)
        unread = [
            key
            for key, values in stored.items()
            if key not in loaded
            or loaded[key].shape != values.shape
            or not bool((loaded[key].float().cpu() == values.float()).all())
        ]
        # PEFT may save a copy of an embedding with LoRA, and need not
        missing = [key for key in set(loaded) - set(stored) if ".base_layer." not in key]
        return sorted(unread), sorted(missing)

    def logits(self, ids: Sequence[int]) -> bytes:
        """fp32 (T, V)."""
        import torch

        with torch.no_grad():
            given = torch.tensor([list(ids)], device=self._device)
            out = self._model(input_ids=given).logits[0]
        return bytes(out.float().cpu().contiguous().numpy().data)

    def generate(self, ids: Sequence[int], limit: int, ends: Sequence[int]) -> list[int]:
        """The greedy continuation without its end token."""
        import torch

        new: list[int] = []
        past, given = None, list(ids)
        with torch.no_grad():
            for _ in range(limit):
                out = self._model(
                    input_ids=torch.tensor([given], device=self._device),
                    past_key_values=past,
                    use_cache=True,
                )
                token = int(out.logits[0, -1].argmax())
                if token in ends:
                    break
                new.append(token)
                past, given = out.past_key_values, [token]
        return new


def chat_of(folder: str, messages: Sequence[dict[str, str]], **_: Any) -> list[int]:
    """The ids of a conversation, ready for an answer, by the tokenizer that a folder has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rendered = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


class Handler:
    """Answers requests with a model, and with the tokenizer of a folder."""

    def __init__(self, models: Any) -> None:
        self._models = models

    def answer(self, request: Any) -> Iterator[dict[str, Any]]:
        from pipeline.errors import UserError

        try:
            yield from self._answer(request.do, request.fields)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            # whatever a library raises for files from elsewhere
            lines = str(error).strip().splitlines() or [type(error).__name__]
            said = " ".join(line.strip() for line in lines[:2])
            raise UserError(f"{type(error).__name__}: {said[:600]}") from None

    def _answer(self, do: str, fields: Any) -> Iterator[dict[str, Any]]:
        if do == "start":
            yield {"event": "done", "name": self._models.name}
        elif do == "open":
            yield {"event": "done", **self._models.open(**fields)}
        elif do == "logits":
            yield {"event": "done", "data": self._models.logits(**fields)}
        elif do == "generate":
            yield {"event": "done", "answer": self._models.generate(**fields)}
        else:
            chat = getattr(self._models, "chat", chat_of)
            yield {"event": "done", "answer": chat(**fields)}


def serve(models: Callable[[], Any]) -> None:
    """Answer requests with what `models` makes."""
    worker = _import_worker()
    worker.serve(lambda: Handler(models()).answer, most_bytes=-1)


if __name__ == "__main__":
    serve(lambda: Models(*sys.argv[1:3]))
