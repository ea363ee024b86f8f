"""Layout of the DAG."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from tests.helpers.projects import PIPELINE, STAGES
from tui.screens.pipeline.dag import DagView, Layout, layout

LABEL = 3


def drawn(result: Layout) -> list[str]:
    cells = [[" "] * result.columns for _ in range(result.rows)]
    for (row, column), character in result.lines.items():
        cells[row][column] = character
    for name, position in result.positions.items():
        label = f"* {name} "
        cells[position.row][position.column : position.column + len(label)] = label
    return ["".join(row).rstrip() for row in cells]


def test_the_pipelines_picture_fits_80_columns_and_shows_each_way_once() -> None:
    probes = [f"probe_{number}" for number in range(10)]
    measuring = {
        **{name: Stage(name, "", f"probes/{name}", "probe", name, Section) for name in probes},
        **{name: Stage(name, "", name, name, name, Section) for name in ("drawing", "overview")},
    }
    view = DagView({name: STAGES[name] for name in PIPELINE} | measuring, {}, "")
    assert [line.rstrip() for line in view.render().plain.splitlines()] == [
        "                             ┌▶ · scratch ───────────┐",
        "                             ├▶ · full ──────────────┤",
        "                             ├▶ · freeze ────────────┤",
        "· pretrain ─▶ · expand_vocab ┼▶ · lora ────▶ · merge ┼▶ · evaluate",
        "                             ├▶ · prefix ────────────┤",
        "                             ├▶ · prompt ────────────┘",
        "                             └▶ · sweep",
        "probes · · · · · · · · · · ─▶ · drawing ─▶ · overview",
    ]


def test_one_node_and_a_chain() -> None:
    assert drawn(layout({"a": ()}, LABEL)) == ["* a"]
    assert drawn(layout({"a": (), "b": ("a",), "c": ("a", "b")}, LABEL)) == ["* a ─▶ * b ─▶ * c"]


@st.composite
def dags(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    names = [f"n{number}" for number in range(draw(st.integers(1, 7)))]
    return {
        name: tuple(draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else ())
        for i, name in enumerate(names)
    }


@given(dags())
def test_no_label_covers_another_and_every_need_has_an_arrow(
    needs: dict[str, tuple[str, ...]],
) -> None:
    result = layout(needs, LABEL)
    cells = [
        (position.row, column)
        for position in result.positions.values()
        for column in range(position.column, position.column + position.width)
    ]
    assert len(cells) == len(set(cells))
    for node, sources in needs.items():
        position = result.positions[node]
        if sources:
            assert result.lines[position.row, position.column - 2] == "▶"
            assert all(result.positions[source].column < position.column for source in sources)
