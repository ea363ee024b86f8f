"""Put an adapter on a model, name its tensors as PEFT does, and take it off by merging."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pipeline.adapters import lora
from pipeline.adapters.lora import LoRALinear
from pipeline.adapters.rows import EmbeddingRows, HeadRows
from pipeline.adapters.targets import resolve
from pipeline.errors import UserError
from pipeline.models.minigpt import MiniGPT
from pipeline.targets import HEAD

EMBEDDING = "embed_tokens"
ENDS = (EMBEDDING, HEAD)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter changes: `targets` get LoRA, `saved` modules train in full, `rows` train row by row."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)


def attach(model: MiniGPT, spec: AdapterSpec) -> None:
    """Freeze `model` and give it the adapter's trainable parts, in place. Raises UserError on a bad target."""
    names = resolve(model, spec.targets)
    trained = {*spec.saved, *spec.rows}
    if model.config.tie_embeddings and EMBEDDING in trained:
        trained.add(HEAD)
    taken = {name for name in names for other in trained if _is(name, other)}
    if taken:
        raise UserError(
            f"target_modules: {min(taken)} is trained in full or row by row already (train_embeddings). "
            "Leave it out of target_modules, or set train_embeddings to none."
        )
    model.requires_grad_(False)
    add_lora(model, names, spec.rank, spec.alpha)
    for name in spec.saved:
        model.get_submodule(_full_name(model, name)).requires_grad_(True)
    if spec.rows:
        _attach_rows(model, spec.rows)


def add_lora(model: nn.Module, names: Iterable[str], rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
    """Wrap the linears called `names`, in place; A and B in `dtype`, or each in its linear's own."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, LoRALinear(linear, rank, alpha, dtype))


def _attach_rows(model: MiniGPT, rows: dict[str, tuple[int, ...]]) -> None:
    embedding, head = model.embeddings, model.lm_head
    ids = {name: torch.tensor(indices, device=model.device) for name, indices in rows.items()}
    trained = {
        name: nn.Parameter(base.weight.detach()[ids[name]].clone())
        for name, base in ((EMBEDDING, embedding), (HEAD, head))
        if name in rows
    }
    if model.config.tie_embeddings:
        trained[HEAD], ids[HEAD] = trained[EMBEDDING], ids[EMBEDDING]
    if EMBEDDING in trained:
        model.set_submodule(_full_name(model, EMBEDDING), EmbeddingRows(embedding, ids[EMBEDDING], trained[EMBEDDING]))
    if HEAD in trained:
        model.lm_head = HeadRows(head, ids[HEAD], trained[HEAD])  # type: ignore[assignment]


def tensors(model: MiniGPT, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """The adapter's parameters on `model` by PEFT's key.

    As PEFT does, rows of a tied head are written under the embedding alone, a tied pair in full twice.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            found[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            found[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
        elif isinstance(module, EmbeddingRows | HeadRows) and name.rsplit(".", 1)[-1] in spec.rows:
            found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = module.rows
        elif any(_is(name, saved) for saved in spec.saved):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found[f"{PREFIX}{name}.weight"] = weight
    return found


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRA layer with its full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def merged_model(model: MiniGPT) -> MiniGPT:
    """A new plain model with the adapter's changes in its weights; `model` is untouched.

    A tied pair stays one matrix, changed once; it is untied only where LoRA changed the head alone.
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoRALinear):
            plain.set_submodule(name, lora.merged(module))
        elif isinstance(module, EmbeddingRows | HeadRows):
            plain.set_submodule(name, _with_rows(module))
    if plain.config.tie_embeddings:
        if torch.equal(plain.lm_head.weight, plain.embeddings.weight):
            plain.lm_head.weight = plain.embeddings.weight
        else:
            plain.config = replace(plain.config, tie_embeddings=False)
    return plain.eval()


def _with_rows(module: EmbeddingRows | HeadRows) -> nn.Module:
    plain: nn.Embedding | nn.Linear = copy.deepcopy(module.base)
    weight: Tensor = plain.weight.detach().clone()
    ids = module.ids if isinstance(module, HeadRows) else (module.slot >= 0).nonzero().flatten()
    order = torch.arange(len(ids)) if isinstance(module, HeadRows) else module.slot[ids]
    weight[ids] = module.rows.detach()[order]
    plain.weight = nn.Parameter(weight)
    return plain


def short_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The last names that mean exactly `names`, or, where there are none, `names` themselves."""
    last = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    return last if resolve(model, last) == list(names) else tuple(names)


def _full_name(model: nn.Module, name: str) -> str:
    found: list[str] = [full for full, _ in model.named_modules() if _is(full, name)]
    if len(found) != 1:
        raise UserError(f"the model has {len(found)} modules called {name}; an adapter needs exactly one.")
    return found[0]


def _is(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")
