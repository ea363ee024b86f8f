"""Bases of each family on their way in: new rows, code of their own, the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.safetensors_file import fingerprint
from pipeline.inference import engine
from pipeline.project.runner import input_facts
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import open_project
from tests.conftest import Lora
from tests.helpers.bases import edit_config
from tests.helpers.families import FAMILIES, NEW, TOOL, VOCABULARY, new_project
from tests.helpers.json_files import read_json
from tests.helpers.projects import PIPELINE, STAGES, folder_bytes, make, make_one

Made = Callable[[str], Path]
PROMPT = "The currency of Bulgaria is the"
SEED, STD = 0, 0.02  # of expand_vocab

pytestmark = pytest.mark.filterwarnings("ignore")
each_family = pytest.mark.parametrize("name", FAMILIES)


def ends(folder: Path, name: str) -> list[Tensor]:
    """Embedding and, where it is another matrix, head, as they are on disk."""
    tensors = load_file(folder / "model.safetensors")
    wanted = ("embed_tokens.weight", "wte.weight"), "lm_head.weight"
    found = [tensor for form in wanted for key, tensor in tensors.items() if key.endswith(form)]
    assert len(found) == (1 if FAMILIES[name].tied else 2)
    return found


@each_family
@pytest.mark.slow
def test_old_rows_stay_bit_for_bit_and_new_ones_are_their_mean_and_noise(
    family: Made, name: str
) -> None:
    artifacts = family(name) / "artifacts"
    generator = torch.Generator().manual_seed(SEED)
    for before, after in zip(
        ends(artifacts / "base", name), ends(artifacts / "expanded", name), strict=True
    ):
        assert len(before) == FAMILIES[name].rows
        # padded rows are used before any is added
        assert len(after) == max(FAMILIES[name].rows, VOCABULARY + 2)
        assert torch.equal(after[:VOCABULARY], before[:VOCABULARY])
        assert torch.equal(after[VOCABULARY + 2 :], before[VOCABULARY + 2 :])
        noise = torch.randn(2, before.shape[1], generator=generator) * STD
        torch.testing.assert_close(
            after[VOCABULARY : VOCABULARY + 2], before[:VOCABULARY].mean(0) + noise
        )


@each_family
@pytest.mark.slow
def test_the_audit_finds_nothing_changed_and_the_tokenizer_has_two_more_ids(
    family: Made, name: str
) -> None:
    artifacts = family(name) / "artifacts"
    audit = read_json(artifacts / "expanded/audit.json")
    assert audit == {
        "new_words": [TOOL, NEW],
        "old_ids_kept": True,
        "old_rows_identical": True,
        "sentences_checked": 2,
        "drift": 0.0,
    }
    old, new = (AutoTokenizer.from_pretrained(artifacts / one) for one in ("base", "expanded"))
    assert (len(old), new.convert_tokens_to_ids([TOOL, NEW])) == (
        VOCABULARY,
        [VOCABULARY, VOCABULARY + 1],
    )
    assert new(PROMPT)["input_ids"] == old(PROMPT)["input_ids"]
    assert TOOL in new.all_special_tokens or new.added_tokens_decoder[VOCABULARY].special
    assert artifact.read_manifest(artifacts / "expanded")["new_rows"] == [
        VOCABULARY,
        VOCABULARY + 2,
    ]


@each_family
@pytest.mark.slow
def test_with_nothing_to_add_the_tensors_are_the_same(
    family: Made, name: str, tmp_path: Path
) -> None:
    (tmp_path / "artifacts").mkdir()
    for one in ("params.yaml", "data", "artifacts/base"):
        source = family(name) / one
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / one)
    _, seen = make_one(
        tmp_path, "expand_vocab", ["expand_vocab.tokens=[]", "expand_vocab.special_tokens=[]"]
    )
    assert any("no new tokens" in event.text for event in seen)
    base, expanded = (
        tmp_path / "artifacts" / one / "model.safetensors" for one in ("base", "expanded")
    )
    first = family(name) / "base/model.safetensors"
    assert fingerprint([base]) == fingerprint([expanded]) == fingerprint([first])


def test_a_token_whose_letters_are_all_unknown_is_new(tmp_path: Path) -> None:
    root = new_project(tmp_path / "p", FAMILIES["qwen3"])
    make(
        root,
        ["pretrain", "expand_vocab"],
        ["expand_vocab.tokens=[Ж]", "expand_vocab.special_tokens=[<unk>]"],
    )
    assert read_json(root / "artifacts/expanded/audit.json")["new_words"] == ["Ж"]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose base comes with code."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    root = new_project(tmp_path / "p", FAMILIES["llama"])
    (root / "base/own.py").write_text(CODE, encoding="utf-8")
    edit_config(
        root / "base",
        model_type="own_llama",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    return root


@pytest.mark.slow
def test_code_that_comes_with_a_base_goes_through_every_stage_once_it_is_trusted(
    own: Path, tmp_path: Path, cli: Lora
) -> None:
    with pytest.raises(
        UserError, match=r"code that comes with it.*set import\.trust_remote_code: true"
    ):
        make(own, ["pretrain"])
    assert not (tmp_path / "modules").exists() and not (own / "artifacts/base").exists()
    make(own, PIPELINE, ["import.trust_remote_code=true", "finetune_full.precision=bf16"])
    for name in (
        "base",
        "expanded",
        "from_scratch",
        "full_finetuned",
        "layer_frozen",
        "lora_merged",
    ):
        assert (own / "artifacts" / name / "own.py").read_text(encoding="utf-8") == CODE
        model = AutoModelForCausalLM.from_pretrained(
            own / "artifacts" / name, trust_remote_code=True
        )
        assert type(model.model.layers[0].mlp).__name__ == "OwnMLP"
        ids = torch.tensor([[5, 9, 70, 17]])
        with torch.no_grad():
            ours = engine.load(own / "artifacts" / name, trust_remote_code=True).model(ids)
            torch.testing.assert_close(
                ours, model.eval()(input_ids=ids).logits, atol=1e-4, rtol=1e-4
            )
    for command in (["prompt", PROMPT, "--adapter"], ["adapters", "verify"]):
        code, _, err = cli(*command, "artifacts/lora_adapter", cwd=own)
        assert code == 1 and "pass --trust-remote-code" in " ".join(err.split())
        code, _, err = cli(*command, "artifacts/lora_adapter", "--trust-remote-code", cwd=own)
        assert (code, err) == (
            0,
            "model: artifacts/lora_adapter on artifacts/expanded\n" * (command[0] == "prompt"),
        )


def test_a_manifest_says_nothing_of_where_a_base_and_data_lie_and_moving_them_changes_nothing(
    tmp_path: Path,
) -> None:
    root = new_project(tmp_path / "p", FAMILIES["mixtral"])

    def outside(folder: Path) -> Project:
        data = [str(folder / name / "texts.jsonl") for name in ("a", "b")]
        settings = {"base": str(folder / "base"), "train_from_scratch.data": data}
        return open_project(
            root / "params.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        )

    for name in ("a", "b"):
        shutil.copytree(root / "data", tmp_path / "one" / name)
    shutil.move(root / "base", tmp_path / "one/base")
    (tmp_path / "one/b/texts.jsonl").write_text('{"text": "other"}\n', encoding="utf-8")
    for path in ("base", "expanded"):
        (root / "artifacts" / path).mkdir(parents=True)
    project, stages = outside(tmp_path / "one"), [STAGES["import"], STAGES["train_from_scratch"]]
    before = [input_facts(project, stage) for stage in stages]
    assert str(tmp_path) not in json.dumps(before)
    assert before[0]["params"]["base"] == "base" and list(before[0]["inputs"]) == ["base"]
    assert {"texts.jsonl", "texts.jsonl 2"} <= before[1]["inputs"].keys()
    (tmp_path / "one").rename(tmp_path / "two")
    moved = outside(tmp_path / "two")
    assert [input_facts(moved, stage) for stage in stages] == before
    (tmp_path / "two/b/texts.jsonl").write_text('{"text": "changed"}\n', encoding="utf-8")
    edit_config(tmp_path / "two/base", rope_theta=5.0)
    assert all(
        input_facts(moved, stage)["inputs"] != was["inputs"]
        for stage, was in zip(stages, before, strict=True)
    )


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_base_of_the_hub_is_pinned_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_project(tmp_path / "p", FAMILIES["mixtral"])
    repository = tmp_path / "hub/models--org--toy"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT, encoding="utf-8")
    shutil.move(root / "base", repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    manifest = make(root, ["pretrain"], ["base=org/toy"])
    assert (manifest["source"], manifest["revision"]) == ("hub", COMMIT)
    assert manifest["inputs"] == {"org/toy": "hub:org/toy@main"}
    make(root, ["expand_vocab", "finetune_lora", "merge"], ["base=org/toy"])
    assert COMMIT not in json.dumps(sorted(folder_bytes(root / "artifacts/lora_merged")))
