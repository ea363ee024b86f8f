"""Other tools' keys and values as ours: names by `aliases.KEYS`, values by the functions here.

A function (their key, value) → our value returns a `Why` for a value without a counterpart, and
None for one that sets nothing, such as `max_steps: -1`. `OtherNames` reads params files and
overrides: what has no counterpart is ignored where it changes no result, and an error where it does.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from pipeline.errors import UserError
from pipeline.project.params.aliases import IGNORED, IMPLIED, KEYS, by_other_name, why_none
from pipeline.project.params.schema import Section, ValueSource, check_value, hints

Tree = Mapping[Any, Any]
BITS = {"load_in_4bit": "nf4", "load_in_8bit": "int8", "4": "nf4", "8": "int8"}
# quantize the scales too
DOUBLE = ("double_quantization", "bnb_4bit_use_double_quant", "use_bnb_nested_quant")
NAMES: Mapping[str, Mapping[str, str]] = {  # our key → their name of a value → ours
    "schedule": by_other_name(
        {
            "constant": "constant constant_with_warmup",
            "linear": "linear linear_schedule",
            "cosine": "cosine cosine_decay cosine_with_min_lr",
            "cosine_with_restarts": "cosine_with_restarts",
            "polynomial": "polynomial",
            "inverse_sqrt": "inverse_sqrt",
            "warmup_stable_decay": "warmup_stable_decay",
        }
    ),
    "optimizer": by_other_name(
        {
            "adamw": "adam adamw adamw_torch adamw_torch_fused adamw_hf",
            "adamw-8bit": "adamw_bnb_8bit adamw_8bit",
            "paged-adamw-8bit": "paged_adamw_8bit",
            "sgd": "sgd",
            "muon": "muon",
        }
    ),
    "precision": by_other_name(
        {"bf16": "bfloat16 bf16", "fp16": "float16 fp16", "fp32": "float32 fp32"}
    ),
    "loss": by_other_name({"dpo": "sigmoid", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}),
    "init_lora_weights": by_other_name(
        {
            "kaiming": "True",
            "gaussian": "gaussian",
            "orthogonal": "orthogonal",
            "pissa": "pissa",
        }
    ),
}
SAME: Mapping[str, Any] = {  # their key → the only value, or the default, that there is here
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "label_smoothing_factor": 0.0,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "fan_in_fan_out": False,
    "megatron_core": "megatron.core",
    "train": True,
    "use_peft": True,
    "do_train": True,
    "stage": "sft",
    "training_mode": "normal",
    "inference_mode": True,
    "mask_prompt": True,
    "completion_only_loss": True,
    "assistant_only_loss": True,
    "average_tokens_across_devices": True,
    "num_layers": -1,
    "lora_layers": -1,
    "local_rank": -1,
    "skip_memory_metrics": True,
    "qalora_group_size": 16,
    "quantization_method": "bnb",
    "quantization_type": "nf4",
    "bnb_4bit_quant_type": "nf4",
}


class Why(str):
    """Why a value has no counterpart here."""


def translated(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Their key, their value, our key and our value of each setting in `tree`.

    Our value is a `Why` where there is none, and None where theirs sets nothing.
    """
    numbers = tree.get("lr_scheduler_kwargs")
    if isinstance(numbers, dict):  # transformers': each has a key of its own here
        others = {key: value for key, value in tree.items() if key != "lr_scheduler_kwargs"}
        tree = {**others, **{str(key): value for key, value in numbers.items()}}
    pairs = {theirs: _translate(theirs, value, section) for theirs, value in tree.items()}
    if tree.get("save_strategy", "steps") != "steps":
        for key in pairs.keys() & {"save_steps", "save_total_limit"}:
            pairs[key] = key, Why("save_strategy is not steps")
    doubled = ("quantization", "nf4") in pairs.values() and True in map(tree.get, DOUBLE)
    for theirs, (ours, value) in pairs.items():
        if doubled and theirs in DOUBLE:
            continue
        is_doubled = doubled and ours == "quantization"
        yield theirs, tree[theirs], ours, "nf4-dq" if is_doubled else value


def _translate(theirs: str, value: Any, section: str) -> tuple[str, Any]:
    ours = KEYS.get(f"{section}.{theirs}") or KEYS.get(theirs, theirs)
    is_off = value is False and ours not in ("gradient_checkpointing", "use_peft")
    if is_off or value in (None, "", "none", "no", [], {}) or SAME.get(theirs) == value:
        return ours, None  # not set, or as it always is here
    convert = partial(by_name, ours) if ours in NAMES else CONVERSIONS.get(ours)
    return ours, convert(theirs, value) if convert else value


def by_name(ours: str, theirs: str, value: Any) -> Any:
    """Our name of a value of a key in `NAMES`. bf16, fp16 and pissa_init are keys that name it."""
    if theirs in ("bf16", "fp16") and value in (True, "auto", "full"):
        return theirs
    # PEFT's pissa_niter_16 is PiSSA too
    name = "pissa" if theirs == "pissa_init" else str(value).partition("_niter")[0]
    known = dict.fromkeys(NAMES[ours].values())
    return NAMES[ours].get(name) or Why(f"values here are {', '.join(known)}")


def _quantization(theirs: str, value: Any) -> Any:
    if theirs in DOUBLE:
        return Why("double quantization is quantization: nf4-dq")
    bits = theirs if theirs in BITS and value is True else str(value)
    return BITS.get(bits) or Why("a base is quantized to int8, nf4 or nf4-dq")


def _target_modules(_: str, value: Any) -> Any:
    return ["all-linear"] if value in ("all", "all-linear", True) else _names(_, value)


def _layers_to_transform(theirs: str, value: Any) -> Any:
    """mlx-lm counts the last blocks, PEFT numbers them."""
    if theirs not in ("num_layers", "lora_layers"):
        return value
    return f"last {value}" if isinstance(value, int) and value > 0 else None


def _names(_: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"[\w., -]+", value):
        return Why("a regular expression: name the modules in a list")
    return [name.strip() for name in value.split(",")]


def _eval_share(_: str, value: Any) -> Any:
    if isinstance(value, int | float) and value >= 1:
        return Why("it is a number of examples; eval_share is a share, such as 0.1")
    return value


def _alpha(theirs: str, value: Any) -> Any:
    return Why("alpha is scale × rank") if theirs == "scale" else value


def _checkpointing(_: str, value: Any) -> Any:
    if value in ("selective", "full"):
        return value
    return "none" if value is False else "full"


def _epochs(_: str, value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else Why("epochs are whole numbers here")
    return value


def _if_positive(_: str, value: Any) -> Any:
    return None if isinstance(value, int | float) and value <= 0 else value


CONVERSIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "quantization": _quantization,
    "target_modules": _target_modules,
    "layers_to_transform": _layers_to_transform,
    "exclude_modules": _names,
    "modules_to_save": _names,
    "train_embeddings": lambda *_: Why(
        "new tokens are named in expand_vocab, and train with train_embeddings=new_rows"
    ),
    "alpha": _alpha,
    "gradient_checkpointing": _checkpointing,
    "eval_share": _eval_share,
    "epochs": _epochs,
    "chat_template": lambda *_: Why("the base's own chat template is used"),
    **dict.fromkeys(("max_steps", "warmup_steps", "patience"), _if_positive),
}


class OtherNames:
    """Reads trees of sections, keys and values; remembers what it took and what it ignored.

    `kinds`: name → class of a section. `above`: keys that stand above the sections.
    """

    def __init__(self, kinds: Mapping[str, type[Section]], above: Collection[str]) -> None:
        self._kinds, self._above = kinds, above
        self.spelled: dict[str, str] = {}  # our section or key → as it is written
        self._taken: dict[str, str] = {}  # as it is written → ours, with a value that is another
        self._ignored: dict[str, list[str]] = {}  # why → as it is written

    def read(self, tree: Tree, origin: ValueSource, below: Tree | None = None) -> dict[str, Any]:
        """The tree by our names; `below`: one by our names that it overrides.

        Unknown names stay. Raises UserError for a setting that cannot be taken.
        """
        result: dict[str, Any] = {}
        for written, value in tree.items():
            name = self._ours_above(written, value)
            if name in self._above:
                text = name if name != written else ""
                self._put(result, name, value, name, written, origin, text)
            elif name in self._kinds and (value is None or isinstance(value, dict)):
                if name in result:
                    raise UserError(
                        f"{origin.of(written)}: {written} is {name} here, which is there too. Put "
                        "the keys of both into one section."
                    )
                if name != written:
                    self._note(name, written, name)
                section_below = (below or {}).get(name) or {}
                self._read_section(result, name, written, value or {}, origin, section_below)
            elif name in self._kinds or not self.ignores(written, written):
                self._refuse_alone(name, value, origin)
                result[name] = value
        return result

    def ignores(self, key: Any, path: Any) -> bool:
        """Whether a key has no counterpart and changes no result; the note then says why."""
        why = why_none(str(key), IGNORED)
        if why:
            self._ignored.setdefault(why, []).append(str(path))
        return why is not None

    def ours(self, key: Any) -> Any:
        """Our name of a key; the key itself if it has no other."""
        return KEYS.get(key, key)

    @property
    def note(self) -> str:
        """What was taken and what was ignored, in one line; empty if there was neither."""
        parts, before = list[str](), None
        for written, ours in self._taken.items():
            section, _, key = written.rpartition(".")
            name = key if section == before else written
            parts.append(f"{name} {ours}" if parts else f"{name} is {ours} here")
            before = section or written
        texts = [f"{', '.join(parts)}: taken."] * bool(parts)
        texts += [f"{', '.join(paths)} ignored: {why}." for why, paths in self._ignored.items()]
        return " ".join(texts)

    def _refuse_alone(self, key: Any, value: Any, origin: ValueSource) -> None:
        """Raises UserError for a section's key above the sections, as other tools have it."""
        is_key = self.ours(key) != key or key in hints(self._kinds["training"])
        if is_key and value is not None and not isinstance(value, dict):
            raise UserError(
                f"{origin.file}: {key} stands above the sections. Put it into one, such as "
                f"finetune_lora; of another tool's config `lora new DIR --from {origin.file}` "
                "makes a project."
            )

    def _ours_above(self, written: Any, value: Any) -> Any:
        """Our name of a section, or of a key above the sections; `written` if there is no other."""
        ours = KEYS.get(written)
        is_section = ours in self._kinds and (value is None or isinstance(value, dict))
        is_other = written not in self._kinds and (is_section or ours in self._above)
        return ours if is_other else written

    def _read_section(
        self,
        result: dict[str, Any],
        section: str,
        written: str,
        keys: Tree,
        origin: ValueSource,
        below: Tree,
    ) -> None:
        types, values = hints(self._kinds[section]), dict[Any, Any]()
        result[section] = values
        for theirs, value, ours, converted in translated(keys, section):
            path, key = f"{written}.{theirs}", f"{section}.{ours}"
            if ours in self._above and (ours != theirs or key in KEYS):
                self._put(result, ours, value, ours, path, origin, ours)
            elif ours not in types or ours in self._above:
                if converted is None and theirs in SAME:
                    self._ignored.setdefault("it is always so here", []).append(path)
                elif not self.ignores(theirs, path):
                    values[theirs] = value  # unknown
            elif theirs == ours and (
                isinstance(converted, Why)
                or converted == value
                or (converted is None and type(value) is not int)
                or _fits(types[ours], value)
            ):
                self._put(values, ours, value, key, path, origin)
            elif isinstance(converted, Why):
                raise UserError(
                    f"{origin.of(path)}: {path} cannot be taken: {converted}. Change or remove it."
                )
            elif converted is None and not _fits(types[ours], value):
                if ours in below:
                    raise UserError(f"--set {path}: {value} sets nothing here. Set {key}.")
                self._ignored.setdefault("it sets nothing", []).append(path)
            else:
                new = value if converted is None else converted
                text = ours if theirs != ours or new == value else ""
                if new != value:
                    text = f"{text} {new}".replace("'", "").strip()
                check_value(types[ours], new, path, origin)
                self._put(values, ours, new, key, path, origin, text)
        for key, value in IMPLIED.get(written, {}).items():
            if key not in values and key not in below:
                values[key] = value
                self._taken[written] += f" with {key} {value}"

    def _put(
        self,
        values: dict[Any, Any],
        key: str,
        value: Any,
        ours: str,
        path: str,
        origin: ValueSource,
        text: str = "",
    ) -> None:
        """Set a key, unless another name of it stands there; two of theirs may say the same.

        `text`: our name, and a value that is another; empty for our own key.
        """
        if key in values:
            other = self.spelled.get(ours, ours)
            if not text or ours not in self.spelled or values[key] != value:
                raise UserError(
                    f"{origin.of(path)}: {other} and {path} are both {key}. Remove one of them."
                )
        values[key] = value
        if text:
            self._note(ours, path, text)

    def _note(self, ours: str, written: str, text: str) -> None:
        self.spelled[ours] = written
        self._taken[written] = text


def _fits(rule: Any, value: Any) -> bool:
    try:
        check_value(rule, value, "", ValueSource(""))
    except UserError:
        return False
    return True
