"""`lora adapters import`: an adapter from elsewhere is bound to its base or rejected."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import CONFIG, WEIGHTS
from pipeline.files.artifact import read_manifest
from pipeline.files.base_model import base_fingerprint
from pipeline.inference.engine import load
from tests.conftest import Lora
from tests.helpers.checkpoints import checkpoint, edit_adapter_config, edit_tensors, token_ids
from tests.helpers.json_files import read_json
from tests.helpers.projects import cut_off, folder_bytes, refusal

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = token_ids(70, 4, 9)


def imported(cli: Lora, root: Path, *more: str, source: str = "one") -> tuple[int, str, str]:
    return cli("adapters", "import", source, "--out", "mine", *more, cwd=root)


def test_an_imported_adapter_is_bound_to_its_base_and_remembers_where_it_came_from(
    cli: Lora, two_adapters: Path
) -> None:
    code, said, err = imported(cli, two_adapters, "--base", "base")
    assert (code, err) == (0, "")
    assert said == "mine  fits base, by names and shapes; no more is known\n"
    manifest = read_manifest(two_adapters / "mine")
    assert manifest["base"] == base_fingerprint(two_adapters / "base")
    digests = {
        name: hashlib.sha256((two_adapters / "one" / name).read_bytes()).hexdigest()
        for name in (CONFIG, WEIGHTS)
    }
    assert manifest["source"] == {"name": "one", "base": "base", "sha256": digests}
    assert str(two_adapters) not in json.dumps(manifest)
    assert (two_adapters / "mine" / WEIGHTS).read_bytes() == (
        two_adapters / "one" / WEIGHTS
    ).read_bytes()
    config = read_json(two_adapters / "mine" / CONFIG)
    assert config == read_json(two_adapters / "one" / CONFIG) | {"base_model_name_or_path": "base"}
    with torch.no_grad():
        there, here = (
            load(two_adapters / "base", two_adapters / name).model(IDS) for name in ("one", "mine")
        )
    assert torch.equal(here, there)


def test_verify_accepts_it_on_its_base_alone(cli: Lora, two_adapters: Path) -> None:
    imported(cli, two_adapters, "--base", "base")
    code, said, _ = cli("adapters", "verify", "mine", cwd=two_adapters)
    known = (
        "files, names, shapes and base are those it was imported with; what it was trained on is "
        "not known"
    )
    assert code == 0 and known in said
    checkpoint(two_adapters / "alike", seed=1)
    assert "was trained on another base" in refusal(
        cli("adapters", "verify", "mine", "--base", "alike", cwd=two_adapters)
    )
    edit_adapter_config(two_adapters / "mine", lora_alpha=4)
    assert "lora_alpha was edited" in refusal(cli("adapters", "verify", "mine", cwd=two_adapters))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "chat_template.jinja"])
def test_a_link_that_leaves_an_adapters_folder_is_not_followed(
    cli: Lora, two_adapters: Path, name: str
) -> None:
    outside = two_adapters / "outside"
    if (two_adapters / "one" / name).exists():
        (two_adapters / "one" / name).rename(outside)
    else:
        outside.write_text("private", encoding="utf-8")
    (two_adapters / "one" / name).symlink_to(outside)
    assert f"one/{name} is a link to a file outside its folder" in refusal(
        imported(cli, two_adapters, "--base", "base")
    )
    assert not (two_adapters / "mine").exists()


@pytest.fixture
def hub(two_adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub cache in which org/toy has the base's weights, and adapter `one` names it; no
    network.
    """
    repository = two_adapters / "hub/models--org--toy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT, encoding="utf-8")
    shutil.copytree(two_adapters / "base", repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(two_adapters / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    edit_adapter_config(two_adapters / "one", base_model_name_or_path="org/toy")
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", [None, COMMIT, "v9"])
def test_a_base_that_the_adapter_names_is_recognised_by_its_weights(
    cli: Lora, two_adapters: Path, hub: Path, revision: str | None
) -> None:
    edit_adapter_config(two_adapters / "one", revision=revision)
    assert hub.is_dir()
    said = imported(cli, two_adapters, "--base", "base")[1]
    assert ("which has the weights of the model that it names" in said) is (revision != "v9")
    assert read_manifest(two_adapters / "mine")["source"]["base"] == "org/toy"


def test_a_base_of_the_same_shape_is_refused_where_the_one_it_names_is_known_to_be_another(
    cli: Lora, two_adapters: Path, hub: Path
) -> None:
    checkpoint(hub, seed=1)
    before = folder_bytes(two_adapters)
    assert (
        "one names org/toy as its base. That model is in the hub's cache, and base has other "
        "weights" in refusal(imported(cli, two_adapters, "--base", "base"))
    )
    assert folder_bytes(two_adapters) == before
    assert "names 'org/toy' as its base, but there is no such folder" in refusal(
        imported(cli, two_adapters)
    )


def peft_of_embeddings(folder: Path, base: Path) -> None:
    """As PEFT saves it: with the base's embedding next to the LoRA."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_base_of_the_same_shape_is_refused_where_the_adapter_holds_an_embedding_of_its_own(
    cli: Lora, two_adapters: Path
) -> None:
    peft_of_embeddings(two_adapters / "theirs", two_adapters / "base")
    checkpoint(two_adapters / "alike", seed=1)
    message = refusal(imported(cli, two_adapters, "--base", "alike", source="theirs"))
    assert (
        "contains its own model.decoder.embed_tokens.weight, which differs from the base model's"
        in message
    )
    assert not (two_adapters / "mine").exists()
    assert imported(cli, two_adapters, "--base", "base", source="theirs")[0] == 0
    assert cli("adapters", "verify", "mine", cwd=two_adapters)[0] == 0


def truncated(folder: Path) -> None:
    cut_off(folder / WEIGHTS)


def renamed(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda found: {key.replace("decoder", "encoder"): value for key, value in found.items()},
    )


def without_one(folder: Path) -> None:
    edit_tensors(folder, lambda found: dict(list(found.items())[1:]))


def not_finite(folder: Path) -> None:
    edit_tensors(folder, lambda found: {key: value / 0 for key, value in found.items()})


def of_another_rank(folder: Path) -> None:
    edit_adapter_config(folder, r=5)


def not_understood(folder: Path) -> None:
    edit_adapter_config(folder, lora_bias=True)


DAMAGE: dict[Callable[[Path], None], str] = {
    truncated: "is damaged or truncated",
    renamed: "does not fit: missing base_model.model.model.decoder.layers.0",
    without_one: "does not fit: missing base_model.model.model.decoder.layers.0",
    not_finite: "is not finite",
    of_another_rank: "has shape [2, 64], expected [5, 64]",
    not_understood: "lora_bias is True",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_adapter_does_not_get_in(
    cli: Lora, two_adapters: Path, damage: Callable[[Path], None]
) -> None:
    damage(two_adapters / "one")
    before = folder_bytes(two_adapters)
    assert DAMAGE[damage] in refusal(imported(cli, two_adapters, "--base", "base"))
    assert folder_bytes(two_adapters) == before and not (two_adapters / "mine").exists()


def test_a_base_of_another_shape_is_refused(cli: Lora, two_adapters: Path) -> None:
    checkpoint(two_adapters / "wide", d_model=32)
    assert "has shape [2, 64], expected [2, 32]" in refusal(
        imported(cli, two_adapters, "--base", "wide")
    )
    assert not (two_adapters / "mine").exists()


def test_an_import_replaces_an_earlier_one_and_nothing_else(cli: Lora, two_adapters: Path) -> None:
    assert imported(cli, two_adapters, source="other")[0] == imported(cli, two_adapters)[0] == 0
    assert (two_adapters / "mine" / WEIGHTS).read_bytes() == (
        two_adapters / "one" / WEIGHTS
    ).read_bytes()
    before = folder_bytes(two_adapters)
    for out, message in (("other", "exists and holds other files"), ("one", "is also an input")):
        assert message in refusal(cli("adapters", "import", "one", "--out", out, cwd=two_adapters))
    assert folder_bytes(two_adapters) == before
