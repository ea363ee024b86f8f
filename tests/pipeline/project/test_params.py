"""params.yaml: what is read, and every way in which it is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.project.advice import Facts, advise, advised_learning_rate
from pipeline.project.params.load import DEFAULT, PRETRAINED, Params, check
from pipeline.project.params.schema import Section, hints, meaning, rule
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Project
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.registry import GRAPH, METHODS
from tests.helpers.errors import user_error
from tests.helpers.json_files import write_json
from tests.helpers.projects import ROOT, load


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


CARD = (
    *("pretrain", "expand_vocab", "finetune_full", "finetune_freeze", "finetune_lora"),
    *("merge", "evaluate"),
)


def test_the_shipped_file_is_the_design_cards_pipeline_in_sixty_lines() -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    shipped = yaml.safe_load(text)
    assert len(text.splitlines()) <= 60
    assert shipped.pop("base") == "minigpt"
    assert tuple(shipped) == ("training", *CARD)
    unused = {"training", *GRAPH.sections} - shipped.keys()
    assert unused <= {"import", *(stage.name for stage in METHODS.values())}


def test_every_key_says_what_it_means_and_what_it_may_be() -> None:
    kinds: list[type[Section]] = [Training, *GRAPH.sections.values()]
    for kind in kinds:
        for key in hints(kind):
            assert meaning(kind, key), f"{kind.__name__}.{key}"
            assert rule(kind, key)


def test_the_training_block_is_beneath_every_section_that_trains_and_above_its_own_defaults(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path,
        "training: {epochs: 7, learning_rate: 1e-5}\nfinetune_lora: {epochs: 3}\nfinetune_prefix: "
        "{}\n",
    )
    params = load(path, ["finetune_lora.seed=4"])
    assert [
        params.finetune_lora.epochs,
        params.finetune_prefix.epochs,
        params.finetune_full.epochs,
    ] == [3, 7, 7]
    assert params.finetune_prefix.learning_rate == params.pretrain.learning_rate == 1e-5
    sources = {
        key: params.source("finetune_lora", key)
        for key in ("epochs", "learning_rate", "seed", "rank")
    }
    assert sources == {
        **{"epochs": "params.yaml", "learning_rate": "params.yaml, training"},
        **{"seed": "--set", "rank": "default"},
    }
    assert load(path, ["training.epochs=9"]).finetune_prefix.epochs == 9


IMPORTED = "base: model.gguf\n"


def test_on_a_pretrained_base_a_bare_section_has_other_defaults_and_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, f"{IMPORTED}finetune_lora: {{}}\nfinetune_dpo: {{}}\nmerge: {{}}\n")
    params, minigpt = load(path), load(path, ["base=minigpt"])
    lora, dpo = params.finetune_lora, params.finetune_dpo
    assert (lora.window, lora.epochs, lora.precision, lora.train_embeddings) == (
        0,
        3,
        "bf16",
        "new_rows",
    )
    assert (lora.target_modules, lora.alpha) == (("all-linear",), 2 * lora.rank)
    assert dpo.epochs == 1 and dpo.learning_rate <= lora.learning_rate / 10
    assert params.merge.max_logit_difference == 1
    keys = {"window": PRETRAINED, "alpha": PRETRAINED, "batch_size": DEFAULT, "seed": DEFAULT}
    assert {key: params.source("finetune_lora", key) for key in keys} == keys
    assert params.source("finetune_lora", "rank") == PRETRAINED
    for name in ("finetune_lora", "finetune_dpo", "merge"):
        assert minigpt.section(name) == GRAPH.sections[name](), (
            "MiniGPT keeps those that are declared"
        )
    assert minigpt.source("finetune_lora", "window") == DEFAULT
    # as everywhere, the training block is above the defaults, the section above it
    both = load(path, ["training.window=8", "training.epochs=9", "finetune_dpo.epochs=2"])
    assert (both.finetune_lora.window, both.finetune_lora.epochs, both.finetune_dpo.epochs) == (
        8,
        9,
        2,
    )


def test_the_rate_is_that_of_the_bases_width_once_a_config_says_it(tmp_path: Path) -> None:
    def rate(base: str = "model.gguf") -> float:
        path = written(tmp_path, f"base: {base}\nfinetune_lora: {{}}\n")
        found: float = load(path).finetune_lora.learning_rate
        return found

    def write(folder: str, **config: Any) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / folder / "config.json", config)

    assert rate() == rate("org/model") == 2e-4, "not known: that of a large one"
    write("artifacts/base", n_embd=576)
    write("narrow", text_config={"hidden_size": 64})
    write("odd", hidden_size="64", d_model=-1, text_config=[])
    manifest = {"files": {}, "params": {"base": "model.gguf"}}
    write_json(tmp_path / "artifacts/base/manifest.json", manifest)
    assert (rate(), rate("other.gguf")) == (1e-3, 2e-4), "as imported, and not another's"
    assert (rate("narrow"), rate("odd")) == (1e-3, 2e-4)
    write("odd", hidden_size=4096)
    assert rate("odd") == 2e-4
    project = Project.load(
        written(tmp_path, "base: narrow\nfinetune_lora: {learning_rate: 1.0e-4}\n"), GRAPH
    )
    assert advised_learning_rate(project) == 1e-3, "what a sweep tries around"
    assert (
        next(advice.advised for advice in advise(project, Facts("finetune_lora"))) == "about 0.001"
    )


def test_on_a_pretrained_base_alpha_follows_the_rank_unless_it_is_set(tmp_path: Path) -> None:
    path = written(tmp_path, f"{IMPORTED}finetune_lora: {{}}\n")
    assert load(path, ["finetune_lora.rank=32"]).finetune_lora.alpha == 64
    assert load(path, ["finetune_lora.rank=32", "finetune_lora.alpha=8"]).finetune_lora.alpha == 8
    assert (
        load(path, ["finetune_lora.rank=32", "base=minigpt"]).finetune_lora.alpha
        == FinetuneLora().alpha
    )


def test_a_default_share_of_warm_up_gives_way_to_steps_of_it(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"{IMPORTED}training: {{warmup_steps: 2}}\nfinetune_lora: {{}}\nfinetune_full: {{}}\n",
    )
    params = load(path, ["finetune_full.warmup_steps=0"])
    assert [section.warmup_ratio for section in (params.finetune_lora, params.finetune_full)] == [
        0,
        0,
    ]
    assert params.source("finetune_lora", "warmup_ratio") == DEFAULT
    assert (
        load(
            path, ["training.warmup_ratio=0.1", "training.warmup_steps=0"]
        ).finetune_lora.warmup_ratio
        == 0.1
    )


def test_a_form_takes_what_the_file_would_take(tmp_path: Path) -> None:
    params = load(written(tmp_path, f"{IMPORTED}finetune_lora: {{max_steps: 9}}\n"))
    check(params, "finetune_lora", "warmup_steps", 5)
    with pytest.raises(
        UserError,
        match=r"finetune_lora\.warmup_steps must be at least 0, got -1\. Edit params\.yaml",
    ):
        check(params, "finetune_lora", "warmup_steps", -1)
    both = load(written(tmp_path, f"{IMPORTED}finetune_lora: {{warmup_ratio: 0.1}}\n"))
    with pytest.raises(UserError, match="only one of them may be set"):
        check(both, "finetune_lora", "warmup_steps", 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epochs: 0}\n", "training.epochs must be at least 1, got 0. Edit params.yaml."),
        ("training: {rank: 4}\n", "unknown key training.rank"),
        ("training: {data: a.txt}\n", "training.data: each stage names its own data"),
        ("training: 7\n", "training must be a section of key: value lines, got 7"),
        (f"training: {'x' * 90}\n", f"got '{'x' * 59}…."),
        (f"{'x' * 90}\n", f"got '{'x' * 59}…."),
    ],
)
def test_a_wrong_training_block_is_refused_wherever_it_counts(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(written(tmp_path, text))


def test_the_shipped_values_are_those_that_minigpt_is_trained_with() -> None:
    params = load(ROOT / "params.yaml")
    lora = params.finetune_lora
    assert (lora.rank, lora.alpha, lora.learning_rate) == (4, 1.0, 2e-3)
    assert params.finetune_full.learning_rate == params.finetune_freeze.learning_rate == 1e-3
    for section in (params.finetune_full, params.finetune_freeze, lora):
        assert (section.epochs, section.batch_size, section.window) == (50, 4, 4)


def test_a_missing_key_or_section_takes_its_default(tmp_path: Path) -> None:
    params = load(written(tmp_path, "finetune_lora:\n  rank: 8\n"))
    assert (params.finetune_lora.rank, params.finetune_lora.alpha) == (8, 1.0)
    assert params.pretrain == Params(GRAPH.sections).pretrain


def test_set_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "finetune_lora:\n  rank: 8\n")
    assert load(path, ["finetune_lora.rank=16", "pretrain.epochs=3"]).finetune_lora.rank == 16
    assert load(path, ["pretrain.epochs=3"]).pretrain.epochs == 3


# 2e-05: as DVC writes it
@pytest.mark.parametrize("text", ["1e-4", "1E-4", "2e-05", "1e3", "0.0001", "1.0e-4"])
def test_pitfall_25_yaml_1e_4_is_a_number(tmp_path: Path, text: str) -> None:
    is_text_to_pyyaml = isinstance(yaml.safe_load(text), str)
    assert is_text_to_pyyaml == ("." not in text)
    for section, key in (
        ("finetune_lora", "learning_rate"),
        ("finetune_lora", "retention_weight"),
        ("finetune_full", "max_grad_norm"),
        ("expand_vocab", "noise_std"),
        ("merge", "max_logit_difference"),
    ):
        read = load(written(tmp_path, f"{section}:\n  {key}: {text}\n"))
        given = load(ROOT / "params.yaml", [f"{section}.{key}={text}"])
        assert (
            getattr(getattr(read, section), key)
            == getattr(getattr(given, section), key)
            == float(text)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune_lora:\n  rang: 8\n", "unknown key finetune_lora.rang. Did you mean rank?"),
        ("finetune_lroa:\n  rank: 8\n", "unknown key finetune_lroa. Did you mean finetune_lora?"),
        ("finetune_lora:\n  xyzzy: 8\n", "unknown key finetune_lora.xyzzy. Known: seed, data"),
        (
            "finetune_lora:\n  rank: 0\n",
            "finetune_lora.rank must be at least 1, got 0. Edit params.yaml.",
        ),
        ("finetune_lora:\n  rank: 2.5\n", "finetune_lora.rank must be a whole number, got 2.5"),
        ("finetune_lora:\n  rank: true\n", "finetune_lora.rank must be a whole number, got True"),
        ("finetune_lora:\n  rank: four\n", "finetune_lora.rank must be a whole number, got 'four'"),
        ("finetune_lora:\n  alpha: 0\n", "finetune_lora.alpha must be more than 0, got 0"),
        ("finetune_lora:\n  alpha: .nan\n", "finetune_lora.alpha must be a finite number, got nan"),
        ("finetune_lora:\n  alpha: .inf\n", "finetune_lora.alpha must be a finite number, got inf"),
        (
            "finetune_lora:\n  alpha: 1e300\n",
            "finetune_lora.alpha must be at most 1e+30 in size, got '1e300'",
        ),
        (
            "expand_vocab:\n  noise_std: 1.0e+31\n",
            "expand_vocab.noise_std must be at most 1e+30 in size",
        ),
        (
            "finetune_lora:\n  learning_rate: fast\n",
            "learning_rate must be a finite number, got 'fast'",
        ),
        (
            "finetune_lora:\n  train_embeddings: some\n",
            "train_embeddings must be one of all, new_rows, none, got 'some'",
        ),
        (
            "finetune_lora:\n  rank_pattern: q_proj\n",
            "rank_pattern must be a mapping of patterns of module names",
        ),
        (
            "finetune_lora:\n  rank_pattern: {q_proj: 0}\n",
            "rank_pattern.q_proj must be at least 1, got 0. Edit params",
        ),
        (
            "finetune_lora:\n  rank_pattern: {q_proj: 2.5}\n",
            "rank_pattern.q_proj must be a whole number, got 2.5",
        ),
        (
            "finetune_lora:\n  rank_pattern: {q_proj: }\n",
            "rank_pattern.q_proj must be a whole number, got None",
        ),
        (
            "finetune_lora:\n  rank_pattern: {(q_proj: 2}\n",
            "rank_pattern: '(q_proj' is not a regular expression for module names: missing )",
        ),
        (
            "finetune_lora:\n  rank_pattern: {1: 2}\n",
            "rank_pattern: 1 is not a regular expression for module names: it is not a text",
        ),
        ("finetune_lora:\n  rank_pattern: {q_proj: 1, q_proj: 2}\n", "key 'q_proj' twice"),
        (
            "finetune_lora:\n  alpha_pattern: {q_proj: 0}\n",
            "alpha_pattern.q_proj must be more than 0, got 0",
        ),
        (
            "finetune_lora:\n  alpha_pattern: {q_proj: a}\n",
            "alpha_pattern.q_proj must be a finite number, got 'a'",
        ),
        (
            "finetune_lora:\n  init_lora_weights: olora\n",
            "must be one of document, gaussian, kaiming, orthogonal, pissa",
        ),
        (
            "finetune_lora:\n  target_modules: []\n",
            "finetune_lora.target_modules is empty, and so is target_parameters",
        ),
        (
            "finetune_freeze:\n  train_embeddings: maybe\n",
            "train_embeddings must be true or false, got 'maybe'",
        ),
        (
            "finetune_full:\n  data: 7\n",
            "finetune_full.data must be a file or folder, or a list of them",
        ),
        (
            "finetune_full:\n  data: [a, {path: b, weight: 0}]\n",
            "finetune_full.data[1].weight must be more than 0, got 0",
        ),
        (
            "finetune_full:\n  data: [{pathh: a}]\n",
            "unknown key finetune_full.data[0].pathh. Did you mean path?",
        ),
        (
            "finetune_full:\n  data: [{weight: 2}]\n",
            "finetune_full.data[0] must be a path, or {path: …, weight: …}",
        ),
        (
            "finetune_full:\n  data: [a, {path: a}]\n",
            "finetune_full.data has 'a' twice. Give it a weight instead",
        ),
        (
            "finetune_full:\n  data: [{path: a, columns: b}]\n",
            "finetune_full.data[0].columns must be a mapping of keys",
        ),
        (
            "finetune_full:\n  columns: {prompt: 3}\n",
            "finetune_full.columns must be a mapping of keys to columns",
        ),
        ("finetune_full: 7\n", "finetune_full must be a section of key: value lines, got 7"),
        (
            "pretrain:\n  d_model: 60\n  heads: 8\n",
            "pretrain.d_model must be a multiple of 2 × heads = 16",
        ),
        ("pretrain:\n  epochs: 1\n  epochs: 2\n", "key 'epochs' twice"),
        ("- a list\n", "must hold sections"),
        ("a: b: c\n", "is not valid YAML"),
        ("", "must hold sections"),
    ],
)
def test_bad_input_is_one_message_with_key_rule_and_value(
    tmp_path: Path, text: str, message: str
) -> None:
    said = user_error(load, written(tmp_path, text))
    assert message in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=8", "--set takes section.key=value"),
        ("finetune_lora.rank", "--set takes section.key=value"),
        (".rank=8", "--set takes section.key=value"),
        ("project.x=1", "--set project.x: project is not a section in the params file"),
        ("report_to.x=1", "--set report_to.x: report_to is not a section in the params file"),
        ("base=1", "base must be a text, got 1. Change it in --set."),
        ("import.trust_remote_code=3", "must be true or false, got 3. Change it in --set."),
        ("finetune_lora.rank=", "must be a whole number, got None"),
        ("finetune_lora.rank=[", "is not a YAML value"),
        ("nowhere.rank=8", "--set: unknown key nowhere"),
        ("finetune_lora.rang=8", "--set: unknown key finetune_lora.rang. Did you mean rank?"),
        (
            "finetune_lora.rank=0",
            "finetune_lora.rank must be at least 1, got 0. Change it in --set.",
        ),
        (
            "finetune_lora.rank_pattern={a.b: 0}",
            "rank_pattern.a.b must be at least 1, got 0. Change it in --set.",
        ),
        (
            "finetune_lora.rank_pattern={(: 2}",
            "is not a regular expression for module names: .*. Change it in --set.",
        ),
        (
            "finetune_sweep.grid={rank: [4, 0]}",
            "finetune_sweep.grid.rank must be at least 1, got 0. Change it",
        ),
        (
            "finetune_sweep.grid={rank: 4}",
            "must be a list of values, such as .*, got 4. Change it in --set.",
        ),
        ("finetune_sweep.grid={batch_size: [4]}", "differ in .* only. Change it in --set."),
        (
            "evaluate.tasks=[a, a]",
            "evaluate.tasks has 'a' twice. Remove one of them from --set.",
        ),
        ("finetune_lora.data=[1]", "finetune_lora.data[0] must be a path, .* Change it in --set."),
        (
            "finetune_lora.data=[{path: x, weight: -1}]",
            "finetune_lora.data[0].weight must be more than 0, got -1. Change it in --set.",
        ),
        ("finetune_lora.data[0]=x", "--set: unknown key finetune_lora.data[0]. Did you mean data?"),
    ],
)
def test_bad_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load(ROOT / "params.yaml", [override])


def test_an_error_names_the_place_that_its_value_came_from(tmp_path: Path) -> None:
    path = written(tmp_path, "finetune_lora:\n  rank: 0\n").rename(tmp_path / "other.yaml")
    for overrides, place in (
        ([], r"Edit other.yaml\."),
        (["finetune_lora.rank=-1"], r"Change it in --set\."),
        (["merge.prompts=x"], r"Edit other.yaml\."),
    ):
        with pytest.raises(
            UserError, match=rf"finetune_lora.rank must be at least 1, got .*\. {place}"
        ):
            load(path, overrides)
    assert load(path, ["finetune_lora.rank=8"]).finetune_lora.rank == 8


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist. Run this in the project's folder"):
        load(tmp_path / "params.yaml")


@given(st.floats(min_value=1e-12, max_value=1e12), st.integers(min_value=1, max_value=10**9))
def test_every_number_that_python_writes_is_read_back(rate: float, rank: int) -> None:
    params = load(
        ROOT / "params.yaml",
        [f"finetune_lora.learning_rate={rate!r}", f"finetune_lora.rank={rank}"],
    )
    assert (params.finetune_lora.learning_rate, params.finetune_lora.rank) == (rate, rank)


@given(st.text(max_size=80))
def test_any_text_is_params_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load(path), Params)
    except UserError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text", ["{q_proj: 8, '.*[01].v_proj': 1e-1}", "\n    q_proj: 8\n    .*[01].v_proj: 0.1"]
)
def test_a_mapping_is_read_in_its_order_from_the_file_and_from_the_command_line(
    tmp_path: Path, text: str
) -> None:
    expected = [("q_proj", 8.0), (".*[01].v_proj", 0.1)]
    read = load(written(tmp_path, f"finetune_lora:\n  alpha_pattern: {text}\n")).finetune_lora
    assert list(read.alpha_pattern.items()) == expected
    if "\n" not in text:
        given = load(ROOT / "params.yaml", [f"finetune_lora.alpha_pattern={text}"]).finetune_lora
        assert list(given.alpha_pattern.items()) == expected
    for nothing in ("{}", "", "[]"):
        assert (
            load(
                ROOT / "params.yaml", [f"finetune_lora.rank_pattern={nothing}"]
            ).finetune_lora.rank_pattern
            == {}
        )


def test_a_rule_says_what_may_be_left_empty() -> None:
    assert rule(FinetuneLora, "retention_data") == "a text, or empty"
    assert rule(FinetuneLora, "rank") == "a whole number, at least 1, below 2147483648"
    assert rule(FinetuneLora, "target_modules") == "a name or a list of names, or empty"
    patterns = (
        "a mapping of patterns of module names, such as {q_proj: 8}, to a whole number, at least 1"
    )
    assert rule(FinetuneLora, "rank_pattern") == f"{patterns}, below 2147483648, or empty"
