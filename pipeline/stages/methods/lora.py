"""LoRA (Hu et al. 2022): W' = W + s·BA, of which A and B train (the document's §2 to §5 and §9.2)."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import field

from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.files.patterns import end_match, one_budget
from pipeline.project.palette import Look
from pipeline.project.params.schema import ALLOW_EMPTY, Count, File, Rate, Weight
from pipeline.project.params.sections import AdapterTraining, Init
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.adapters.config import AdapterSpec
    from pipeline.calc.settings import FinetuningMethod
    from pipeline.models.base import CausalLM
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.stages.finetune import Attached

Ranks = Annotated[Mapping[str, Count], ALLOW_EMPTY]  # by a pattern of modules' names
Scales = Annotated[Mapping[str, Rate], ALLOW_EMPTY]


class FinetuneLora(AdapterTraining, frozen=True, kw_only=True):
    """A and B train, and embeddings and head as `train_embeddings` says (§9.2)."""

    learning_rate: Annotated[Rate, "of Adam; of A's and all else's, where loraplus_ratio raises B's"] = 2e-3
    rank: Annotated[Count, "rank of the update ΔW = BA: A is (rank, inputs), B is (outputs, rank)"] = 4
    alpha: Annotated[Rate, "the update is scaled by alpha / rank"] = 1.0
    target_modules: Annotated[
        tuple[str, ...], "linears that get LoRA: names, or attention, feed_forward, all-linear"
    ] = ("q_proj", "k_proj", "v_proj", "o_proj")
    rank_pattern: Annotated[
        Ranks, "other ranks by the end of a module's name (a pattern, as in PEFT), such as {v_proj: 8}"
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[Scales, "other alphas, likewise"] = field(default_factory=dict)
    dora: Annotated[bool, "train magnitude and direction apart (DoRA, Liu et al. 2024)"] = False
    rslora: Annotated[bool, "scale by alpha / √rank instead (Kalajdzievski 2023)"] = False
    init_lora_weights: Annotated[Init, "initialization of A and B; document: Gaussian A, B = 0"] = "document"
    loraplus_ratio: Annotated[
        Rate, "learning rate of B divided by A's (LoRA+, Hayou et al. 2024, who suggest about 16)"
    ] = 1.0
    train_embeddings: Annotated[
        Literal["all", "new_rows", "none"], "embeddings and head: all of them, expand_vocab's new rows, or none"
    ] = "all"
    retention_data: Annotated[File, "texts on which answers must stay the base's"] = ""
    retention_weight: Annotated[Weight, "weight of the KL divergence from the base on these texts; 0: off"] = 0.0
    retention_batch_size: Annotated[Count, "these texts per step"] = 8

    @property
    def retains(self) -> bool:
        return bool(self.retention_data) and self.retention_weight > 0


STAGE = method(
    "lora",
    __name__,
    FinetuneLora,
    output="lora_adapter",
    kind="adapter",
    data=("data", "retention_data"),
    summary="Train low-rank updates",
    title="LoRA",
    look=Look("#0072B2", "■", "-.", "xx"),
    order=3,
    pretrained={
        "learning_rate": 2e-4,
        "precision": "bf16",
        "rank": 8,
        "alpha": 16.0,
        "target_modules": ["attention"],  # whatever their names in the model family
        "train_embeddings": "new_rows",
    },
)


def attach(job: Job, settings: FinetuneLora, base: Base) -> Generator[Event, None, Attached]:
    """Attach A and B, with the retention loss if it is set."""
    from pipeline.adapters.attach import attach as attach_lora
    from pipeline.models.load import DTYPES
    from pipeline.stages.finetune import Attached

    folder = job.project.artifact("expand_vocab")
    spec = lora_spec(base.model, settings, new_rows(folder))
    texts = retain = None
    if settings.retention_weight:
        from pipeline.training.retention import RetentionLoss, load_retention_texts  # with generation, rarely needed

        texts = yield from load_retention_texts(job, settings, base)  # prompts completed by the plain base
    attach_lora(base.model, spec, DTYPES[settings.adapter_precision], settings.init_lora_weights)
    yield from note_wide_rank(base.model)
    if texts is not None:
        retain = RetentionLoss(base.model, texts, settings)
    return Attached(
        counted(spec, pissa=settings.init_lora_weights == "pissa"),
        save=lambda out: save_files(out, base, spec, folder),
        retain=retain,
        shardable=True,
    )


def counted(spec: AdapterSpec, pissa: bool = False) -> FinetuningMethod:
    """The method as the calculator's settings."""
    from pipeline.calc.settings import FinetuningMethod

    rows = max((len(ids) for ids in spec.rows.values()), default=0)
    return FinetuningMethod(
        "lora",
        spec.rank,
        spec.alpha,
        (spec.targets,) if isinstance(spec.targets, str) else spec.targets,
        tuple(spec.ranks.items()),
        spec.rslora,
        spec.dora,
        embeddings="all" if spec.saved else "new_rows" if rows else "none",
        new_rows=rows,
        pissa=pissa,
    )


@one_budget()
def lora_spec(model: CausalLM, settings: FinetuneLora, new: tuple[int, ...]) -> AdapterSpec:
    """Resolve the settings against the model. Raises UserError for a target or pattern that matches no layer."""
    from pipeline.adapters.attach import resolve, short_targets
    from pipeline.adapters.config import AdapterSpec

    rows = model.embedding_and_head[: 1 if model.shape.tied else 2]
    names = resolve(model, settings.target_modules)
    for key, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        _check_patterns(key, list(patterns), names)
    return AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=short_targets(model, names),
        ranks=settings.rank_pattern,
        alphas=settings.alpha_pattern,
        rslora=settings.rslora,
        dora=settings.dora,
        saved=model.embedding_and_head if settings.train_embeddings == "all" else (),
        rows=dict.fromkeys(rows, new) if settings.train_embeddings == "new_rows" and new else {},
    )


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for a pattern that matches no layer, and for two that match the same one.

    PEFT sorts patterns before matching, so that which of two applies would depend on their names.
    """
    for name in names:
        matches = [pattern for pattern in patterns if end_match(pattern, name, f"finetune_lora.{key}")]
        if len(matches) > 1:
            raise UserError(
                f"finetune_lora.{key}: {matches[0]!r} and {matches[1]!r} both match {name}. Remove one, or use more "
                "specific patterns, such as layers.0.self_attn.q_proj."
            )
    for pattern in patterns:
        if not any(end_match(pattern, name, f"finetune_lora.{key}") for name in names):
            adapted = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise UserError(
                f"finetune_lora.{key}: {pattern!r} matches no layer that gets LoRA ({adapted}). "
                "Fix the pattern, or add the layer to finetune_lora.target_modules."
            )


def note_wide_rank(model: CausalLM) -> Iterator[Event]:
    """Yields a note if the rank exceeds a matrix's smaller side: more parameters, but no more expressiveness (§2.4)."""
    from pipeline.adapters.attach import adapter_layers
    from pipeline.project.runner import Note

    for name, layer in adapter_layers(model):
        rank, max_rank = len(layer.lora_A), min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        if rank > max_rank:
            yield Note(f"finetune_lora.rank {rank} is more than {name} can use; its rank is at most {max_rank}")
            return


def new_rows(expanded: Path) -> tuple[int, ...]:
    """The token ids of the rows that expand_vocab added."""
    start, stop = read_manifest(expanded).get("new_rows", (0, 0))
    return tuple(range(start, stop))


def save_files(out: Path, base: Base, spec: AdapterSpec, folder: Path) -> Facts:
    """Write the adapter to `out`; `folder` is the base's. Returns the manifest's entries.

    For PiSSA these are `stored`, the files' rank, alpha and parameters, which differ from those that trained.
    """
    from pipeline.adapters.config import WEIGHTS
    from pipeline.adapters.peft.save import save_adapter, stored_spec
    from pipeline.files.safetensors_header import shapes

    save_adapter(out, base.model, spec, f"artifacts/{folder.name}")
    saved = stored_spec(base.model, spec)
    if saved is spec:
        return {}
    size = sum(prod(shape) for shape in shapes(out / WEIGHTS).values())
    return {"stored": {"rank": saved.rank, "alpha": saved.alpha}, "parameters": {"stored": size}}
