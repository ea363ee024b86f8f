"""params.yaml as typed, checked, frozen dataclasses: one section a stage.

Precedence: the defaults below < params.yaml < `--set section.key=value`.
Every problem is a UserError that names key, rule, value and next step.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml

from pipeline.errors import UserError
from pipeline.project.params import schema
from pipeline.project.params.schema import (
    AllowEmpty,
    AtLeast,
    Because,
    Count,
    File,
    GridOf,
    Names,
    Rate,
    Seed,
    Share,
    Steps,
    ValueSource,
)

T = TypeVar("T")
Kinds = Callable[[], Mapping[str, type]]  # gives name → class of sections
Ranks = Annotated[Mapping[str, Count], AllowEmpty()]  # by a pattern of modules' names
Scales = Annotated[Mapping[str, Rate], AllowEmpty()]
Precision = Literal["fp32", "bf16", "fp16"]
Trained = Annotated[
    Literal["fp32", "bf16"],
    Because("gradients of fp16 weights cannot be unscaled, and an fp16 base takes fp32 adapters"),
]
Quantization = Literal["none", "int8", "nf4", "nf4-dq"]  # names as in the calculator
Init = Literal["document", "gaussian", "kaiming", "orthogonal", "pissa"]  # see `adapters/lora.py`


@dataclass(frozen=True)
class Training:
    """What every training stage needs. Defaults: the document's §9.2."""

    seed: Seed = 0
    data: str = "data/finetune.de.txt"
    epochs: Count = 50
    batch_size: Count = 4
    window: Steps = 4  # tokens per training window, at its position in the sentence; 0: whole examples
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up, to the last step
    warmup_steps: Steps = 0
    max_grad_norm: Annotated[float, AtLeast(0)] = 0.0  # gradients are clipped to this norm; 0: never
    gradient_accumulation_steps: Count = 1  # batches per optimizer step
    max_length: Steps = 0  # examples are truncated to this many tokens; 0: never
    precision: Precision = "fp32"  # dtype of the weights, trained or frozen
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute blocks in backward
    eval_share: Share = 0.0  # share of the examples held out, selected by hash
    eval_every: Steps = 0  # steps between evaluations; 0: once per epoch
    patience: Steps = 0  # evaluations without improvement before training stops; 0: never

    @property
    def files(self) -> tuple[str, ...]:
        """The data files, one after the other."""
        return (self.data,)


@dataclass(frozen=True)
class Pretrain(Training):
    """MiniGPT's shape (the document's Introduction and §9) and its training, or the base that stands in its place."""

    # minigpt is trained; a checkpoint folder, a GGUF file or a hub id is imported instead
    base: str = field(default="minigpt", metadata={schema.TOP_LEVEL: True})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of an imported base's weights; auto: its own
    trust_remote_code: bool = False  # run code that comes with a base
    data: str = "data/pretrain.de.txt"
    epochs: Count = 60
    d_model: Count = 64
    layers: Count = 2
    heads: Count = 4
    feed_forward: Count = 256
    max_positions: Count = 32
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.heads):
            raise UserError(
                f"pretrain.d_model must be a multiple of 2 × pretrain.heads = {2 * self.heads} "
                f"(an even head size), got {self.d_model}. Change d_model or heads."
            )

    @property
    def imports(self) -> bool:
        """Whether a base is taken from elsewhere."""
        return self.base != "minigpt"


@dataclass(frozen=True)
class ExpandVocab:
    """New words: which files they come from, and how their rows start (§9.1)."""

    seed: Seed = 0
    data: Names = ("data/finetune.de.txt",)  # MiniGPT: files whose new words get a row
    tokens: Names = ()  # new words by name, for any base
    special_tokens: Names = ()  # for subword bases: not shown in answers
    noise_std: Annotated[float, AtLeast(0)] = 0.02
    audit_data: str = "data/pretrain.de.txt"  # sentences whose logits must not change


@dataclass(frozen=True)
class TrainFromScratch(Training):
    """A model of the base's shape with random weights learns old and new sentences together (§1, §7).

    60 epochs of both files are 1,200 steps: as many as pretraining and full fine-tuning take one after the other.
    """

    data: tuple[str, ...] = ("data/pretrain.de.txt", "data/finetune.de.txt")  # type: ignore[assignment] # see `files`
    epochs: Count = 60

    @property
    def files(self) -> tuple[str, ...]:
        return self.data


@dataclass(frozen=True)
class FinetuneFull(Training):
    """Every parameter trains."""


@dataclass(frozen=True)
class FinetuneFreeze(Training):
    """Layer freezing: the last blocks, embeddings and head train (§9.3)."""

    last_blocks: Annotated[int, AtLeast(0)] = 1
    train_embeddings: bool = True


@dataclass(frozen=True)
class FinetuneLora(Training):
    """A and B train, and embeddings and head as `train_embeddings` says (§9.2)."""

    learning_rate: Rate = 2e-3
    rank: Count = 4
    alpha: Rate = 1.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    rank_pattern: Ranks = field(default_factory=dict)  # another rank for modules whose name ends so, as in PEFT
    alpha_pattern: Scales = field(default_factory=dict)
    dora: bool = False  # train magnitude and direction apart (Liu et al. 2024)
    rslora: bool = False  # the scale is alpha / √rank (Kalajdzievski 2023)
    init_lora_weights: Init = "document"
    loraplus_ratio: Rate = (
        1.0  # learning rate of B / that of A (Hayou et al. 2024); learning_rate is A's and all else's
    )
    train_embeddings: Literal["all", "new_rows", "none"] = "all"
    adapter_precision: Trained = "fp32"
    quantization: Quantization = "none"  # of the frozen linears of the blocks
    retention_data: File = ""  # texts on which answers must stay the base's
    retention_weight: Annotated[float, AtLeast(0)] = 0.0  # weight of the KL divergence from the base
    retention_batch_size: Count = 8  # these texts per step

    @property
    def retains(self) -> bool:
        return bool(self.retention_data) and self.retention_weight > 0


SWEPT = (  # keys that a sweep may vary
    *("seed", "learning_rate", "schedule", "warmup_steps", "max_grad_norm", "loraplus_ratio"),
    *("rank", "alpha", "target_modules", "rank_pattern", "alpha_pattern", "rslora", "dora", "init_lora_weights"),
    "retention_weight",
)


Grid = Annotated[
    Mapping[str, tuple[Any, ...]],
    AllowEmpty(),
    GridOf(FinetuneLora, SWEPT, "adapters that train together can differ in"),
]


@dataclass(frozen=True)
class FinetuneSweep:
    """One adapter per combination of these values of finetune_lora's keys, trained in one pass."""

    grid: Grid = field(default_factory=lambda: {"rank": (1, 2, 4, 8)})


@dataclass(frozen=True)
class FinetuneVirtual(Training):
    """Only the virtual tokens before every sequence train (§7)."""

    virtual_tokens: Count = 20
    adapter_precision: Trained = "fp32"
    quantization: Quantization = "none"  # of the frozen linears of the blocks


@dataclass(frozen=True)
class FinetunePrefix(FinetuneVirtual):
    """Their keys and values in every block (Li & Liang 2021)."""

    learning_rate: Rate = 1e-2


@dataclass(frozen=True)
class FinetunePrompt(FinetuneVirtual):
    """Their embeddings (Lester et al. 2021)."""

    learning_rate: Rate = 3e-2


@dataclass(frozen=True)
class Merge:
    """The merged model's logits on these prompts must be those of base + adapter within this difference."""

    prompts: str = "data/prompts.yaml"
    max_logit_difference: Rate = 1e-5


@dataclass(frozen=True)
class Evaluate:
    """The data and prompts on which every variant is compared."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    prompts: str = "data/prompts.yaml"
    top_k: Count = 5
    prompt_words: Count = 2  # words of a new sentence given as its prompt


Finetune = FinetuneFull | FinetuneFreeze | FinetuneLora | FinetuneVirtual | FinetuneSweep
Section = Any  # one of the classes above, or of the sections that are not the product's


@dataclass(frozen=True)
class Params:
    """All of params.yaml: the product's sections by name, and in `more` those of other stages.

    `written`: the sections in the file; the others have their defaults, also those that only `kinds()` has. `project`:
    the params file whose artifacts and settings this one builds on, relative to its folder; empty where it stands
    alone. `file`: its name.
    """

    pretrain: Pretrain = field(default_factory=Pretrain)
    expand_vocab: ExpandVocab = field(default_factory=ExpandVocab)
    train_from_scratch: TrainFromScratch = field(default_factory=TrainFromScratch)
    finetune_full: FinetuneFull = field(default_factory=FinetuneFull)
    finetune_freeze: FinetuneFreeze = field(default_factory=FinetuneFreeze)
    finetune_lora: FinetuneLora = field(default_factory=FinetuneLora)
    finetune_prefix: FinetunePrefix = field(default_factory=FinetunePrefix)
    finetune_prompt: FinetunePrompt = field(default_factory=FinetunePrompt)
    finetune_sweep: FinetuneSweep = field(default_factory=FinetuneSweep)
    merge: Merge = field(default_factory=Merge)
    evaluate: Evaluate = field(default_factory=Evaluate)
    more: Mapping[str, Any] = field(default_factory=dict)
    kinds: Kinds = field(default=dict, compare=False)
    written: frozenset[str] = field(default_factory=lambda: frozenset(SECTIONS))
    project: str = ""
    file: str = field(default="params.yaml", compare=False)

    def section(self, name: str) -> Section:
        """The section of this name, the product's or another."""
        if name in SECTIONS:
            return getattr(self, name)
        return self.more[name] if name in self.more else self.kinds()[name]()

    def of(self, kind: type[T]) -> T:
        """The section of this class, of those that are not the product's."""
        return next((section for section in self.more.values() if isinstance(section, kind)), kind())

    def replaced(self, sections: Mapping[str, Section]) -> "Params":
        """A copy with some sections replaced."""
        product = {name: section for name, section in sections.items() if name in SECTIONS}
        return replace(self, more={**self.more, **{n: s for n, s in sections.items() if n not in product}}, **product)


SECTIONS: Mapping[str, type] = {
    name: hint
    for name, hint in get_type_hints(Params).items()
    if name not in ("more", "kinds", "written", "project", "file")
}  # of the product
PROJECT = "project"  # a key of params.yaml that is no section
TOP_LEVEL: Mapping[str, str] = {  # the others: key → the section that holds it in memory
    key.name: name for name, kind in SECTIONS.items() for key in fields(kind) if key.metadata.get(schema.TOP_LEVEL)
}


def load(path: Path, overrides: Sequence[str] = (), more: Kinds = dict) -> Params:
    """Read and check `path`, then apply `section.key=value` overrides. Raises UserError.

    `more`: gives name → class of the sections that it may have besides the product's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist. Run this in the project's folder, or name the file with --params."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Name a params file with --params.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse(text, path, overrides, more)


def parse(text: str, path: Path, overrides: Sequence[str] = (), more: Kinds = dict) -> Params:
    """Like `load`, for the text of `path`. Raises UserError."""
    tree = _read_tree(text, path)
    project = tree.pop(PROJECT, "")
    if not isinstance(project, str):
        raise UserError(f"{PROJECT} must be the path of a params file, got {project!r}. Edit {path.name}.")
    written = frozenset(TOP_LEVEL.get(key, key) for key in tree)
    overridden = {_apply_override(tree, override) for override in overrides}
    if project and (inherited := sorted(tree.keys() - written - TOP_LEVEL.keys())):
        raise UserError(f"--set {inherited[0]}: {path.name} has no such section. Set it in {project}, or add it here.")
    origin = ValueSource(path.name, frozenset({*overridden, *(tree.keys() - written)}))
    kinds = {**SECTIONS, **(more() if tree.keys() - SECTIONS.keys() - TOP_LEVEL.keys() else {})}
    schema.reject_unknown_keys(tree, [*kinds, *TOP_LEVEL, PROJECT], "", origin)
    above = {key: tree.pop(key) for key in TOP_LEVEL if key in tree}
    read = {name: schema.section(kinds[name], tree[name], name, origin) for name in tree}
    for key, value in above.items():
        section = read.get(TOP_LEVEL[key]) or SECTIONS[TOP_LEVEL[key]]()
        hint = get_type_hints(type(section), include_extras=True)[key]
        read[TOP_LEVEL[key]] = replace(section, **{key: schema.validate(hint, value, key, origin)})
    return Params(written=written, project=project, file=path.name, kinds=more).replaced(read)


def inherit(params: Params, parent: Params, files: Mapping[str, Collection[str]], prefix: str) -> Params:
    """`params` with the parent's sections for those that it does not have itself.

    `files`: section → its keys that name files. Their paths get the `prefix` that leads to the parent's folder.
    """
    inherited = {}
    for name in parent.written - params.written:
        section = parent.section(name)
        paths = {key: _prefix_paths(getattr(section, key), prefix) for key in files.get(name, ())}
        inherited[name] = replace(section, **paths)
    return params.replaced(inherited)


def _prefix_paths(value: Any, prefix: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_prefix_paths(path, prefix) for path in value)
    return value if not value or value.startswith("~") else Path(os.path.normpath(Path(prefix) / value)).as_posix()


def _read_tree(text: str, path: Path) -> dict[str, Any]:
    try:
        try:
            tree = yaml.load(text, _UniqueKeysInC)
        except yaml.YAMLError:  # read again in Python, whose message quotes the line
            tree = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as `pretrain:`, got {tree!r}.")
    return tree


class _Unique(yaml.constructor.SafeConstructor):
    """Rejects duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _UniqueKeys(_Unique, yaml.SafeLoader):
    pass


# Every command reads the params, and the C loader takes a tenth of the time. Not every build of PyYAML has it.
class _UniqueKeysInC(_Unique, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Set the override's value in the tree. Returns its section.key."""
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and (key if dot else section in TOP_LEVEL)):
        raise UserError(f"--set takes section.key=value, such as finetune_lora.rank=8, got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an invalid date
        raise UserError(f"--set {path.strip()}: {text!r} is not a YAML value.") from None
    if not dot:
        tree[section] = value
        return section
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"--set {path.strip()}: {section} is not a section in the params file.")
    branch[key] = value
    return f"{section}.{key}"


def check(section: Section, name: str, key: str, value: Any, source: str) -> None:
    """Raises UserError if `value` is invalid for `key` of section `name`, given its other keys; `source`: its file."""
    hints = get_type_hints(type(section), include_extras=True)
    replace(section, **{key: schema.validate(hints[key], value, key_path(name, key), ValueSource(source))})


def key_path(section: str, key: str) -> str:
    """A key as params.yaml has it: base, or section.key."""
    return key if TOP_LEVEL.get(key) == section else f"{section}.{key}"


def rule(section: Section, key: str) -> str:
    """A description of the valid values of `key`, such as "a whole number, at least 1, below 2147483648"."""
    return schema.type_name(get_type_hints(type(section), include_extras=True)[key])
