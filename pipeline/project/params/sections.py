"""params.yaml as typed, checked, frozen dataclasses: one section a stage.

Precedence: the defaults below < params.yaml < `--set section.key=value`.
Every problem is a UserError that names key, rule, value and next step.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
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
Ranks = Annotated[Mapping[str, Count], AllowEmpty()]  # by a pattern of modules' names
Scales = Annotated[Mapping[str, Rate], AllowEmpty()]
Precision = Literal["fp32", "bf16", "fp16"]
Trained = Annotated[
    Literal["fp32", "bf16"],
    Because("gradients of fp16 weights cannot be unscaled, and an fp16 base takes fp32 adapters"),
]
Quantization = Literal["none", "int8", "nf4", "nf4-dq"]  # in how few bits; as the calculator calls them
Init = Literal["document", "gaussian", "kaiming", "orthogonal", "pissa"]  # how A and B begin: `adapters/init.py`


@dataclass(frozen=True)
class Training:
    """What every training stage needs. Defaults: the document's §9.2."""

    seed: Seed = 0
    data: str = "data/finetune.de.txt"
    epochs: Count = 50
    batch_size: Count = 4
    window: Steps = 4  # tokens a training window holds; it keeps its place in the sentence; 0: whole examples
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up, to the last step
    warmup_steps: Steps = 0
    clip_norm: Annotated[float, AtLeast(0)] = 0.0  # largest norm of the gradient; 0: any
    accumulate: Count = 1  # batches whose gradients make one step
    max_length: Steps = 0  # tokens after which an example is cut; 0: none is
    precision: Precision = "fp32"  # of the weights while they train, or stay frozen
    checkpointing: Literal["none", "selective", "full"] = "none"  # blocks run again in backward: less memory
    eval_share: Share = 0.0  # of the examples, held out by their hash
    eval_every: Steps = 0  # steps between evaluations; 0: an epoch
    patience: Steps = 0  # evaluations without a better loss before training stops at the best; 0: never

    @property
    def files(self) -> tuple[str, ...]:
        """The data files, one after the other."""
        return (self.data,)


@dataclass(frozen=True)
class Pretrain(Training):
    """MiniGPT's shape (the document's Introduction and §9) and its training, or the base that stands in its place."""

    base: str = "minigpt"  # or a checkpoint folder, a GGUF file, a hub id: imported instead of trained
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of an imported base's weights; auto: its own
    trust_remote_code: bool = False  # run the code that comes with a base
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
    data: Names = ("data/finetune.de.txt",)  # of MiniGPT: each new word gets a row
    tokens: Names = ()  # new words by name, for any base
    special_tokens: Names = ()  # new tokens of a base that splits words: left out of answers
    noise_std: Annotated[float, AtLeast(0)] = 0.02
    audit_data: str = "data/pretrain.de.txt"  # sentences on which nothing may change


@dataclass(frozen=True)
class Scratch(Training):
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
    dora: bool = False  # each output's length trains apart from its direction (Liu et al. 2024)
    rslora: bool = False  # the scale is alpha / √rank (Kalajdzievski 2023)
    init_lora_weights: Init = "document"
    loraplus_ratio: Rate = (
        1.0  # learning rate of B / that of A (Hayou et al. 2024); learning_rate is A's and all else's
    )
    train_embeddings: Literal["all", "new_rows", "none"] = "all"
    adapter_precision: Trained = "fp32"
    quantization: Quantization = "none"  # of the frozen linears of the blocks
    retain: File = ""  # texts on which answers are to stay the base's
    retain_weight: Annotated[float, AtLeast(0)] = 0.0  # of the divergence from the base in the loss
    retain_batch: Count = 8  # such texts a step

    @property
    def retains(self) -> bool:
        return bool(self.retain) and self.retain_weight > 0


SWEPT = (  # keys that a sweep may vary
    *("seed", "learning_rate", "schedule", "warmup_steps", "clip_norm", "loraplus_ratio"),
    *("rank", "alpha", "target_modules", "rank_pattern", "alpha_pattern", "rslora", "dora", "init_lora_weights"),
    "retain_weight",
)


Grid = Annotated[
    Mapping[str, tuple[Any, ...]],
    AllowEmpty(),
    GridOf(FinetuneLora, SWEPT, "adapters that train together can differ in"),
]


@dataclass(frozen=True)
class FinetuneSweep:
    """Adapters that train together: one for each combination of these values of finetune_lora's keys."""

    grid: Grid = field(default_factory=lambda: {"rank": (1, 2, 4, 8)})


@dataclass(frozen=True)
class FinetuneVirtual(Training):
    """Virtual tokens before every sequence train, and nothing else (§7)."""

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
    """The merged model must answer like base + adapter, on these prompts, within this difference."""

    prompts: str = "data/prompts.yaml"
    max_logit_difference: Rate = 1e-5


@dataclass(frozen=True)
class Evaluate:
    """What is asked of every variant."""

    old_data: str = "data/pretrain.de.txt"
    new_data: str = "data/finetune.de.txt"
    prompts: str = "data/prompts.yaml"
    top_k: Count = 5
    prompt_words: Count = 2  # words of a new sentence given before its completion is compared


Finetune = FinetuneFull | FinetuneFreeze | FinetuneLora | FinetuneVirtual | FinetuneSweep
Section = Any  # one of the classes above, or of the sections that are not the product's


@dataclass(frozen=True)
class Params:
    """All of params.yaml: the product's sections by name, and in `more` those of other stages.

    `written`: the sections in the file; the others have their defaults. `project`: path of the params file whose
    artifacts and settings this one builds on, relative to its folder, or empty. `file`: this file's name.
    """

    pretrain: Pretrain = field(default_factory=Pretrain)
    expand_vocab: ExpandVocab = field(default_factory=ExpandVocab)
    scratch: Scratch = field(default_factory=Scratch)
    finetune_full: FinetuneFull = field(default_factory=FinetuneFull)
    finetune_freeze: FinetuneFreeze = field(default_factory=FinetuneFreeze)
    finetune_lora: FinetuneLora = field(default_factory=FinetuneLora)
    finetune_prefix: FinetunePrefix = field(default_factory=FinetunePrefix)
    finetune_prompt: FinetunePrompt = field(default_factory=FinetunePrompt)
    finetune_sweep: FinetuneSweep = field(default_factory=FinetuneSweep)
    merge: Merge = field(default_factory=Merge)
    evaluate: Evaluate = field(default_factory=Evaluate)
    more: Mapping[str, Any] = field(default_factory=dict)
    written: frozenset[str] = field(default_factory=lambda: frozenset(SECTIONS))
    project: str = ""
    file: str = field(default="params.yaml", compare=False)

    def section(self, name: str) -> Section:
        """The section with this name, from the product or from `more`."""
        return self.more[name] if name in self.more else getattr(self, name)

    def of(self, kind: type[T]) -> T:
        """The section of this class in `more`."""
        return next(section for section in self.more.values() if isinstance(section, kind))

    def replaced(self, sections: Mapping[str, Section]) -> "Params":
        """A copy with some sections replaced."""
        product = {name: section for name, section in sections.items() if name in SECTIONS}
        return replace(self, more={**self.more, **{n: s for n, s in sections.items() if n not in product}}, **product)


SECTIONS: Mapping[str, type] = {
    name: hint for name, hint in get_type_hints(Params).items() if name not in ("more", "written", "project", "file")
}  # of the product
PROJECT = "project"  # the only key of params.yaml that is not a section


def load(path: Path, overrides: Sequence[str] = (), more: Mapping[str, type] = MappingProxyType({})) -> Params:
    """Read and check `path`, then apply `section.key=value` overrides. Raises UserError.

    `more`: name → class of further sections that the file may have.
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


def parse(
    text: str, path: Path, overrides: Sequence[str] = (), more: Mapping[str, type] = MappingProxyType({})
) -> Params:
    """Like `load`, for the text of `path`. Raises UserError."""
    tree = _read_tree(text, path)
    project = tree.pop(PROJECT, "")
    if not isinstance(project, str):
        raise UserError(f"{PROJECT} must be the path of a params file, got {project!r}. Edit {path.name}.")
    written = frozenset(tree)
    overridden = {_apply_override(tree, override) for override in overrides}
    if project and (inherited := sorted(tree.keys() - written)):
        raise UserError(f"--set {inherited[0]}: {path.name} has no such section. Set it in {project}, or add it here.")
    origin = ValueSource(path.name, frozenset({*overridden, *(tree.keys() - written)}))
    kinds = {**SECTIONS, **more}
    schema.reject_unknown_keys(tree, [*kinds, PROJECT], "", origin)
    sections = {name: schema.section(kinds[name], tree[name], name, origin) for name in tree}
    params = Params(
        more={name: kind() for name, kind in more.items()}, written=written, project=project, file=path.name
    )
    return params.replaced(sections)


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
    if not (equals and dot and key):
        raise UserError(f"--set takes section.key=value, such as finetune_lora.rank=8, got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an invalid date
        raise UserError(f"--set {path.strip()}: {text!r} is not a YAML value.") from None
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"--set {path.strip()}: {section} is not a section in the params file.")
    branch[key] = value
    return f"{section}.{key}"


def check(section: Section, name: str, key: str, value: Any, source: str) -> None:
    """Raises UserError if `value` is invalid for `key` of section `name`, given its other keys; `source`: its file."""
    hints = get_type_hints(type(section), include_extras=True)
    replace(section, **{key: schema.validate(hints[key], value, f"{name}.{key}", ValueSource(source))})


def rule(section: Section, key: str) -> str:
    """A description of the valid values of `key`, such as "a whole number, at least 1, below 2147483648"."""
    return schema.type_name(get_type_hints(type(section), include_extras=True)[key])
