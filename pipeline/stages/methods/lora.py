"""LoRA (Hu et al. 2022): W' = W + s·BA, where A and B train."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import field

from pipeline.adapters.config import FOLD_BELOW
from pipeline.calc.method import (
    FinetuningMethod,
    TrainedBase,
    TrainedParts,
    matching_linears,
    projections,
)
from pipeline.calc.settings import PACK_UP_TO, QLORA, option
from pipeline.calc.target_modules import ALL_LINEAR, BLOCKS, GROUPS, matches_suffix, narrowed
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.files.patterns import end_match, end_pattern, one_budget, problem
from pipeline.project.params.schema import (
    ALLOW_EMPTY,
    Count,
    File,
    Names,
    Pretrained,
    Rate,
    ReadBy,
    Share,
    ValueSource,
    Weight,
)
from pipeline.project.params.sections import AdapterTraining, Init
from pipeline.project.stage_graph import Look
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.adapters.config import AdapterSpec
    from pipeline.calc.architecture import Architecture, Block, Linear
    from pipeline.calc.tape import Ops, Value
    from pipeline.models.base import CausalLM
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.stages.finetune import Attached, Continued

Ranks = Annotated[Mapping[str, Count], ALLOW_EMPTY]  # by a pattern of modules' names
Scales = Annotated[Mapping[str, Rate], ALLOW_EMPTY]


def _read_blocks(value: Any, _key: str, _origin: ValueSource) -> tuple[str, ...] | None:
    entries = tuple(map(str, value if isinstance(value, list) else [value]))
    return entries if all(map(BLOCKS.fullmatch, entries)) else None


BLOCKS_RULE = "numbers of blocks from 0, such as 3, 8-15 or last 8, or a list of these"
Blocks = Annotated[tuple[str, ...], ALLOW_EMPTY, ReadBy(_read_blocks, BLOCKS_RULE)]

# On a base of width WIDTH, RATE answers most of `python -m bench recipe` right. A wider base takes
# less, with the exponent FALL, which the authors of LoRA Without Regret fitted to Llama models
# (tinker-cookbook, get_lora_lr).
RATE, WIDTH, FALL = 1e-3, 576, 0.78


def rate_for(width: int) -> float:
    """LoRA's learning rate for a base whose hidden states have this width, in one digit."""
    return float(f"{RATE * min(1.0, WIDTH / width) ** FALL:.0e}")


class FinetuneLora(AdapterTraining, frozen=True, kw_only=True):
    """A and B train, and embeddings and head as `train_embeddings` says."""

    PRETRAINED: ClassVar[Mapping[str, Any]] = {
        # for a base of 8 billion parameters, or of unknown width
        "learning_rate": 2e-4,
        "rank": 16,
        "target_modules": ("all-linear",),  # whatever their names in the model family
        "train_embeddings": "new_rows",
    }
    ALPHA_PER_RANK: ClassVar[float] = 2.0  # on a pretrained base, where alpha is not set

    learning_rate: Annotated[Rate, "of A and all else; loraplus_ratio multiplies that of B"] = 2e-3
    rank: Annotated[
        Count, "rank of the update ΔW = BA: A is (rank, inputs), B is (outputs, rank)"
    ] = 4
    alpha: Annotated[
        Rate, "the update is scaled by alpha / rank; unset on a pretrained base, it is 2 × rank"
    ] = 1.0
    target_modules: Annotated[
        Names,
        "linears that get LoRA: names, or attention, feed_forward, all-linear. On a pretrained "
        "base take all-linear, which learns more than attention with as many parameters (LoRA "
        "Without Regret, 2025; PEFT's benchmark); leave the feed-forward layers out to save "
        "memory, or to reproduce Hu et al. 2022",
    ] = ("q_proj", "k_proj", "v_proj", "o_proj")
    target_parameters: Annotated[
        Names,
        "stacked weights of a mixture's experts that get LoRA, by the end of their names: "
        "mlp.experts.gate_up_proj, mlp.experts.down_proj. target_modules leaves experts out, as "
        "they are no linears",
    ] = ()
    layers_to_transform: Annotated[
        Blocks, "blocks that get LoRA, from 0: 3, 8-15, last 8, or a list of these; empty: all"
    ] = ()
    exclude_modules: Annotated[
        Names, "what target_modules leaves out: names of linears or ends of their full names"
    ] = ()
    rank_pattern: Annotated[
        Ranks,
        "other ranks by the end of a module's name (a pattern, as in PEFT), such as {v_proj: 8}",
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[Scales, "other alphas, likewise"] = field(default_factory=dict)
    dora: Annotated[bool, "train magnitude and direction apart (DoRA, Liu et al. 2024)"] = False
    rslora: Annotated[bool, "scale by alpha / √rank instead (Kalajdzievski 2023)"] = False
    init_lora_weights: Annotated[Init, "initialization of A and B; document: Gaussian A, B = 0"] = (
        "document"
    )
    loraplus_ratio: Annotated[
        Rate, "learning rate of B divided by A's (LoRA+, Hayou et al. 2024, who suggest about 16)"
    ] = 1.0
    lora_dropout: Annotated[
        Share,
        "share of the inputs of A zeroed in training, as in PEFT; leave it at 0 unless a small "
        "data set overfits",
    ] = 0.0
    train_embeddings: Annotated[
        Literal["all", "new_rows", "none"],
        "embeddings and head: all of them, expand_vocab's new rows, or none",
    ] = "all"
    modules_to_save: Annotated[
        Names,
        "modules that train in full and are saved beside A and B, by the ends of their names, as "
        "in PEFT: lm_head, norm; they cannot be quantized, nor exported as a GGUF adapter",
    ] = ()
    init_from: Annotated[
        File,
        "an adapter to train on from, ours or PEFT's; its rank, alpha, targets and what trains "
        "are taken over",
    ] = ""
    save_optimizer: Annotated[
        bool,
        "keep the optimizer's state beside the adapter, so that init_from goes on exactly where "
        "it stopped",
    ] = False
    retention_data: Annotated[File, "texts on which answers must stay the base's"] = ""
    retention_weight: Annotated[
        Weight, "weight of the KL divergence from the base on these texts; 0: off"
    ] = 0.0
    retention_batch_size: Annotated[Count, "these texts per step"] = 8

    @classmethod
    def pretrained(cls, base: Pretrained, given: Mapping[str, Any]) -> dict[str, Any]:
        """The learning rate follows the base's width, and alpha the rank unless it is set."""
        defaults = super().pretrained(base, given)
        if base.width and not cls.COMPARES:
            defaults["learning_rate"] = rate_for(base.width)
        return {**defaults, "alpha": cls.ALPHA_PER_RANK * given.get("rank", defaults["rank"])}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules and not self.target_parameters:
            raise UserError(
                "target_modules is empty, and so is target_parameters: nothing gets LoRA. Set one "
                "of them."
            )

    @property
    def retains(self) -> bool:
        return bool(self.retention_data) and self.retention_weight > 0


STAGE = method(
    "lora",
    __name__,
    FinetuneLora,
    output="lora_adapter",
    kind="adapter",
    data=("data", "eval_data", "retention_data", "init_from"),
    summary="Train low-rank updates",
    title="LoRA",
    look=Look("#0072B2", "■", "-.", "xx"),
    order=3,
)


def attach(job: Job, settings: FinetuneLora, base: Base) -> Generator[Event, None, Attached]:
    """Attach A and B, new or of an earlier run, and the retention loss if it is set."""
    from pipeline.adapters.attach import attach as attach_lora
    from pipeline.adapters.peft import stored_values
    from pipeline.models.load import DTYPES
    from pipeline.stages.finetune import Attached, Continued

    folder = job.project.artifact("expand_vocab")
    stored, continued = None, Continued()
    if settings.init_from:
        from pipeline.stages.init_from import read_init

        stored, continued = read_init(job, base.model, folder, settings.init_from)
        spec = replace(stored.spec, dropout=settings.lora_dropout)
    else:
        spec = lora_spec(base.model, settings, new_rows(folder), job.stage.section)
    texts = retain = None
    if settings.retention_weight:
        from pipeline.training.retention import RetentionLoss, load_retention_texts

        # before A and B are attached: the plain base completes the prompts, unless it is sharded
        texts = yield from load_retention_texts(
            job, settings, base, lambda: retain.as_base() if retain else nullcontext()
        )
    init = settings.init_lora_weights if stored is None else "document"
    attach_lora(base.model, spec, DTYPES[settings.adapter_precision], init)
    yield from note_wide_rank(base.model, job.stage.section)
    yield from note_experts(base.model, spec, settings.quantization, job.stage.section)
    if texts is not None:
        retain = RetentionLoss(base.model, texts, settings, first=continued.seen)
    # after the retention loss, which copies the base's weights that train in full
    if stored is not None:
        for parameter, value in stored_values(base.model, stored):
            parameter.data = value
        yield _describe_init(job, settings, spec, continued)
    return Attached(
        counted(spec, pissa=init == "pissa"),
        save=lambda out: save_files(out, base, spec, folder, settings),
        retain=retain,
        shardable=True,
        continued=continued,
    )


def _describe_init(
    job: Job, settings: FinetuneLora, spec: AdapterSpec, continued: Continued
) -> Event:
    from pipeline.project.runner import Note

    targets = spec.targets
    if not isinstance(targets, str):
        targets = ", ".join((*targets, *spec.parameters))
    begins = f", after its {continued.seen} steps on the same data" if continued.seen else ""
    state = " and its optimizer's state" if continued.state else ""
    return Note(
        f"{job.stage.name}: trains on from {settings.init_from}{state}{begins}: rank {spec.rank}, "
        f"alpha {spec.alpha:g}, {targets}"
    )


def counted(spec: AdapterSpec, pissa: bool = False) -> Lora:
    """The adapter as the calculator counts it."""
    rows = max(map(len, spec.rows.values()), default=0)
    embeddings = "new_rows" if rows else "none"
    return Lora(
        spec.rank,
        spec.alpha,
        (spec.targets,) if isinstance(spec.targets, str) else spec.targets,
        tuple(spec.ranks.items()),
        spec.rslora,
        spec.dora,
        spec.dropout,
        embeddings=embeddings,
        modules_to_save=spec.saved,
        new_rows=rows,
        pissa=pissa,
        target_parameters=spec.parameters,
    )


@one_budget()
def lora_spec(
    model: CausalLM, settings: FinetuneLora, new: tuple[int, ...], section: str = "finetune_lora"
) -> AdapterSpec:
    """The settings, resolved against the model; `new`: the rows of expand_vocab.

    Raises UserError for a target or pattern that matches no layer.
    """
    from pipeline.adapters.attach import resolve, short_targets
    from pipeline.adapters.config import AdapterSpec

    blocks = len(model.blocks)
    layers, excluded = settings.layers_to_transform, settings.exclude_modules
    names = narrowed(resolve(model, settings.target_modules), layers, excluded, blocks)
    stacked = list[str]()
    if settings.target_parameters:
        from pipeline.adapters.experts import resolve_parameters

        for name, parameters in resolve_parameters(model, settings.target_parameters).items():
            stacked += [f"{name}.{parameter}" for parameter in parameters]
        stacked = narrowed(stacked, layers, (), blocks)
    adapted = names + stacked
    _check_patterns(f"{section}.rank_pattern", list(settings.rank_pattern), adapted)
    _check_patterns(f"{section}.alpha_pattern", list(settings.alpha_pattern), adapted)

    saved = model.embedding_and_head if settings.train_embeddings == "all" else ()
    saved = tuple(dict.fromkeys((*saved, *settings.modules_to_save)))
    rows: Mapping[str, tuple[int, ...]] = {}
    if settings.train_embeddings == "new_rows" and new:
        ends = (model.embedding_name, model.head_name)
        if twice := [name for name in ends if any(map(name.endswith, saved))]:
            raise UserError(
                f"{section}.modules_to_save trains {twice[0]} in full, and train_embeddings "
                "new_rows trains rows of it. Set train_embeddings to all or none."
            )
        # a tied head has the embedding's rows
        rows = dict.fromkeys(model.embedding_and_head[: 1 if model.shape.tied else 2], new)
    return AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=short_targets(model, names),
        ranks=settings.rank_pattern,
        alphas=settings.alpha_pattern,
        rslora=settings.rslora,
        dora=settings.dora,
        dropout=settings.lora_dropout,
        saved=saved,
        rows=rows,
        # a short name is that of every block
        parameters=tuple(stacked) if layers else settings.target_parameters,
    )


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for a pattern that matches no layer, and for two that match the same one.

    PEFT sorts patterns before matching, so which of two applies would depend on their names.
    """
    for name in names:
        matches = [pattern for pattern in patterns if end_match(pattern, name, key)]
        if len(matches) > 1:
            raise UserError(
                f"{key}: {matches[0]!r} and {matches[1]!r} both match {name}. Remove one, or use "
                "more specific patterns, such as layers.0.self_attn.q_proj."
            )
    for pattern in patterns:
        if not any(end_match(pattern, name, key) for name in names):
            adapted = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise UserError(
                f"{key}: {pattern!r} matches no layer that gets LoRA ({adapted}). "
                f"Fix the pattern, or add the layer to {key.partition('.')[0]}.target_modules."
            )


def note_wide_rank(model: CausalLM, section: str = "finetune_lora") -> Iterator[Event]:
    """Yields a note if the rank exceeds a matrix's smaller side, above which nothing is gained."""
    from pipeline.adapters.attach import adapter_layers
    from pipeline.project.runner import Note

    for name, layer in adapter_layers(model):
        rank, max_rank = len(layer.lora_A), min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        if rank > max_rank:
            yield Note(
                f"{section}.rank {rank} is more than {name} can use; its rank is at most {max_rank}"
            )
            return


def note_experts(
    model: CausalLM, spec: AdapterSpec, quantization: str, section: str
) -> Iterator[Event]:
    """Yields notes if the model has experts that get no LoRA, or are not quantized."""
    from pipeline.project.runner import Note

    # most models have none, and do not load the module below
    if all(parameter.ndim < 3 for parameter in model.parameters()):
        return
    from pipeline.adapters.experts import expert_parameters

    names = expert_parameters(model)
    if names and quantization != "none":
        yield Note(
            f"{section}.quantization {quantization} is of linears: the experts keep their precision"
        )
    if names and not spec.parameters:
        yield Note(
            "experts get no LoRA: name them, "
            f"{section}.target_parameters=[{', '.join(names)}], to train them too"
        )


def new_rows(expanded: Path) -> tuple[int, ...]:
    """The token ids of the rows that expand_vocab added."""
    start, stop = read_manifest(expanded).get("new_rows", (0, 0))
    return tuple(range(start, stop))


def save_files(
    out: Path, base: Base, spec: AdapterSpec, folder: Path, settings: FinetuneLora
) -> Facts:
    """Write the adapter to `out`; `folder` is the base's. Returns entries of the manifest.

    Empty if the files have the settings' rank and alpha. Else those of the files: PiSSA's have
    twice the rank, and so more parameters than were trained; `init_from` keeps the adapter's own.
    """
    from pipeline.adapters.config import WEIGHTS
    from pipeline.adapters.peft import save_adapter, stored_spec
    from pipeline.files.safetensors_file import shapes

    save_adapter(out, base.model, spec, f"artifacts/{folder.name}")
    saved = stored_spec(base.model, spec)
    if (saved.rank, saved.alpha) == (settings.rank, settings.alpha):
        return {}
    facts: Facts = {"stored": {"rank": saved.rank, "alpha": saved.alpha}}
    if saved is not spec:
        facts["parameters"] = {"stored": sum(map(prod, shapes(out / WEIGHTS).values()))}
    return facts


# What the calculator counts, and what it adds to a simulated step.


def _parse_targets(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _parse_rank_patterns(texts: list[str]) -> tuple[tuple[str, int], ...]:
    """(pattern, rank) of each PATTERN=RANK. Raises UserError."""
    parsed = []
    for text in texts:
        pattern, _, rank = text.rpartition("=")
        if not pattern or not re.fullmatch(r"[0-9]{1,9}", rank) or not int(rank):
            raise UserError(
                f"rank-pattern takes PATTERN=RANK, such as q_proj=16, got {text[:60]!r}."
            )
        if reason := problem(end_pattern(pattern)):
            raise UserError(
                f"rank-pattern {pattern[:60]!r} is not a valid regular expression: {reason}."
            )
        parsed.append((pattern, int(rank)))
    return tuple(parsed)


NEW_ROWS = "new rows"
# names of embeddings in transformers' models
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


@dataclass(frozen=True)
class Lora(FinetuningMethod):
    """W + s·BA at chosen linears (Hu et al. 2021), with A (R, I), B (O, R) and s = α/r.

    `embeddings` and `new_rows`: what trains of embedding and head. `rank_pattern`: (pattern, rank),
    matched as PEFT does.
    """

    name = "lora"
    aliases = {"qlora": {"precision": QLORA}}  # noqa: RUF012
    columns = ("LoRA", "QLoRA")
    low_rank = True

    rank: int = option(8, "LoRA rank.", flags=("--rank", "--r"), least=1)
    alpha: float | None = option(None, "LoRA alpha; default: the rank.", kind=float, automatic=True)
    targets: tuple[str, ...] = option(
        ("attention",),
        "attention, feed_forward, all-linear, or module names: q_proj,v_proj.",
        parse=_parse_targets,
    )
    rank_pattern: tuple[tuple[str, int], ...] = option(
        (),
        "Rank for modules that match PATTERN, as in PEFT.",
        metavar="PATTERN=RANK",
        parse=_parse_rank_patterns,
    )
    rslora: bool = option(False, "Scale by alpha / √rank.")
    dora: bool = option(False, "DoRA: train magnitudes too.")
    lora_dropout: float = option(0.0, "LoRA dropout; memory depends on whether there is any.")
    embeddings: str = option(
        "none",
        "Train embedding and head with LoRA: none, all or new_rows.",
        choices=("none", "all", "new_rows"),
    )
    new_rows: int = option(
        0, "Number of embedding rows to train; sets --embeddings new_rows.", least=0
    )
    target_parameters: tuple[str, ...] = option(
        (),
        "A mixture's experts: mlp.experts.gate_up_proj,mlp.experts.down_proj.",
        parse=_parse_targets,
    )
    layers_to_transform: tuple[str, ...] = option(
        (), "Blocks that get LoRA: 3, 8-15, last 8; default: all.", parse=_parse_targets
    )
    exclude_modules: tuple[str, ...] = option(
        (), "Linears that --targets leaves out.", parse=_parse_targets
    )
    modules_to_save: tuple[str, ...] = option(
        (), "Modules that train in full: lm_head,embed_tokens.", parse=_parse_targets
    )
    pissa: bool = False  # our trainer keeps the initial A and B; PEFT changes the base instead

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """α/r, or α/√r with rsLoRA (Kalajdzievski 2023)."""
        return self.effective_alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def trained_rows(self) -> int:
        """New rows that train, in the embedding and in a head of its own; 0 if all rows train."""
        return 0 if self.embeddings == "all" else self.new_rows

    @property
    def title(self) -> str:
        name = "rsLoRA" if self.rslora else "LoRA"
        if self.dora:
            name = "DoRA"
        rows = f", {self.trained_rows} new rows" if self.trained_rows else ""
        ends = ", embeddings and head" if self.embeddings == "all" else rows
        for before, names in (
            (" in blocks ", self.layers_to_transform),
            (" but ", self.exclude_modules),
            (", all of ", self.modules_to_save),
        ):
            ends += before + ", ".join(names) if names else ""
        return (
            f"{name} r={self.rank} on {', '.join((*self.targets, *self.target_parameters))}{ends}"
        )

    def params(self) -> Mapping[str, Any]:
        targets: dict[str, Any] = {
            "target_modules": list(self.targets),
            "train_embeddings": self.embeddings,
        }
        lists = ("target_parameters", "layers_to_transform", "exclude_modules", "modules_to_save")
        for key in lists:
            if names := getattr(self, key):
                targets[key] = list(names)
        return {
            "rank": self.rank,
            "alpha": self.effective_alpha,
            "lora_dropout": self.lora_dropout,
            **targets,
        }

    def with_params(self, settings: FinetuneLora) -> Lora:
        """Without new rows: how many there are is known only once the vocabulary is expanded."""
        return replace(
            super().with_params(settings),
            targets=settings.target_modules,
            rank_pattern=tuple(settings.rank_pattern.items()),
            embeddings="all" if settings.train_embeddings == "all" else "none",
        )

    def check(self) -> None:
        super().check()
        if self.embeddings == "new_rows" and not self.new_rows:
            raise UserError("embeddings new_rows needs --new-rows, the number of trainable rows.")
        if not self.targets and not self.target_parameters:
            raise UserError(
                "targets is empty and matches no linear layer. Name linears, or "
                "--target-parameters."
            )
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UserError(f"alpha must be more than 0, got {self.alpha:g}.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"lora-dropout must be at least 0 and below 1, got {self.lora_dropout:g}."
            )

    def without_base(self) -> Lora:
        if self.embeddings != "all" and not self.modules_to_save:
            return self
        return replace(self, embeddings="none", new_rows=0, modules_to_save=())

    def with_rank(self, rank: int) -> Lora:
        return replace(self, rank=rank, rank_pattern=())

    # what it trains

    def adapted(self, model: Architecture) -> Mapping[str, int]:
        names, blocks = matching_linears(model, self.targets), len(model.blocks)
        names = narrowed(names, self.layers_to_transform, self.exclude_modules, blocks)
        named = {name: self._rank_of(name) for name in names}
        # PEFT adapts an expert's gate and up as two linears: as one tensor they get twice the rank
        if model.style.split_experts:
            named |= {
                name: self._rank_of(name, 2)
                for name in named
                if name.endswith("experts.gate_up_proj")
            }
        stacked = narrowed(self._stacked(model), self.layers_to_transform, (), blocks)
        return named | {name: self._rank_of(name) for name in stacked}

    def _stacked(self, model: Architecture) -> list[str]:
        """Full names of the experts' parameters that target_parameters means. Raises UserError."""
        experts = [name for name, linear in model.linears() if linear.experts > 1]
        for target in self.target_parameters:
            if not any(matches_suffix(name, target) for name in experts):
                known = ", ".join(
                    dict.fromkeys(
                        linear.name for _, linear in model.linears() if linear.experts > 1
                    )
                )
                raise UserError(
                    f"target_parameters: {target!r} matches no stacked experts. The model has "
                    f"{known or 'none'}."
                )
        return [
            name
            for name in experts
            if any(matches_suffix(name, target) for target in self.target_parameters)
        ]

    def _rank_of(self, name: str, factor: int = 1) -> int:
        """Rank by the first matching pattern, `(.*\\.)?(pattern)$` as in PEFT."""
        ranks = (
            rank for pattern, rank in self.rank_pattern if end_match(pattern, name, "rank_pattern")
        )
        return next(ranks, factor * self.rank)

    def linear_parameters(self, linear: Linear, rank: int) -> int:
        """Parameters of A and B, and DoRA's magnitude, one per output (Liu et al. 2024)."""
        return linear.lora(rank) + (linear.outputs * linear.experts if self.dora else 0)

    def trained_parts(self, model: Architecture) -> TrainedParts:
        matrices = {"matrices": sum(p.parameters for p in projections(model, self))}
        embedding, head = self._trained_ends(model)
        base = {}
        if linears := self._saved_linears(model):
            base["linears"] = sum(linear.parameters for linear in linears)
        if embedding:
            base["embeddings"] = model.embedding
        if head:  # without a tied head's bias
            # a tied head that trains alone gets a weight of its own
            base["head"] = model.embedding if not embedding else model.head - model.head_bias
        rows = {NEW_ROWS: self.trained_rows * model.embedding_width * (1 if model.tied else 2)}
        return TrainedParts(matrices | rows, base)

    def _trained_ends(self, model: Architecture) -> tuple[bool, bool]:
        """Whether the embedding trains in full, and whether the head does."""
        every, ends = self.embeddings == "all", self.modules_to_save
        embedding = any(name.endswith(ends) for name in EMBEDDINGS)
        return every or embedding, every or model.head_name.endswith(ends)

    def _saved_linears(self, model: Architecture) -> list[Linear]:
        """Those of the blocks that train in full."""
        linears = model.linears() if self.modules_to_save else ()
        return [
            linear
            for name, linear in linears
            if name.endswith(self.modules_to_save) and name != model.head_name
        ]

    def trained_base(self, model: Architecture) -> TrainedBase:
        return TrainedBase(len(model.blocks), ends=any(self._trained_ends(model)))

    def matrices(self, model: Architecture) -> list[tuple[int, int]]:
        saved = self._saved_linears(model)
        return super().matrices(model) + [(linear.outputs, linear.inputs) for linear in saved]

    def fp32_parameters(self, model: Architecture) -> int:
        """DoRA's magnitudes."""
        return sum(p.count * p.experts * p.magnitudes for p in projections(model, self))

    def factor_parameters(self, model: Architecture) -> int:
        return sum(p.parameters for p in projections(model, self)) - self.fp32_parameters(model)

    def buffer_bytes(self, model: Architecture, width: int) -> int:
        """DoRA's ‖W‖² in fp32, and PiSSA's initial A and B, which are subtracted from the trained
        ones.
        """
        initial = self.factor_parameters(model) * width if self.pissa else 0
        return 4 * self.fp32_parameters(model) + initial

    def simple_count(self, model: Architecture) -> int | None:
        """Parameters if every projection were d_model × d_model: 2·r·d_model each.

        None but for plain LoRA on separate attention projections.
        """
        if self.dora or self.rank_pattern or self.embeddings != "none" or self.new_rows:
            return None
        if self.modules_to_save:
            return None
        adapted = projections(model, self)
        separate = GROUPS["attention"][:5]  # q_proj, k_proj, v_proj, o_proj, out_proj
        if not all(p.name in separate and p.experts == 1 for p in adapted):
            return None
        return sum(p.count * 2 * self.rank * model.hidden for p in adapted)

    def notes(self, model: Architecture) -> list[str]:
        adapted, texts = projections(model, self), []
        if any("norm" in name for name in self.modules_to_save):
            texts.append("norms that train in full are not counted")
        wide = [p for p in adapted if p.rank > min(p.inputs, p.outputs)]
        if wide:
            p = min(wide, key=lambda p: min(p.inputs, p.outputs))
            texts.append(
                f"rank {p.rank} is more than {p.name} can use: its rank is at most "
                f"{min(p.inputs, p.outputs)}"
            )
        experts_by_modules = any(p.experts > 1 for p in adapted) and not self.target_parameters
        if experts_by_modules and model.style.split_experts:
            texts.append(
                "experts' gate and up are one tensor: it gets a rank for each, twice the rank, as "
                "in PEFT; training here adapts them by target_parameters"
            )
        elif experts_by_modules:
            texts.append(
                "experts are one tensor a layer: PEFT adapts them by target_parameters, not "
                "target_modules"
            )
        elif (
            ALL_LINEAR in self.targets
            and not self.target_parameters
            and any(linear.experts > 1 for linear in model.blocks[-1].linears)
        ):
            texts.append(
                "all-linear leaves these experts out, as PEFT does; feed_forward adapts them"
            )
        return texts

    # what it does to the step

    def embed(self, ops: Ops, x: Value, ids: Value) -> Value:
        """New rows are looked up in their own table (rows, D), then selected by id."""
        if not self.trained_rows:
            return x
        table = ops.adapter_weight(self.trained_rows * ops.model.embedding_width, NEW_ROWS)
        looked_up = ops.tape.op(elements=x.elements, width=ops.w, saves=[ids], weights=[table])
        return ops.tape.op(x, looked_up, saves=[ids])

    def new_logits(self, ops: Ops, x: Value, rows: int) -> Value | None:
        if not self.trained_rows:
            return None
        # a tied head reads the embedding's table, whose two gradients are then added
        name = NEW_ROWS if ops.model.tied else f"{NEW_ROWS} of the head"
        table = ops.adapter_weight(self.trained_rows * ops.model.embedding_width, name)
        return ops.tape.op(x, elements=rows * self.trained_rows, saves=[x], weights=[table])

    def fuse(self, ops: Ops, x: Value, block: Block, ranks: Sequence[int]) -> Value | None:
        """MiniGPT's block whose attention alone is adapted, all of it alike:
        `models/kernels/low_rank_block.py`.
        """
        t, n, w, run, rank = ops.tape, ops.n, ops.w, ops.run, ranks[0]
        wanted = [rank] * len(block.attention) + [0] * len(block.feed_forward)
        alike = [*ranks] == wanted and w == ops.adapter == 4
        is_long = run.length > max(run.attended, PACK_UP_TO)  # a packed row
        more = self.dora or self.pissa or self.lora_dropout or is_long
        if not ops.style.ours or not rank or not alike or more:
            return None
        row, inner = n * ops.model.hidden, n * block.feed_forward[0].outputs
        factors, folded = 4 * rank * ops.model.hidden, 4 * ops.model.hidden**2
        # the first norm's output, q, k and v, attention's output, the residual sum, the
        # activation's input, and A and B of the four linears, joined
        sizes = (row, 3 * row, row, row, inner, factors, factors)
        per_row = (n, n, n, n, n * ops.model.heads)  # means, 1/σ and attention's log-sums
        saved = [x, *(t.leaf(size, w) for size in (*per_row, *sizes))]
        # forward: the folded weights, before the activation's input and the output exist; or the
        # second norm's output and the activation's. Backward, less the gradient of x, which the
        # tape adds: two gradients of the activation; or the weights, folded again, beside gradients
        # of rows, at the end also beside those of the factors
        temp = max(folded - inner - row, row + inner)
        back = max(2 * inner - row, folded + max(7 * row, 5 * row + 2 * factors))
        weights = [ops.adapter_weight(factors // 4) for _ in range(8)]
        return t.op(x, saves=saved, weights=weights, temp=temp * w, back=back * w)

    def fold(self, ops: Ops, x: Value, linear: Linear, rank: int) -> Value | None:
        """(W + s·BA)x, as our layers compute small linears: the matrix costs less than another (N,
        O).
        """
        if self.lora_dropout:
            if ops.flat and (self.dora or self.pissa):
                return self._dropped_in_part(ops, x, linear, rank)
            return None
        if linear.weights >= FOLD_BELOW or (self.dora and not ops.flat):
            return None
        t, sizes = ops.tape, (rank * linear.inputs, rank * linear.outputs)
        factors = [t.leaf(2 * size, ops.w) for size in sizes] if self.pissa else []
        weights = [ops.adapter_weight(size) for size in sizes]
        w = t.op(elements=linear.weights, width=ops.w, weights=weights, saves=factors)
        if self.dora:
            w = self._scale_rows(ops, w, linear)
        return t.op(x, w, elements=ops.n * linear.outputs, saves=[x, w] if x.node else [x])

    def adapt(self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """y + s·BAx, with A and B of every expert in one tensor."""
        t = ops.tape
        x = self._drop(ops, x) if self.lora_dropout else x
        if self.dora and ops.flat:
            return self._scale_rows(ops, self._add_in_place(ops, y, x, linear, rank, rows), linear)
        if ops.run.ours and not self.dora:
            return self._add_in_place(ops, y, x, linear, rank, rows)
        b = self._low_rank(ops, x, linear, rank, rows)
        if self.dora:  # with dropout PEFT computes Wx once more, of dropout(x)
            b = self._scale_as_peft(
                ops, ops.matmul(x, linear, rows) if self.lora_dropout else y, b, linear
            )
        if b.width != y.width:  # 16-bit y + 32-bit update is 32-bit
            return ops.cast(t.op(y, b, width=b.width), y.width)
        return t.op(y, b, alias=True)

    def _drop(self, ops: Ops, x: Value) -> Value:
        """dropout(x), which saves its mask of bools; ours scales it in place."""
        x = ops.tape.op(x, saves=[ops.tape.leaf(x.elements, 1)])
        return ops.tape.op(x, view=True) if ops.flat else x

    def _dropped_in_part(self, ops: Ops, x: Value, linear: Linear, rank: int) -> Value:
        """Our DoRA and PiSSA with dropout: all of dropout(x), and the frozen part of the rest.

        The rest is x − dropout(x).
        """
        t, plain, size = ops.tape, replace(self, lora_dropout=0.0), ops.n * linear.outputs
        dropped = self._drop(ops, x)
        y = plain.fold(ops, dropped, linear, rank)
        if y is None:
            y = plain.adapt(ops, ops.matmul(dropped, linear, ops.n), dropped, linear, rank, ops.n)
        rest = t.op(x, dropped)
        frozen = ops.matmul(rest, linear, ops.n)
        if self.pissa:
            low = t.op(t.op(rest, elements=ops.n * rank), elements=size)
            frozen = t.op(frozen, t.op(low), alias=True)
        return t.op(y, frozen, alias=True)

    # Functions of their own, even if called once: what they do not save is freed when they return.

    def _add_in_place(
        self, ops: Ops, y: Value, x: Value, linear: Linear, rank: int, rows: int
    ) -> Value:
        """y += s·BAx, in our layers; PiSSA's factors are stacked with their initial values."""
        t, sizes = (
            ops.tape,
            (linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs),
        )
        copied = (ops.adapter != ops.w and not ops.run.keeps_copies) or self.pissa
        twice = 2 if self.pissa else 1
        A, B = ([t.leaf(twice * size, ops.w)] if copied else [] for size in sizes)
        a = t.op(
            x, elements=rows * twice * rank, saves=[x, *A], weights=[ops.adapter_weight(sizes[0])]
        )
        return t.op(
            y, a, view=True, alias=True, saves=[a, *B], weights=[ops.adapter_weight(sizes[1])]
        )

    def _low_rank(self, ops: Ops, x: Value, linear: Linear, rank: int, rows: int) -> Value:
        """s·BAx (rows, O). Casts A and B to the dtype of x; or x to theirs, once per linear, as
        PEFT does.
        """
        t, of_inputs = ops.tape, ops.run.casts == "inputs"
        sizes = linear.experts * rank * linear.inputs, linear.experts * rank * linear.outputs
        copied = ops.adapter != ops.w and not of_inputs
        A, B = ([t.leaf(size, ops.w)] if copied else [] for size in sizes)
        x = ops.cast(x, ops.adapter) if of_inputs else x
        a = t.op(x, elements=rows * rank, saves=[x, *A], weights=[ops.adapter_weight(sizes[0])])
        a = a if of_inputs else t.op(a)  # · s
        b = t.op(
            a, elements=rows * linear.outputs, saves=[a, *B], weights=[ops.adapter_weight(sizes[1])]
        )
        return t.op(b) if of_inputs else b  # · s

    def _scale_rows(self, ops: Ops, y: Value, linear: Linear) -> Value:
        """Our DoRA: m/norm · y in fp32, rounded once. Saves y, m/norm and the norm, one number per
        output each.
        """
        t, fp32 = ops.tape, 4 * y.elements
        if ops.run.keeps_copies:  # rounded where it is computed; norm and ratio are the step's
            return t.op(
                y, saves=[y], weights=[ops.fp32_weight(linear.outputs)], back=y.elements * ops.w
            )
        saved = [y, *(t.leaf(linear.outputs, 4) for _ in range(2))]
        y = t.op(y, width=4, saves=saved, weights=[ops.fp32_weight(linear.outputs)], back=fp32)
        return ops.cast(y, ops.w)

    def _scale_as_peft(self, ops: Ops, y: Value, b: Value, linear: Linear) -> Value:
        """(m/norm − 1)·Wx + m/norm·s·BAx; for the norm of W + s·BA PEFT computes that matrix."""
        t = ops.tape
        norm = (3 if ops.quantized else 2) * linear.weights * ops.w
        base = t.op(y, saves=[y], weights=[ops.adapter_weight(linear.outputs)], temp=norm)
        return t.op(base, t.op(b, saves=[b]), alias=True)


COUNTED = Lora()
