"""The tree: every stage once, below what it needs; what the rows say."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from pipeline.project.gate import Broken, Verdict
from pipeline.project.logs.run_state import Journal
from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from pipeline.views.stages import StageState, State
from tests.helpers.projects import PIPELINE, STAGES
from tui.screens.pipeline.tree import GROUP, MUTED, SIGNS, brief, draw_rows, tree_rows

PROBES = {  # as an extension's stages that measure: two of a group, and one that reads both
    f"probe_{name}": Stage(
        f"probe_{name}", "", f"probes/{name}", "probe", name, Section, needs=("expand_vocab",)
    )
    for name in ("norm", "size")
}
READER = Stage(
    "overview",
    "",
    "overview",
    "overview",
    "overview",
    Section,
    needs=("finetune_sweep", "evaluate", *PROBES),
)
SHOWN = {name: STAGES[name] for name in PIPELINE} | PROBES | {"overview": READER}
NEEDS = {name: [need for need in stage.needs if need in SHOWN] for name, stage in SHOWN.items()}


def drawn(unfolded: bool) -> list[str]:
    rows = tree_rows(SHOWN, NEEDS, unfolded)
    return [
        f"{row.guides}{row.label}{' ← ' + ', '.join(row.after) if row.after else ''}"
        for row in rows
    ]


def test_the_tree_of_the_pipeline_and_of_what_measures_it() -> None:
    assert drawn(False) == [
        "pretrain",
        "└ expand_vocab",
        "  ├ scratch",
        "  ├ full",
        "  ├ freeze",
        "  ├ lora",
        "  │ └ merge",
        "  ├ prefix",
        "  ├ prompt",
        "  ├ sweep",
        "  ├ evaluate ← scratch, full, freeze, merge, prefix, prompt",
        "  ├ ▸ probes",
        "  └ overview ← sweep, evaluate, probes",
    ]
    assert drawn(True)[11:14] == ["  ├ ▾ probes", "  │ ├ norm", "  │ └ size"]


@st.composite
def dags(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    names = draw(st.lists(st.sampled_from(sorted(SHOWN)), min_size=1, max_size=9, unique=True))
    return {
        name: tuple(draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else ())
        for i, name in enumerate(names)
    }


@given(dags())
def test_every_stage_stands_once_and_below_something_that_it_needs(
    needs: dict[str, tuple[str, ...]],
) -> None:
    stages = {name: SHOWN[name] for name in needs}
    rows = tree_rows(stages, needs, unfolded=True)
    names = [row.key for row in rows if row.key != GROUP]
    assert sorted(names) == sorted(needs)
    above: list[str] = []
    for row in rows:
        del above[len(row.guides) // 2 :]
        every = set.intersection(*(ancestors(needs, name) for name in row.members or (row.key,)))
        assert {each for each in above if each != GROUP} <= every
        above.append(row.key)
    folded = {row.key for row in tree_rows(stages, needs, unfolded=False)}
    if GROUP in folded:
        assert folded - {GROUP} == {name for name in needs if not stages[name].group}


def ancestors(needs: dict[str, tuple[str, ...]], name: str) -> set[str]:
    return {*needs[name]}.union(*(ancestors(needs, need) for need in needs[name]))


def line(
    state: State, width: int, reasons: tuple[str, ...] = (), run: Journal | None = None
) -> str:
    stages: dict[str, Stage] = {"finetune_lora": STAGES["finetune_lora"]}
    states = {"finetune_lora": StageState(STAGES["finetune_lora"], state, reasons, run)}
    (text,) = draw_rows(tree_rows(stages, {"finetune_lora": ()}, False), states, width).values()
    return text.plain


def test_what_a_row_says_of_each_state() -> None:
    done = Journal("done", 1, 100.0, ended=109.0)
    running = Journal("running", 1, 0.0, done=128, total=200, rate=6.0)
    assert line("current", 30, (), done) == "✓ lora                     9 s"
    assert line("changed", 30, ("rank 4 → 16",), done) == "● lora  rank 4 → 16        9 s"
    # the reason rather than the time
    assert line("changed", 22, ("rank 4 → 16",), done) == "● lora  rank 4 → 16"
    assert line("changed", 18, ("rank 4 → 16",), done) == "● lora  rank 4 → …"
    assert line("running", 40, (), running) == "▶ lora  ━━━━━╌╌╌  64%  12 s left"
    assert line("running", 22, (), running) == "▶ lora  ━━━━━╌╌╌  64%"
    assert line("running", 14, (), running) == "▶ lora   64%"
    assert line("running", 40) == "▶ lora  starting"
    assert line("missing", 40, ("needs expand_vocab",)) == "○ lora  not made"
    assert (
        line("missing", 60, ("base must be minigpt",)) == "○ lora  not made: base must be minigpt"
    )
    assert (
        line("failed", 60, ("rank must be at least 1",))
        == "✗ lora  failed: rank must be at least 1"
    )
    assert line("current", 40, ("gate passed",)) == "✓ lora  gate passed"


def test_a_stage_whose_models_break_limits_is_red_though_it_is_up_to_date() -> None:
    verdict = Verdict(("lora",), (Broken("lora", "new_loss", 1.0, 2.0),))
    states = {
        "evaluate": StageState(
            STAGES["evaluate"], "current", ("gate failed: 1 limit",), None, verdict
        )
    }
    (text,) = draw_rows(
        tree_rows({"evaluate": STAGES["evaluate"]}, {"evaluate": ()}, False), states, 40
    ).values()
    assert text.plain == "✗ evaluate  gate failed: 1 limit"
    assert {str(span.style) for span in text.spans} - {MUTED} == {SIGNS["failed"][1]}


def test_rows_of_any_state_and_width_are_at_most_that_wide() -> None:
    rows = tree_rows(SHOWN, NEEDS, True)
    for state in get_args(State):
        states = {
            name: StageState(stage, state, ("because " * 9,)) for name, stage in SHOWN.items()
        }
        for width in range(1, 90, 7):
            for text in draw_rows(rows, states, width).values():
                assert text.cell_length <= max(width, 16 + 2), (state, width, text.plain)


def test_a_group_says_what_needs_attention_most() -> None:
    states = {name: StageState(stage, "current") for name, stage in SHOWN.items()}
    states["probe_size"] = StageState(
        PROBES["probe_size"], "running", (), Journal("running", 1, 0.0, 5, 10)
    )
    texts = draw_rows(tree_rows(SHOWN, NEEDS, False), states, 60)
    assert texts[GROUP].plain == "▶   ├ ▸ probes    1/2  ▶ size ━━━━╌╌╌╌  50%"


def test_times_take_five_cells() -> None:
    assert [brief(s) for s in (0.2, 1, 59.4, 60, 125, 3599, 3600, 12345)] == [
        *("<1 s", "1 s", "59 s", "1:00", "2:05", "59:59", "1h00", "3h25"),
    ]
