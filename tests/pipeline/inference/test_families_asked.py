"""Outputs of models of each family: in this project, its commands, the inference process and
transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.inference import engine
from pipeline.inference.handlers import RequestHandler
from pipeline.models.generate import Sampling, generate
from pipeline.models.load import load_base
from pipeline.models.transformers_model import TransformersModel
from pipeline.stages.registry import open_project
from tests.conftest import Lora
from tests.helpers.families import END, FAMILIES, NEW, TOOL
from tests.helpers.side_by_side import theirs

PROMPT = "The currency of Bulgaria is the"
Made = Callable[[str], Path]
Talk = tuple[RequestHandler, Path]

# sampled: the same families in every test
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.sampled(3), pytest.mark.slow]
each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
@pytest.mark.sampled(9)
def test_sequences_end_to_end_and_places_that_do_not_begin_at_0_are_read_as_transformers_does(
    family: Made, name: str
) -> None:
    folder = family(name) / "artifacts/expanded"
    model, reference = load_base(folder).model, theirs(folder)
    assert model.supports_packing
    ids = torch.randint(0, 120, (1, 24), generator=torch.Generator().manual_seed(0))
    lengths = [9, 1, 14]
    positions = torch.cat(
        [
            torch.arange(start, start + length)
            for start, length in zip((0, 7, 11), lengths, strict=True)
        ]
    )
    with torch.no_grad():
        packed = model.logits(model.hidden_states(ids, positions[None], lengths))[0].split(lengths)  # type: ignore[no-untyped-call]
        for row, row_positions, logits in zip(
            ids[0].split(lengths),  # type: ignore[no-untyped-call]
            positions.split(lengths),  # type: ignore[no-untyped-call]
            packed,
            strict=True,
        ):
            expected = reference(input_ids=row[None], position_ids=row_positions[None]).logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@each_family
def test_an_end_token_that_is_the_pad_token_learns_as_any_other(family: Made, name: str) -> None:
    model, tokenizer = load_base(family(name) / "artifacts/expanded")
    assert tokenizer.end_id == tokenizer.id_of_token(END) == 1
    torch.autograd.backward(
        model.logits(model.hidden_states(torch.tensor([[5, 1, 9]]))[:, -1])[0, 7]
    )
    weight = model.embeddings.weight
    assert isinstance(weight, torch.Tensor) and weight.grad is not None
    assert weight.grad[1].abs().max() > 0


@each_family
def test_generation_with_a_cache_is_that_of_transformers(family: Made, name: str) -> None:
    """Twenty tokens: four times the sliding window, where a family has one."""
    loaded = engine.load(family(name) / "artifacts/lora_merged")
    prompt = loaded.tokenizer.encode(PROMPT)
    generated = [*prompt, *generate(loaded.model, prompt, (), 20)]
    reference = theirs(loaded.base)
    with torch.no_grad():
        for t in range(len(prompt), len(generated)):
            scores = reference(input_ids=torch.tensor([generated[:t]]), use_cache=False).logits[
                0, -1
            ]
            assert scores[generated[t]] >= scores.max() - 1e-4


@each_family
def test_prompt_compare_and_verify_answer(family: Made, name: str, cli: Lora) -> None:
    root = family(name)
    code, out, err = cli(
        "prompt", PROMPT, "--adapter", "artifacts/lora_adapter", "--json", cwd=root
    )
    assert (code, err) == (0, "")
    loaded = engine.load(root / "artifacts/expanded", root / "artifacts/lora_adapter")
    assert json.loads(out)["top_k"] == [vars(choice) for choice in engine.top_k(loaded, PROMPT, 5)]
    code, out, err = cli("compare", PROMPT, "--json", cwd=root)
    assert (code, err) == (0, "")
    assert list(json.loads(out)) == list(open_project(root / "params.yaml").variants)
    code, out, err = cli("adapters", "verify", "artifacts/lora_adapter", cwd=root)
    assert (code, err) == (0, "")
    assert "files, names, shapes and base are those it was trained with" in out


@pytest.fixture(params=FAMILIES)
def talk(request: pytest.FixtureRequest, family: Made) -> Talk:
    """A request handler with a family's expanded base and its adapter loaded, and the folder of its
    artifacts.
    """
    handler, artifacts = RequestHandler(), family(request.param) / "artifacts"
    base = str(artifacts / "expanded")
    for name, adapter in (("base", None), ("tuned", str(artifacts / "lora_adapter"))):
        answer = ask(handler, "load", name=name, base=base, adapter=adapter)[-1]
        expected = {"chat": True, "resident": adapter is not None}
        assert expected.items() <= answer.items()
    return handler, artifacts


def ask(handler: RequestHandler, do: str, **fields: Any) -> list[dict[str, Any]]:
    return list(handler.answer(do, {"do": do, **fields}))


def test_strength_0_is_the_base_and_strength_1_the_adapter(talk: Talk) -> None:
    handler, artifacts = talk
    base = artifacts / "expanded"
    exact = {0.0: engine.load(base), 1.0: engine.load(base, artifacts / "lora_adapter")}
    for strength in (1.0, 0.0, 0.5, 1.0):
        answer = ask(
            handler, "top_k", models=["tuned"], text=PROMPT, k=5, strength={"tuned": strength}
        )[-1]
        choices = answer["answers"]["tuned"]["top_k"]
        expected = {
            at: [vars(c) for c in engine.top_k(loaded, PROMPT, 5)] for at, loaded in exact.items()
        }
        assert [at for at in exact if choices == expected[at]] == [
            at for at in exact if at == strength
        ]


@pytest.mark.parametrize("chat", [False, True])
def test_text_that_streams_is_the_text_decoded_at_once(talk: Talk, chat: bool) -> None:
    handler, artifacts = talk
    drawn = Sampling(temperature=1.5, seed=6)
    *tokens, done = ask(
        handler,
        "generate",
        model="tuned",
        text=PROMPT,
        limit=12,
        temperature=1.5,
        seed=6,
        chat=chat,
    )
    assert done["tokens"] == len(tokens) > 3
    loaded = engine.load(artifacts / "expanded", artifacts / "lora_adapter")
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode(
        tokenizer.render([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
        if chat
        else PROMPT
    )
    ids = list(generate(loaded.model, prompt, tokenizer.end_ids, 12, drawn))
    text = tokenizer.decode(prompt) + "".join(token["text"] for token in tokens)
    assert text == tokenizer.decode([*prompt, *ids])


def test_the_spectrum_is_that_of_the_update_that_was_merged(talk: Talk) -> None:
    handler, artifacts = talk
    before, after = (
        load_file(artifacts / name / "model.safetensors") for name in ("expanded", "lora_merged")
    )
    for module in ask(handler, "spectrum", adapter=str(artifacts / "lora_adapter"))[-1]["modules"]:
        change = (
            after[f"{module['name']}.weight"].double() - before[f"{module['name']}.weight"].double()
        )
        values = torch.tensor(module["values"], dtype=torch.float64)
        torch.testing.assert_close(
            torch.linalg.svdvals(change)[: len(values)], values, atol=1e-5, rtol=0
        )


@each_family
def test_new_tokens_are_one_token_each_and_special_ones_are_left_out_of_answers(
    family: Made, name: str
) -> None:
    tokenizer = load_base(family(name) / "artifacts/expanded").tokenizer
    ids = tokenizer.encode(f"{NEW} has{TOOL}")
    assert (ids[-1], ids[1 if tokenizer.bos_id is not None else 0]) == (120, 121)
    assert tokenizer.decode(ids) == f"{NEW} has"
    assert tokenizer.words()[120:] == [TOOL, NEW]


@each_family
def test_what_makes_training_random_is_off(family: Made, name: str) -> None:
    model = load_base(family(name) / "artifacts/expanded").model
    assert isinstance(model, TransformersModel)
    ids = torch.tensor([[5, 9, 70, 17]])
    assert torch.equal(model.train().hidden_states(ids), model.train().hidden_states(ids))
