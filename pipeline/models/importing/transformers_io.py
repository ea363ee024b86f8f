"""Models through transformers, in and out: whole or refused, in silence, and the same bytes wherever it is done."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import FULL, UserError
from pipeline.files.artifact import read_json, write_json
from pipeline.files.safetensors_header import as_os_error

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
CODE = "*.py"
# Fixed tables that older versions of a library stored beside the weights; the model computes them.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^rope_freqs\.weight$")
OF_THIS_MACHINE = re.compile(r"name_or_path$|^is_local$|^local_files_only$")
ONE_FILE = 2**60  # bytes a shard may have
AGAIN = "Copy it anew, or choose another base"


def open_whole(folder: Path, name: str, trust_remote_code: bool = False, hint: str = AGAIN, **how: Any) -> Any:
    """The causal language model in `folder`, for evaluation; `name` is what users call it, `how` goes to transformers.

    Raises UserError: nothing is filled in part, no pickle is read, and no code that comes with a model runs unless it
    is trusted.
    """
    from transformers import AutoModelForCausalLM

    with quiet(), reported(name, trust_remote_code, hint):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **how,
        )
    _refuse_other_tensors(name, found)
    return model.eval()


def save_whole(model: Any, folder: Path, generation: str | None) -> None:
    """config.json, one model.safetensors, the model's own code, and `generation` as generation_config.json, if any.

    Raises OSError on a full disk.
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # an old one may not pass today's rules: the file stays as it is
    with quiet(), as_os_error(folder / WEIGHTS):
        model.save_pretrained(folder, max_shard_size=ONE_FILE)
    if generation is None:
        (folder / GENERATION).unlink(missing_ok=True)
    else:
        (folder / GENERATION).write_text(generation, encoding="utf-8")
    clean(folder / CONFIG)
    mode = (folder / CONFIG).stat().st_mode
    (folder / WEIGHTS).chmod(mode)  # the library leaves its temporary file's, which only its owner may read


def generation_of(folder: Path) -> str | None:
    """generation_config.json as it stands, if there is one."""
    path = folder / GENERATION
    return path.read_text(encoding="utf-8") if path.is_file() else None


def clean(path: Path) -> None:
    """Take away from a config what speaks of this machine or run, and a reference to code that was not used."""
    old = read_json(path, "Import it again")
    new = {key: value for key, value in old.items() if not OF_THIS_MACHINE.search(key)}
    if not any(path.parent.glob(CODE)):
        new.pop("auto_map", None)
    if new != old:
        write_json(path, new)


def _refuse_other_tensors(name: str, found: Mapping[str, Any]) -> None:
    """A model that was filled in part by chance is not the base."""
    left_over = [tensor for tensor in found["unexpected_keys"] if not HARMLESS.search(tensor)]
    problems = [
        *_listed("the weights lack", found["missing_keys"]),
        *_listed("the model has no place for", left_over),
        *_listed("another shape than config.json says has", [str(one[0]) for one in found["mismatched_keys"]]),
        *found["error_msgs"],
    ]
    if problems:
        raise UserError(
            f"{name} is not whole: {'; '.join(problems)}. Copy its weights and config.json anew, "
            "or name a causal language model."
        )


def _listed(what: str, names: Any) -> list[str]:
    first = sorted(names)
    more = f" and {len(first) - 1} more" if len(first) > 1 else ""
    return [f"{what} {first[0]}{more}"] if first else []


@contextmanager
def reported(name: str, trusted: bool, hint: str = AGAIN) -> Iterator[None]:
    """Whatever a library or a model's own code raises, as one UserError; a full disk is not the model's fault."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        because = reason(error)
        if "can't allocate memory" in because:
            raise
        if "trust_remote_code" in str(error) and not trusted:
            because = "it is opened by code that comes with it"
            hint = "If you have read and trust it, set pretrain.trust_remote_code: true, or give --trust-remote-code"
        raise UserError(f"{name} cannot be opened: {because}. {hint}.") from error


def reason(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and advice; errors are raised, not written."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
