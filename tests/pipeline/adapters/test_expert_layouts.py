"""How PEFT stored the A and B of experts, version by version.

The old layout is built here from today's by its definition, ParamWrapper of PEFT 0.17.1, 0.18.1 and
0.19.0: an update of the stack (E, S, T) is Σᵣ A[e, r, s]·B[t, r, e] with A (E·R, S) and B (T, R·E),
except that 0.19.0 swaps s and t of a transposed stack. Adapters that these versions wrote of the
toys below, with their logits, gave the same as here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.attach import attach, tensors
from pipeline.adapters.config import CONFIG, WEIGHTS, AdapterSpec
from pipeline.adapters.peft import Reading, load_adapter, save_adapter
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.transformers_model import TransformersModel
from pipeline.weights.import_adapter import import_adapter
from tests.helpers.checkpoints import token_ids
from tests.helpers.json_files import read_json, write_json
from tests.helpers.real import ROWS, stock, toy
from tests.helpers.side_by_side import logits, randomized

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
E, R = 4, 3
# of an expert; the model's is 32
WIDTHS = {"gate_up square": 16, "down square": 32, "none square": 24}
IDS = token_ids(ROWS, 3, 9)
OLD, NEW = ("0.18.1", "0.19.0"), ("0.19.1", "0.21.2", "1.0.0", "0.20.0.dev0@abc")

pytestmark = pytest.mark.filterwarnings("ignore")
# stacks (E, O, I), and (E, I, O)
each_mixture = pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])


def mixture(name: str, width: int) -> TransformersModel:
    torch.manual_seed(0)  # for gpt-oss' attention sinks
    return toy(name, std=0.1, intermediate_size=width, moe_intermediate_size=width)


def saved(folder: Path, base: TransformersModel, parameters: list[str]) -> Tensor:
    """An adapter that PEFT of today wrote of `base`; returns its logits."""
    config = LoraConfig(
        r=R, lora_alpha=6, task_type="CAUSAL_LM", target_modules=[], target_parameters=parameters
    )
    model = randomized(get_peft_model(stock(base), config), 0.2)
    model.save_pretrained(folder)
    return logits(model, IDS)


def set_version(folder: Path, version: object) -> None:
    """Of the PEFT that wrote it; without one, the key goes."""
    config = read_json(folder / CONFIG) | {"peft_version": version}
    if version is None:
        del config["peft_version"]
    write_json(folder / CONFIG, config)


def turn_back(folder: Path, version: str | None) -> None:
    """Store A and B of the experts as PEFT once did, number by number: A[e·R + r, s] and B[t, r·E +
    e].
    """
    values = load_file(folder / WEIGHTS)
    for key in [key for key in values if key.endswith("lora_A.weight")]:
        a, b = values[key], values[other := key.replace("lora_A", "lora_B")]
        old_a, old_b = torch.zeros(E * R, len(b)), torch.zeros(a.shape[1], R * E)
        for e in range(E):
            for r in range(R):
                old_a[e * R + r] = b[:, r * E + e]
                old_b[:, r * E + e] = a[e * R + r]
        values |= {key: old_a, other: old_b}
    save_file(values, folder / WEIGHTS)
    set_version(folder, version)


def asked(base: TransformersModel, folder: Path) -> Tensor:
    load_adapter(base, Path("base"), folder)
    return logits(base, IDS)


def checkpoint_of(folder: Path, base: TransformersModel) -> Path:
    folder.mkdir()
    base.save(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@each_mixture
def test_an_adapter_of_an_earlier_peft_answers_as_it_did_there(
    name: str, width: int, tmp_path: Path
) -> None:
    logits = saved(tmp_path, mixture(name, width), [GATE_UP, DOWN])
    turn_back(tmp_path, "0.19.0")
    torch.testing.assert_close(asked(mixture(name, width), tmp_path), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", [*OLD, *NEW, None])
@each_mixture
def test_the_version_tells_how_a_square_stack_is_stored(
    name: str, version: str | None, tmp_path: Path
) -> None:
    logits = saved(tmp_path, mixture(name, 32), [DOWN])
    # gpt-oss' stacks are (E, I, O)
    turned = version in OLD and (name != "gpt_oss" or version == "0.19.0")
    if turned:
        turn_back(tmp_path, version)
    set_version(tmp_path, version)
    if version is None and name != "gpt_oss":  # 0.17 wrote none, and `lora` once wrote none
        with pytest.raises(
            UserError, match=r"peft_version is None, which does not tell .* to 0\.17\.1; if `lora`"
        ):
            asked(mixture(name, 32), tmp_path)
        return
    torch.testing.assert_close(asked(mixture(name, 32), tmp_path), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "version", ["0.19.1.dev0", "new", "9" * 5000, ["0.18.0"]], ids=["dev", "word", "digits", "list"]
)
def test_a_version_that_does_not_tell_is_refused_where_shapes_do_not_either(
    version: object, tmp_path: Path
) -> None:
    logits = saved(tmp_path, mixture("qwen3_moe", 32), [DOWN])
    set_version(tmp_path, version)
    with pytest.raises(
        UserError, match="which does not tell how A and B of experts are stored"
    ) as refused:
        asked(mixture("qwen3_moe", 32), tmp_path)
    assert len(str(refused.value)) < 800
    saved(tmp_path, mixture("qwen3_moe", 32), [DOWN, GATE_UP])  # one of which is not square
    set_version(tmp_path, version)
    now = asked(mixture("qwen3_moe", 32), tmp_path)
    turn_back(tmp_path, "0.18.1")
    set_version(tmp_path, version)
    torch.testing.assert_close(asked(mixture("qwen3_moe", 32), tmp_path), now, atol=1e-4, rtol=1e-4)
    assert (now - logits).abs().max() > 0.1


def test_shapes_that_contradict_the_version_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, mixture("qwen3_moe", 24), [DOWN])
    set_version(tmp_path, "0.18.1")
    with pytest.raises(UserError, match=r"peft_version is '0\.18\.1', which does not tell"):
        asked(mixture("qwen3_moe", 24), tmp_path)


def test_an_import_writes_the_layout_of_today_and_its_version(tmp_path: Path) -> None:
    base, theirs, mine = mixture("qwen3_moe", 32), tmp_path / "theirs", tmp_path / "mine"
    logits = saved(theirs, base, [DOWN])
    first = load_file(theirs / WEIGHTS)
    turn_back(theirs, "0.18.1")
    import_adapter(theirs, checkpoint_of(tmp_path / "base", base), mine)
    assert all(torch.equal(value, first[key]) for key, value in load_file(mine / WEIGHTS).items())
    assert read_json(mine / CONFIG)["peft_version"] == "0.19.1"
    torch.testing.assert_close(asked_of(mine, tmp_path), logits, atol=1e-4, rtol=1e-4)


def asked_of(adapter: Path, root: Path) -> Tensor:
    """Asked as a user does, of the checkpoint itself."""
    base = mixture("qwen3_moe", 32)
    load_adapter(base, root / "base", adapter)
    with torch.no_grad():
        out: Tensor = base.eval()(IDS)
    return out


@pytest.mark.parametrize("method", [None, "lora", "import"])
def test_one_of_ours_names_its_layout_and_an_earlier_one_is_known_by_its_manifest(
    method: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    model, spec, folder = (
        mixture("qwen3_moe", 32),
        AdapterSpec(R, 6.0, (), parameters=(DOWN,)),
        tmp_path / "ours",
    )
    attach(model, spec)
    with torch.no_grad():
        for parameter in tensors(model, spec).values():
            parameter.normal_(std=0.2)
    folder.mkdir()
    save_adapter(folder, model, spec, "base")
    with torch.no_grad():
        logits = model.eval()(IDS)
    if method is not None:  # as earlier versions wrote it
        set_version(folder, None)
        artifact.seal(folder, {"method": method, "base": {}})
        monkeypatch.setattr("pipeline.adapters.peft.base_fingerprint", lambda _: {})
    base = mixture("qwen3_moe", 32)
    if method == "import":
        with pytest.raises(UserError, match="peft_version is None"):
            load_adapter(base, Path("base"), folder, Reading(fingerprint=lambda _: {}))
        return
    load_adapter(base, Path("base"), folder, Reading(fingerprint=lambda _: {}))
    torch.testing.assert_close(base.eval()(IDS), logits)
