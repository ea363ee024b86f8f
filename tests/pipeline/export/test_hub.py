"""`lora push`: what arrives on the hub is what an export wrote, with a card that the hub
accepts.
"""

import re
import shutil
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.config import AdapterSpec
from pipeline.files import artifact
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.hub import TOKEN, Hub, Repository, card_problems, serving
from tests.helpers.json_files import read_json
from tests.helpers.projects import folder_bytes, lora, refusal
from tests.helpers.side_by_side import assert_alike, logits, ours

NAME = "me/tuned"
BASE_NAME = ("--base-name", "org/base")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of its own, to which this process is logged in."""
    with serving() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # its storage is no part of the API
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
        yield hub


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base that has a license, and an adapter of random numbers on it."""
    root = tmp_path_factory.mktemp("toy")
    base = new_project(root / "project", FAMILIES["llama"]) / "base"
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Toy\n", encoding="utf-8")
    adapter(root / "adapter", base, AdapterSpec(4, 8, ("q_proj", "v_proj")))
    config = read_json(root / "adapter/adapter_config.json")
    artifact.write_json(
        root / "adapter/adapter_config.json", {**config, "base_model_name_or_path": "project/base"}
    )
    return root


@pytest.fixture
def source(toy: Path, tmp_path: Path) -> Path:
    """A copy of that adapter, beside its base."""
    return Path(shutil.copytree(toy, tmp_path, dirs_exist_ok=True)) / "adapter"


def push(cli: Lora, source: Path, *more: str, name: str = NAME) -> tuple[int, str, str]:
    return cli("push", str(source), name, *more, cwd=source.parent)


@pytest.mark.parametrize("form", ["peft", "vllm", "merged"])
def test_what_arrives_is_byte_for_byte_what_a_dry_run_writes(
    cli: Lora, hub: Hub, source: Path, form: str
) -> None:
    options = (
        "--format",
        form,
        *BASE_NAME,
        "--license",
        "mit",
        "--dataset",
        "me/chats",
        "--language",
        "en",
    )
    out = source.parent / "tuned"
    code, said, errors = push(cli, source, *options, "--dry-run", "--out", str(out))
    assert (code, errors) == (0, "")
    assert not hub.seen
    code, sent, errors = push(cli, source, *options)
    assert (code, errors) == (0, "")
    assert f"{hub.url}/{NAME}/commit/" in sent
    files = folder_bytes(out)
    assert {n: b for n, b in hub.repositories[NAME].files.items() if n != ".gitattributes"} == files
    assert len(hub.repositories[NAME].commits) == 1
    for name, content in files.items():
        assert f"{len(content):,}" in said
        assert str(source.parent).encode() not in content, name
    assert str(source.parent) not in sent


@pytest.mark.parametrize("form", ["peft", "vllm", "merged"])
def test_the_card_passes_the_hubs_rules_and_loads_again(
    cli: Lora, brief: Path, form: str, tmp_path: Path
) -> None:
    shutil.copytree(brief / "artifacts", tmp_path / "artifacts")
    shutil.copytree(brief / "data", tmp_path / "data")
    source = tmp_path / "artifacts/lora_adapter"
    if form == "vllm":  # an adapter without embeddings in full
        source = adapter(
            tmp_path / "adapter", tmp_path / "artifacts/expanded", AdapterSpec(2, 2, ("q_proj",))
        )
    options = ("--license", "MIT", "--dataset", "me/chats", "--language", "de", "--language", "en")
    code, _, errors = push(
        cli, source, "--format", form, *BASE_NAME, *options, "--dry-run", "--out", "out"
    )
    assert (code, errors) == (0, "")
    path = source.parent / "out/README.md"
    text = path.read_text(encoding="utf-8")
    assert card_problems(text) == []
    card = ModelCard.load(path)
    assert str(card) == text
    assert card.data.license == "mit"
    assert (card.data.datasets, card.data.language) == (["me/chats"], ["de", "en"])
    assert (card.data.base_model, card.data.pipeline_tag) == ("org/base", "text-generation")
    assert card.data.library_name == ("transformers" if form == "merged" else "peft")
    assert card.data.base_model_relation == ("finetune" if form == "merged" else "adapter")
    sentences = {
        line
        for file in (brief / "data").glob("*.txt")
        for line in file.read_text("utf-8").splitlines()
    }
    sent = "".join(
        path.read_text("utf-8") for path in path.parent.iterdir() if path.suffix in (".md", ".json")
    )
    assert len(sentences) > 50 and not [
        sentence for sentence in sentences if sentence and sentence in sent
    ]
    if form != "vllm":
        metrics = read_json(brief / "artifacts/evaluation/metrics.json")["lora"]
        results = {
            (each.dataset_type, each.metric_type): each.metric_value
            for each in card.data.eval_results
        }
        assert results["new-data", "loss"] == pytest.approx(metrics["new_loss"], abs=1e-4)
        forgetting = metrics["forgetting"]
        for kind, key in (
            ("loss_rise", "loss_rise"),
            ("accuracy", "answers_kept"),
            ("kl_divergence", "divergence"),
        ):
            assert results["old-data", kind] == pytest.approx(forgetting[key], abs=1e-4)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense:\n- mit\nlanguage: en\n---\n", {"license": "mit"}),
        (
            '---\nlicense: other\nlicense_name: "toy-license"\nlicense_link: https://toy.example/l\n---\n',
            {
                "license": "other",
                "license_name": "toy-license",
                "license_link": "https://toy.example/l",
            },
        ),
        ("# A card\n\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [mit, gemma]\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: " + "x" * 300 + "\n---\n", {}),
        ("", {}),
    ],
)
def test_the_license_is_that_of_the_base_and_none_is_claimed_if_it_is_unknown(
    cli: Lora, source: Path, card: str, expected: dict[str, str]
) -> None:
    (source.parent / "project/base/README.md").write_text(card, encoding="utf-8")
    code, _, errors = push(cli, source, *BASE_NAME, "--dry-run", "--out", "out")
    assert code == 0
    written = ModelCard.load(source.parent / "out/README.md").data.to_dict()
    assert {key: value for key, value in written.items() if key.startswith("license")} == expected
    assert ("Give one with --license" in errors) is (not expected)


def test_a_dry_run_that_is_stopped_before_its_card_is_complete_leaves_the_earlier_one(
    cli: Lora, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (source, *BASE_NAME, "--dry-run", "--out", "out")
    assert push(cli, *arguments)[0] == 0
    before = folder_bytes(source.parent / "out")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ModelCard, "save", stopped)
        push(cli, *arguments, "--license", "mit")
    assert folder_bytes(source.parent / "out") == before
    (source.parent / "out/README.md").write_text("mine", encoding="utf-8")
    assert "out exists and holds other files" in refusal(push(cli, *arguments))


def test_an_import_keeps_the_license_of_the_bases_card(cli: Lora, tmp_path: Path) -> None:
    root = new_project(tmp_path / "project", FAMILIES["llama"])
    (root / "base/README.md").write_text("---\nlicense: gemma\n---\n", encoding="utf-8")
    assert cli("import", cwd=root)[0] == 0
    assert read_json(root / "artifacts/base/manifest.json")["license"] == {"license": "gemma"}
    source = adapter(tmp_path / "adapter", root / "artifacts/base", AdapterSpec(2, 2, ("q_proj",)))
    assert push(cli, source, *BASE_NAME, "--dry-run", "--out", "out")[0] == 0
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "gemma"


def test_auto_peft_opens_what_a_dry_run_wrote_with_our_logits_and_the_cards_code_runs(
    cli: Lora, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = source.parent / "project/base", source.parent / "me/tuned"
    assert push(cli, source, "--base-name", str(base), "--dry-run", "--out", str(out))[0] == 0
    model, tokenizer = (
        AutoPeftModelForCausalLM.from_pretrained(out).eval(),
        AutoTokenizer.from_pretrained(out),
    )
    ids = torch.tensor([tokenizer("the capital of France is Paris")["input_ids"]])
    assert_alike(logits(model, ids), logits(ours(base, source), ids))
    code = re.search(
        r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert code and f'from_pretrained("{NAME}")' in code[1]
    monkeypatch.chdir(source.parent)
    exec(code[1], {})


def test_the_code_on_a_card_names_a_folder_of_any_letters(
    source: Path, make_card: Callable[[Path], str]
) -> None:
    text = make_card(source.rename(source.with_name("tuned 🦊")))
    (name,) = set(re.findall(r'from_pretrained\((".*?")', text))
    assert literal_eval(name) == "tuned 🦊"


def test_a_dry_runs_folder_may_have_the_name_of_a_file_in_it(cli: Lora, source: Path) -> None:
    files = []
    for out in ("out", "README.md"):
        assert push(cli, source, *BASE_NAME, "--dry-run", "--out", out)[0] == 0
        files.append(folder_bytes(source.parent / out))
    assert files[0] == files[1]


def test_the_code_on_a_merged_models_card_needs_transformers_alone(cli: Lora, source: Path) -> None:
    out = source.parent / "me/tuned"
    assert (
        push(cli, source, "--format", "merged", *BASE_NAME, "--dry-run", "--out", str(out))[0] == 0
    )
    card = (out / "README.md").read_text(encoding="utf-8")
    assert (
        f'AutoModelForCausalLM.from_pretrained("{NAME}")' in card
        and "peft" not in card.partition("## Method")[0]
    )
    AutoModelForCausalLM.from_pretrained(out)


def test_a_second_push_updates_and_removes_what_the_first_left(
    cli: Lora, hub: Hub, source: Path
) -> None:
    assert push(cli, source, "--format", "merged", *BASE_NAME)[0] == 0
    repository = hub.repositories[NAME]
    repository.files["picture.png"] = b"mine"
    merged = set(repository.files)
    assert push(cli, source, *BASE_NAME)[0] == 0
    assert {"model.safetensors", "config.json", "certificate.json"} <= merged
    assert {"picture.png", "adapter_model.safetensors"} <= set(repository.files)
    assert not {"model.safetensors", "config.json", "certificate.json"} & set(repository.files)
    assert len(repository.commits) == 2


@pytest.mark.usefixtures("hub")
def test_the_lines_name_the_repository_in_place_of_the_folder_alone(
    cli: Lora, source: Path
) -> None:
    code, said, errors = push(cli, source, *BASE_NAME, "--format", "vllm", "--out", "e")
    assert (code, errors) == (0, "")
    assert f"{NAME}  for vLLM. Serve it with:" in said


def test_a_branch_is_made_and_main_stays(cli: Lora, hub: Hub, source: Path) -> None:
    assert push(cli, source, *BASE_NAME)[0] == 0
    before = dict(hub.repositories[NAME].files)
    assert push(cli, source, *BASE_NAME, "--format", "merged", "--revision", "merged")[0] == 0
    assert hub.repositories[NAME].files == before
    assert "model.safetensors" in hub.repositories[NAME].branches["merged"]


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_if_asked(
    cli: Lora, hub: Hub, source: Path, private: bool
) -> None:
    assert push(cli, source, *BASE_NAME, *["--private"] * private)[0] == 0
    assert hub.repositories[NAME].private is private


def test_a_public_repository_gets_nothing_that_is_meant_to_be_private(
    cli: Lora, hub: Hub, source: Path
) -> None:
    assert push(cli, source, *BASE_NAME)[0] == 0
    assert "exists and is public" in refusal(push(cli, source, *BASE_NAME, "--private"))
    assert len(hub.repositories[NAME].commits) == 1


def test_a_repository_of_something_else_is_not_touched(cli: Lora, hub: Hub, source: Path) -> None:
    hub.repositories[NAME] = Repository(branches={"main": {"model.safetensors": b"another model"}})
    assert "was not pushed by lora" in refusal(push(cli, source, *BASE_NAME))
    assert hub.repositories[NAME].files == {"model.safetensors": b"another model"}
    assert all(method == "GET" for method, *_ in hub.seen)


FAILURES = {
    "whoami": "/whoami",
    "info": f"^/api/models/{NAME}$",
    "create": "/repos/create",
    "card": "/validate-yaml",
    "preupload": "/preupload/",
    "batch": "/objects/batch",
    "upload": "/stored/",
    "commit": "/commit/",
}
MESSAGES = {
    401: "the hub rejects the token (401). Log in again",
    403: "the token may not write to me/tuned (403)",
    409: "was changed by another commit at the same time (409)",
    500: "the hub failed (500), nothing was committed",
    "cut": "failed (",
}
REACHED = [
    *(("whoami", status) for status in (401, 500, "cut")),
    *(
        ("info", 500),
        ("create", 403),
        ("create", "cut"),
        ("card", 500),
        ("preupload", 403),
        ("batch", 403),
        ("batch", "cut"),
    ),
    *((step, status) for step in ("upload", "commit") for status in (403, 500, "cut")),
    *(("commit", 401), ("commit", 409)),
]


@pytest.mark.parametrize(("step", "status"), REACHED)
@pytest.mark.sampled(3)
def test_every_failure_of_the_hub_is_one_message_and_commits_nothing(
    cli: Lora, hub: Hub, source: Path, step: str, status: int | str
) -> None:
    hub.fails[FAILURES[step]] = status
    message = refusal(push(cli, source, *BASE_NAME))
    assert MESSAGES[status] in message
    assert TOKEN not in message
    assert not any(repository.commits for repository in hub.repositories.values())


def test_a_failure_without_a_message_is_told_by_its_type(
    cli: Lora, hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", silent)
    assert f"the push to {hub.url} failed (TimeoutError)." in refusal(push(cli, source, *BASE_NAME))


def test_a_broken_rule_of_the_hub_is_told_in_its_own_words(
    cli: Lora, hub: Hub, source: Path
) -> None:
    message = refusal(push(cli, source, *BASE_NAME, "--license", "proprietary"))
    assert """"license" with value 'proprietary' is not valid""" in message
    assert not hub.repositories[NAME].commits


@pytest.mark.parametrize("key", ["name_or_path", "auto_map"])
def test_no_path_of_this_machine_is_sent(cli: Lora, hub: Hub, source: Path, key: str) -> None:
    shutil.copy(source.parent / "project/base/tokenizer.json", source)
    value = {"name_or_path": str(source), "auto_map": {"AutoTokenizer": [None, str(source)]}}[key]
    artifact.write_json(source / "tokenizer_config.json", {key: value})
    message = refusal(push(cli, source, *BASE_NAME))
    assert f"tokenizer_config.json names a path of this machine: {source}" in message
    assert not any(method == "PUT" or "commit" in path for method, path, _ in hub.seen)


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "base": (
        (),
        "its base was not imported from the hub. Name the base on the hub with --base-name "
        "org/name",
    ),
    "path": (
        ("--base-name", "project/base"),
        "--base-name must be a hub id such as org/name, got 'project/base'",
    ),
    "name": (
        ("--base-name", "a b"),
        "--base-name must be a hub id such as org/name, got 'a b'",
    ),
    "license": (
        (*BASE_NAME, "--license", "a b"),
        "--license must be an identifier of the hub such as apache-2.0",
    ),
    "dataset": (
        (*BASE_NAME, "--dataset", "../data"),
        "--dataset must be an identifier of the hub such as org/name",
    ),
    "language": (
        (*BASE_NAME, "--language", "English"),
        "--language must be an identifier of the hub such as en",
    ),
    "option": ((*BASE_NAME, "--precision", "bf16"), "--precision needs --format merged, got peft"),
    "out": ((*BASE_NAME, "--dry-run"), "--dry-run needs --out DIR"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named_before_anything_is_sent(
    cli: Lora, hub: Hub, source: Path, name: str
) -> None:
    options, message = WRONG[name]
    assert message in refusal(push(cli, source, *options))
    assert not [path for method, path, _ in hub.seen if method != "GET"]


@pytest.mark.parametrize(
    "name", ["tuned", "me/", "me/a/b", "me/tuned.git", "me/a--b", "../me/x", "me/" + "x" * 100]
)
def test_a_name_that_the_hub_does_not_allow_is_refused(
    cli: Lora, hub: Hub, source: Path, name: str
) -> None:
    refusal(push(cli, source, *BASE_NAME, name=name))
    assert not hub.seen


def test_without_a_token_nothing_is_sent(
    cli: Lora, hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "there is no token for the hub. Log in with `hf auth login`" in refusal(
        push(cli, source, *BASE_NAME)
    )
    assert not hub.seen


@pytest.mark.slow
def test_a_push_from_a_process_of_its_own_arrives_and_shows_no_token(
    hub: Hub, source: Path
) -> None:
    where = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = lora("push", str(source), NAME, *BASE_NAME, cwd=source.parent, **where)
    assert (done.returncode, done.stderr) == (0, "")
    assert TOKEN not in done.stdout and f"{hub.url}/{NAME}/commit/" in done.stdout
    assert "adapter_model.safetensors" in hub.repositories[NAME].files


def test_an_adapter_from_elsewhere_keeps_the_name_of_its_base_and_a_sealed_one_does_not(
    cli: Lora, source: Path, make_card: Callable[[Path], str]
) -> None:
    config = read_json(source / "adapter_config.json")
    artifact.write_json(
        source / "adapter_config.json", {**config, "base_model_name_or_path": "org/theirs"}
    )
    assert "base_model: org/theirs\n" in make_card(source)
    assert push(cli, source, "--dry-run", "--out", "out")[0] == 0
    assert (
        read_json(source.parent / "out/adapter_config.json")["base_model_name_or_path"]
        == "org/theirs"
    )
    artifact.seal(source, {"base": {}})
    assert "base_model:" not in make_card(source)
    assert "not imported from the hub" in refusal(push(cli, source, "--dry-run", "--out", "again"))


@pytest.fixture
def make_card(cli: Lora) -> Callable[[Path], str]:
    return lambda folder: cli("adapters", "card", str(folder), cwd=folder.parent)[1]
