"""An adapter folder by its files: where its base lies, where that came from, and what does not
belong together.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapters.config import OTHER_KINDS, AdapterConfig
from pipeline.adapters.folder import (
    Origin,
    base_of,
    common_base,
    origin_of,
    quantization_of,
    refuse_foreign,
    refuse_pickle,
)
from pipeline.errors import UserError
from pipeline.files import artifact
from tests.helpers.json_files import write_json

BASE = {"tensors": "a" * 64, "tokenizer": "b" * 64}


def config(folder: Path, **values: Any) -> Path:
    """A folder with an adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", values)
    return folder


def sealed(folder: Path, **manifest: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    artifact.seal(folder, manifest)
    return folder


def test_a_pickle_is_refused_only_where_it_is_all_there_is(tmp_path: Path) -> None:
    refuse_pickle(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"adapter_model.bin is a pickle.* `lora adapters import .* --base BASE"
    ):
        refuse_pickle(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refuse_pickle(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"), [("PREFIX_TUNING", "prefix"), ("PROMPT_TUNING", "prompt")]
)
def test_virtual_tokens_are_no_update_of_weights(tmp_path: Path, kind: str, name: str) -> None:
    for plain in (config(tmp_path / "lora", peft_type="LORA"), config(tmp_path / "unnamed", r=3)):
        AdapterConfig.read(plain).refuse_other_kinds()
    virtual = AdapterConfig.read(config(tmp_path / "v", peft_type=kind, num_virtual_tokens=7))
    with pytest.raises(
        UserError, match=f"{tmp_path}/v is a {name} of 7 virtual tokens: it changes no weights"
    ):
        virtual.refuse_other_kinds()


def test_nor_is_an_adapter_of_a_kind_that_a_method_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OTHER_KINDS, "SCALED", "scaled")
    with pytest.raises(UserError, match="is an adapter of type SCALED: only LoRA can be merged"):
        AdapterConfig.read(config(tmp_path, peft_type="SCALED")).refuse_other_kinds()


# Its base


def test_a_base_is_looked_up_here_then_above_the_adapter_then_where_it_is_said_last(
    tmp_path: Path,
) -> None:
    adapter = config(tmp_path / "project/artifacts/adapter", base_model_name_or_path="models/base")
    here, project, last = tmp_path / "here", tmp_path / "project", tmp_path / "last"
    with pytest.raises(
        UserError, match=r"names 'models/base' as its base, but there is no such folder.*--base"
    ):
        base_of(adapter, here, last)
    for folder in (last, project, here):
        (folder / "models/base").mkdir(parents=True)
        assert base_of(adapter, here, last) == folder / "models/base"


def test_of_bases_with_one_name_the_one_that_it_was_trained_on_goes_first(tmp_path: Path) -> None:
    project, here = tmp_path / "project", tmp_path / "here"
    adapter = config(project / "artifacts/adapter")
    for root, fingerprint in ((here, "other"), (project, BASE), (tmp_path, "another")):
        sealed(root / "artifacts/expanded", fingerprint=fingerprint)
    assert base_of(adapter, here) == here / "artifacts/expanded", "it does not say"
    sealed(adapter, base=BASE)
    assert base_of(adapter, here) == project / "artifacts/expanded"
    sealed(adapter, base="another")
    assert base_of(adapter, here) == tmp_path / "artifacts/expanded"


def test_without_a_name_it_is_the_pipelines_expanded_base(tmp_path: Path) -> None:
    assert base_of(None, tmp_path) == tmp_path / "artifacts/expanded"
    adapter = config(tmp_path / "artifacts/adapter")
    (tmp_path / "artifacts/expanded").mkdir()
    assert base_of(adapter, Path("elsewhere")) == tmp_path / "artifacts/expanded"


@pytest.mark.parametrize("name", [5, ["base"], "x" * 5000])
def test_a_base_that_can_be_no_folder_is_refused_by_what_the_config_says(
    tmp_path: Path, name: object
) -> None:
    with pytest.raises(UserError, match="as its base, but there is no such folder") as error:
        base_of(config(tmp_path, base_model_name_or_path=name))
    assert (
        f"{tmp_path} names {repr(name)[:200]}" in str(error.value) and len(str(error.value)) < 500
    )


def test_adapters_that_are_combined_name_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        Path(name).mkdir()
    one, same, other = (
        config(tmp_path / f"to/{n}", base_model_name_or_path=name)
        for n, name in enumerate(("base", "./base", "other"))
    )
    assert common_base([one]) == common_base([one, same]) == Path("base")
    with pytest.raises(
        UserError, match=rf"{one} and {other} name different bases: base and other\. .*--base"
    ):
        common_base([one, same, other])


# Where the base came from

IMPORTED: dict[str, Any] = {
    "source": "hub",
    "params": {"base": "org/model@main"},
    "revision": "c0ffee",
    "license": {"license": "apache-2.0"},
}


def expanded(root: Path, imported: Mapping[str, Any], **changes: Any) -> Path:
    """A base of a project that was expanded by three rows."""
    base = sealed(root / "base", **imported)
    digest = artifact.sealed_digest(artifact.read_manifest(base))
    made = {"stage": "expand_vocab", "new_rows": [70, 73], "inputs": {"artifacts/base": digest}}
    return sealed(root / "expanded", **{**made, **changes})


def test_the_origin_of_a_base_is_what_its_import_noted(tmp_path: Path) -> None:
    base = sealed(tmp_path / "base", **IMPORTED)
    expected = Origin("org/model", "c0ffee", 0, {"license": "apache-2.0"}, "")
    assert origin_of(tmp_path / "adapter", base) == expected
    adapter = config(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert origin_of(adapter) == expected
    local = sealed(
        tmp_path / "local", source="gguf", params={"base": "a.gguf"}, dequantized="Q4_K_M"
    )
    assert origin_of(adapter, local) == Origin(None, None, 0, {}, "Q4_K_M")


def test_of_an_expanded_base_it_is_that_of_the_base_beside_it_with_the_rows_since(
    tmp_path: Path,
) -> None:
    origin = origin_of(tmp_path / "adapter", expanded(tmp_path, IMPORTED))
    assert origin == Origin("org/model", "c0ffee", 3, {"license": "apache-2.0"}, "")
    assert (
        origin_of(
            tmp_path / "adapter", expanded(tmp_path, IMPORTED, inputs={"artifacts/base": "0" * 64})
        )
        is None
    )


def test_a_base_from_elsewhere_has_the_license_of_its_card_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert origin_of(tmp_path / "adapter", tmp_path) == Origin(
        None, None, 0, {"license": "mit"}, ""
    )


@pytest.mark.parametrize(
    "manifest",
    [
        {"stage": "pretrain"},
        {"stage": "expand_vocab"},
        {"source": "hub"},
        {"source": "hub", "params": 5},
    ],
    ids=["trained here", "no rows", "no name", "no params"],
)
def test_a_base_that_was_not_imported_or_of_which_too_little_is_known_has_no_origin(
    tmp_path: Path, manifest: dict[str, Any]
) -> None:
    assert origin_of(tmp_path / "adapter", sealed(tmp_path / "base", **manifest)) is None
    assert origin_of(config(tmp_path / "adapter", base_model_name_or_path="no such folder")) is None


def test_the_quantization_is_the_manifests_and_none_without_one(tmp_path: Path) -> None:
    assert quantization_of(None) == quantization_of(tmp_path) == "none"
    assert quantization_of(sealed(tmp_path / "a", kind="adapter")) == "none"
    assert quantization_of(sealed(tmp_path / "b", params={"rank": 3})) == "none"
    assert quantization_of(sealed(tmp_path / "c", params={"quantization": "nf4"})) == "nf4"
    with pytest.raises(
        UserError, match=r"manifest.json: quantization must be one of none, .*, got 'nf5'"
    ):
        quantization_of(sealed(tmp_path / "d", params={"quantization": "nf5"}))


@pytest.mark.parametrize("value", [[], "nf4", None, 5])
def test_a_manifest_whose_parts_are_no_mappings_is_refused_by_its_key(
    tmp_path: Path, value: object
) -> None:
    for n, key in enumerate(("params", "stored", "base")):
        folder = sealed(config(tmp_path / str(n)), **{key: value})
        message = f"{folder}/manifest.json: {key} must be a mapping, got {value!r}"
        with pytest.raises(UserError, match=re.escape(message)):
            refuse_foreign(Path("base"), folder, lambda _: BASE)
    with pytest.raises(UserError, match=r"manifest.json: params must be a mapping, got"):
        quantization_of(tmp_path / "0")


# Whether both belong together


def bound(root: Path, read: Mapping[str, Any], **manifest: Any) -> Path:
    """An adapter whose manifest binds it to BASE."""
    return sealed(config(root / "adapter", **read), base=BASE, **manifest)


def refuse(folder: Path, base: Mapping[str, str] = BASE) -> None:
    refuse_foreign(Path("base"), folder, lambda _: base)


TRAINED = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    ("read", "manifest", "message"),
    [
        (
            {"r": 5, "lora_alpha": 8},
            {"params": TRAINED},
            "r was edited: it is 5, but the adapter was trained with 4",
        ),
        (
            {"r": 4, "lora_alpha": 9},
            {"params": TRAINED},
            "lora_alpha was edited: it is 9, .* trained with 8",
        ),
        ({"lora_alpha": 8}, {"params": TRAINED}, "r was edited: it is None"),
        (
            {"r": 4, "lora_alpha": 8},
            {"params": TRAINED, "stored": {"rank": 8}},
            "r was edited: it is 4, .* with 8",
        ),
        ({"r": 4}, {"stored": {"rank": 8}}, "r was edited: it is 4, .* trained with 8"),
        (
            {"num_virtual_tokens": 5},
            {"params": {"virtual_tokens": 6}},
            "num_virtual_tokens was edited: it is 5",
        ),
    ],
)
def test_numbers_of_the_config_are_those_of_the_training(
    tmp_path: Path, read: dict[str, Any], manifest: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"adapter/adapter_config.json: {message}"):
        refuse(bound(tmp_path, read, **manifest))


def test_what_is_as_it_was_trained_is_taken_and_so_is_what_nobody_sealed(tmp_path: Path) -> None:
    refuse(bound(tmp_path / "a", {"r": 4, "lora_alpha": 8}, params=TRAINED))
    refuse(
        bound(
            tmp_path / "b",
            {"r": 8, "lora_alpha": 16},
            params=TRAINED,
            stored={"rank": 8, "alpha": 16},
        )
    )
    refuse(bound(tmp_path / "c", {"r": 5}))
    refuse(config(tmp_path / "d", r=5), {})
    refuse_foreign(Path("no base"), tmp_path / "no adapter")


def test_another_edit_and_another_base_are_refused(tmp_path: Path) -> None:
    folder = bound(tmp_path, {"r": 4, "lora_alpha": 8}, params=TRAINED)
    with pytest.raises(
        UserError,
        match=r"another base: the sha256 of its tokenizer is b{12}, that of base c{12}\. .*",
    ):
        refuse(folder, {**BASE, "tokenizer": "c" * 64})
    with pytest.raises(
        UserError, match=r"another base: the sha256 of its card is None, that of base c{12}"
    ):
        refuse(folder, {**BASE, "card": "c" * 64})
    config(folder, r=4, lora_alpha=8, target_modules=["q_proj"])
    with pytest.raises(
        UserError, match=r"adapter_config.json was changed after the artifact was made"
    ):
        refuse(folder)
    read = artifact.read_manifest(folder)["files"]
    # of a cache of digests, which is believed
    refuse_foreign(Path("base"), folder, lambda _: BASE, lambda _: read)
