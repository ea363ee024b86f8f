"""The tree of the stages: every stage once, below what it needs."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.project.logs.run_state import Journal
from pipeline.views.stage_tree import GROUP, StageRow, stage_rows
from pipeline.views.stages import StageState
from tests.helpers.stages import NEEDS, PROBES, SHOWN


def drawn(row: StageRow) -> str:
    return f"{row.guides}{row.label}{' ← ' + ', '.join(row.after) if row.after else ''}"


def test_the_tree_of_the_pipeline_and_of_what_measures_it() -> None:
    rows = stage_rows(SHOWN, NEEDS, {})
    assert [drawn(row) for row in rows] == [
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
        "  ├ probes",
        "  │ ├ norm",
        "  │ └ size",
        "  └ overview ← sweep, evaluate, probes",
    ]
    assert [row.key for row in rows if row.parent == GROUP] == [*PROBES]
    assert [row.key for row in rows if row.members] == [GROUP]


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
    rows = stage_rows(stages, needs, {})
    assert sorted(row.key for row in rows if row.key != GROUP) == sorted(needs)
    members = [row.key for row in rows if row.parent == GROUP]
    above: list[str] = []
    for row in rows:
        del above[len(row.guides) // 2 :]
        names = members if row.key == GROUP else [row.key]
        shared = set.intersection(*(ancestors(needs, name) for name in names))
        assert {name for name in above if name != GROUP} <= shared
        above.append(row.key)
    if members:
        assert members == [name for name in needs if stages[name].group]


def ancestors(needs: dict[str, tuple[str, ...]], name: str) -> set[str]:
    return {*needs[name]}.union(*(ancestors(needs, need) for need in needs[name]))


def test_a_group_stands_for_the_member_that_needs_attention_most() -> None:
    states = {name: StageState(stage, "current") for name, stage in SHOWN.items()}
    run = Journal("running", 1, 0.0, 5, 10)
    states["probe_size"] = StageState(PROBES["probe_size"], "running", (), run)
    group = next(row for row in stage_rows(SHOWN, NEEDS, states) if row.key == GROUP)
    assert group.stage == "probe_size" and group.state is states["probe_size"]
    assert group.members == [states[name] for name in PROBES]
    unknown = next(row for row in stage_rows(SHOWN, NEEDS, {}) if row.key == GROUP)
    assert unknown.stage == "probe_norm" and unknown.state is None
