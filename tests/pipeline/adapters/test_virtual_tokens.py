"""Prompt and prefix tuning against PEFT: the same numbers both ways, the same gradient, however
sequences are read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.virtual import attach_virtual_tokens, save_virtual
from pipeline.data.examples import IGNORED, Window
from pipeline.errors import UserError
from pipeline.inference.engine import load
from pipeline.models.base import CausalLM, VirtualTokens, packed_hidden_states
from pipeline.models.generate import generate
from pipeline.models.load import load_base
from pipeline.training.batches import collate
from pipeline.training.step import loss_of
from pipeline.weights.import_adapter import import_adapter
from tests.helpers import families
from tests.helpers.checkpoints import checkpoint, edit_adapter_config
from tests.helpers.real import loss_alone
from tests.helpers.side_by_side import theirs

N = 5
BLOCKS = ("llama", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "opt", "mixtral", "bloom")
CONFIGS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
IDS = torch.tensor([[5, 9, 70, 17, 3, 64, 2, 33, 12], [8, 31, 4, 4, 69, 20, 11, 5, 40]])

pytestmark = pytest.mark.filterwarnings("ignore")
each_kind = pytest.mark.parametrize("kind", CONFIGS)
each_model = pytest.mark.parametrize("name", ["minigpt", *BLOCKS])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of random weights, by the name of its family."""
    root = tmp_path_factory.mktemp("bases")

    def made(name: str) -> Path:
        folder = root / name
        if name == "minigpt" and not folder.exists():
            checkpoint(folder)
        elif not folder.exists():
            family = {**families.FAMILIES, **families.OTHERS}[name]
            families.model(family).save_pretrained(folder)
            families.tokenizer(family.begins).save_pretrained(folder)
        return folder

    return made


Bases = Callable[[str], Path]


def peft_of(base: Path, kind: str) -> Any:
    """PEFT's own model with random virtual tokens."""
    # its embeddings are narrower
    width = {"token_dim": 16} if (base.name, kind) == ("opt", "prompt") else {}
    torch.manual_seed(1)
    return get_peft_model(
        theirs(base), CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=N, **width)
    )


def their_logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """(B, T, V) of the tokens themselves."""
    logits: Tensor = model(input_ids=ids).logits
    return logits[:, -ids.shape[1] :]


def ours(base: Path, kind: str, noise: float = 0.1) -> CausalLM:
    """A base that reads virtual tokens, no longer those that it starts with."""
    model, tokenizer = load_base(base)
    attach_virtual_tokens(model, kind, N, len(tokenizer), seed=3)
    parameter = virtual(model).prompt_embeddings
    with torch.no_grad():
        parameter.add_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * noise
        )
    return model


def virtual(model: CausalLM) -> VirtualTokens:
    assert model.virtual is not None
    return model.virtual


# the same numbers as PEFT


@each_kind
@each_model
@torch.no_grad()
def test_peft_opens_what_is_saved_here_with_our_logits(
    bases: Bases, tmp_path: Path, name: str, kind: str
) -> None:
    base = bases(name)
    model = ours(base, kind)
    save_virtual(tmp_path, model, str(base))
    assert_close(model(IDS), their_logits(theirs(base, tmp_path)), atol=1e-4, rtol=1e-4)
    assert (model(IDS) - load(base).model(IDS)).abs().max() > 1e-2, (
        "the virtual tokens change nothing"
    )
    assert torch.equal(load(base, tmp_path).model(IDS), model(IDS))


@each_kind
@each_model
@torch.no_grad()
def test_what_peft_saved_loads_here_with_its_logits(
    bases: Bases, tmp_path: Path, name: str, kind: str
) -> None:
    peft = peft_of(bases(name), kind)
    peft.save_pretrained(tmp_path / "theirs")
    import_adapter(tmp_path / "theirs", bases(name), tmp_path / "mine")
    expected = their_logits(peft.eval())
    for adapter in ("theirs", "mine"):
        assert_close(
            load(bases(name), tmp_path / adapter).model(IDS), expected, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_a_prefix_that_peft_projected_loads_as_what_the_projection_made(
    bases: Bases, tmp_path: Path
) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=12
    )
    peft = get_peft_model(theirs(bases("llama")), config).eval()
    peft.save_pretrained(tmp_path)
    assert_close(
        load(bases("llama"), tmp_path).model(IDS), their_logits(peft), atol=1e-4, rtol=1e-4
    )


def sequences() -> list[Window]:
    """Of several lengths, the first labels of which do not count."""
    texts = [(5, 9, 70, 17, 3), (8, 31, 4), (64, 20, 11, 5, 40, 33, 12)]
    return [Window(0, ids[:-1], (IGNORED, *ids[2:])) for ids in texts]


@pytest.mark.parametrize("blocks", ["none", "full"])
@each_kind
@pytest.mark.parametrize("name", ["minigpt", "llama", "gemma2", "gpt2"])
def test_the_gradient_is_that_of_plain_autograd_through_pefts_model(
    bases: Bases, name: str, kind: str, blocks: Any
) -> None:
    """Ours reads all sequences in one row, PEFT each alone; blocks that run again in backward give
    the same.
    """
    model = ours(bases(name), kind)
    peft = peft_of(bases(name), kind).eval()  # GPT-2 has dropout
    (weight,) = [p for p in peft.parameters() if p.requires_grad]
    weight.data.copy_(virtual(model).prompt_embeddings)
    windows = sequences()
    labels = sum(label != IGNORED for window in windows for label in window.labels)
    expected = torch.stack([loss_alone(_Own(peft), window) for window in windows]).sum() / labels
    expected.backward()  # type: ignore[no-untyped-call]

    assert model.supports_packing
    model.train().checkpoint_blocks(blocks)
    loss = loss_of(model, collate(windows))
    loss.backward()  # type: ignore[no-untyped-call]
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_close(virtual(model).prompt_embeddings.grad, weight.grad, rtol=1e-3, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "virtual.prompt_embeddings"
    ]


class _Own:
    """PEFT's model, whose logits of the virtual tokens are left out."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor) -> Any:
        out = self.model(input_ids=input_ids)
        out.logits = out.logits[:, -input_ids.shape[1] :]
        return out


# however sequences are read


@each_kind
@each_model
@torch.no_grad()
def test_sequences_end_to_end_give_what_each_gives_alone(
    bases: Bases, name: str, kind: str
) -> None:
    model = ours(bases(name), kind)
    texts = [(5, 9, 70), (8,), (64, 20, 11, 5, 40)]
    assert model.supports_packing is (name != "bloom")
    for text, hidden in zip(texts, packed_hidden_states(model, texts), strict=True):
        assert_close(hidden, model.hidden_states(torch.tensor([text]))[0], atol=2e-5, rtol=1e-4)


@each_kind
@each_model
@torch.no_grad()
def test_a_cache_changes_nothing(bases: Bases, name: str, kind: str) -> None:
    """Part by part, a lone token first: a sliding window has then left some of the prefix
    behind.
    """
    model = ours(bases(name), kind)
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in IDS[:, :6].split_with_sizes([1, 4, 1], 1)]
    # where it stands in the text
    parts.append(model(IDS[:, 6:], torch.arange(6, 9).expand(2, 3), cache))
    assert_close(torch.cat(parts, 1), model(IDS), atol=1e-4, rtol=1e-4)


@each_kind
@torch.no_grad()
def test_in_16_bits_one_token_at_a_time_gives_what_a_whole_text_gives(
    bases: Bases, kind: str
) -> None:
    model = ours(bases("llama"), kind).bfloat16()
    found = tuple(generate(model, (5, 9), (), 6))
    for count, token in enumerate(found):
        logits = model(torch.tensor([[5, 9, *found[:count]]]))[0, -1].float()
        assert logits.max() - logits[token] < 0.1


@each_kind
@torch.no_grad()
def test_a_window_keeps_its_place_in_the_sentence_after_the_virtual_tokens(
    bases: Bases, kind: str
) -> None:
    """Positions 3 to 5 of a sentence are N + 3 to N + 5 of what the model reads."""
    model = ours(bases("minigpt"), kind)
    places = torch.tensor([[3, 4, 5]])
    found = model.hidden_states(IDS[:1, :3], places)
    table = model.body.get_submodule("embed_positions").weight
    assert isinstance(table, Tensor)
    # positions 0 to 2 are now as 3 to 5
    table[2 + N : 2 + N + 3] = table[2 + N + 3 : 2 + N + 6].clone()
    assert_close(found, model.hidden_states(IDS[:1, :3]))


@each_kind
def test_generation_ends_at_the_last_position(tmp_path: Path, kind: str) -> None:
    model = ours(checkpoint(tmp_path / "base", max_positions=12), kind)
    assert model.max_length == 12 - N
    assert len(list(generate(model, (5, 9, 7), (), 50))) == 12 - N - 3


# how they start


@each_kind
@pytest.mark.parametrize("name", ["minigpt", "llama", "gemma", "gemma2", "gpt2"])
@torch.no_grad()
def test_virtual_tokens_start_as_if_words_stood_there(bases: Bases, name: str, kind: str) -> None:
    """Of the tokenizer's, chosen by the seed: their embeddings as the base gives them out, or what
    it keeps of them.
    """
    base = bases(name)
    model = ours(base, kind, noise=0)
    plain, tokenizer = load_base(base)
    words = torch.randint(len(tokenizer), (1, N), generator=torch.Generator().manual_seed(3))
    after = plain(torch.cat((words, IDS[:1]), 1))[:, N:]
    assert_close(model(IDS[:1]), after, atol=2e-5, rtol=1e-4)


# what attention spends on them


# what is refused


@pytest.mark.parametrize("name", ["minigpt", "llama"])
@each_kind
def test_more_virtual_tokens_than_positions_are_refused(bases: Bases, name: str, kind: str) -> None:
    model = load_base(bases(name)).model
    positions = model.shape.positions
    with pytest.raises(
        UserError, match=f"finetune_{kind}.virtual_tokens must be below {positions}, the model's"
    ):
        attach_virtual_tokens(model, kind, positions, 70, 0)


def changes() -> Iterator[Any]:
    for kind in CONFIGS:
        yield (
            kind,
            {"num_virtual_tokens": 0},
            "num_virtual_tokens must be a whole number from 1, got 0",
        )
        yield (
            kind,
            {"num_virtual_tokens": True},
            "num_virtual_tokens must be a whole number from 1, got True",
        )
        yield kind, {"num_virtual_tokens": 4}, rf"prompt_embeddings has shape \[{N}, "
        yield (
            kind,
            {"num_virtual_tokens": 64},
            "num_virtual_tokens must be below the base's 64 positions, got 64",
        )
        yield (
            kind,
            {"num_transformer_submodules": 2},
            "num_transformer_submodules is 2; only 1 is supported",
        )
        yield kind, {"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'; only 'CAUSAL_LM'"
        yield (
            kind,
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save is \['lm_head'\]; it is not supported",
        )
    yield (
        "prefix",
        {"num_attention_heads": 2, "token_dim": 8},
        "num_attention_heads is 2, but the base has 1",
    )
    yield "prefix", {"num_layers": 1}, "num_layers is 1, but the base has 2"


@pytest.mark.parametrize(("kind", "change", "message"), changes())
def test_a_config_that_says_other_than_the_model_or_its_tensors_is_refused(
    bases: Bases, tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    save_virtual(tmp_path, ours(bases("llama"), kind), "")
    edit_adapter_config(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        load(bases("llama"), tmp_path)


@each_kind
def test_virtual_tokens_of_another_model_are_refused(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    save_virtual(tmp_path, ours(bases("llama"), kind), "")
    with pytest.raises(UserError, match=r"prompt_embeddings has shape .* expected"):
        load(bases("qwen3"), tmp_path)


@each_kind
def test_numbers_that_are_not_finite_are_refused(bases: Bases, tmp_path: Path, kind: str) -> None:
    model = ours(bases("minigpt"), kind)
    with torch.no_grad():
        virtual(model).prompt_embeddings[1, 2] = torch.nan
    save_virtual(tmp_path, model, "")
    with pytest.raises(UserError, match="prompt_embeddings is not finite"):
        load(bases("minigpt"), tmp_path)
