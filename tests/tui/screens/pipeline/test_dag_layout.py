"""The picture of the DAG."""

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.projects import STAGES
from tui.screens.pipeline.dag_layout import Layout, layout
from tui.screens.pipeline.dag_view import pictured

LABEL = 3


def drawn(found: Layout) -> list[str]:
    cells = [[" "] * found.columns for _ in range(found.rows)]
    for (row, column), character in found.lines.items():
        cells[row][column] = character
    for name, place in found.places.items():
        label = f"* {name} " if place.width > len(name) else "* "
        cells[place.row][place.column : place.column + len(label)] = label
    return ["".join(row).rstrip() for row in cells]


def test_the_pipelines_picture_fits_80_columns_and_shows_each_way_once() -> None:
    assert drawn(pictured(STAGES)) == [
        "                             ┌▶ * train_from_scratch ───────────┐",
        "                             ├▶ * finetune_full ────────────────┤",
        "                             ├▶ * finetune_freeze ──────────────┤",
        "* pretrain ─▶ * expand_vocab ┼▶ * finetune_lora ──────▶ * merge ┼▶ * evaluate",
        "                             ├▶ * finetune_prefix ──────────────┤",
        "                             ├▶ * finetune_prompt ──────────────┘",
        "                             └▶ * finetune_sweep",
        "studies * * * * * * * * * ─▶ * figures ─▶ * claims",
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
def test_no_label_covers_another_and_every_need_has_an_arrow(needs: dict[str, tuple[str, ...]]) -> None:
    found = layout(needs, LABEL)
    cells = [
        (place.row, column)
        for place in found.places.values()
        for column in range(place.column, place.column + place.width)
    ]
    assert len(cells) == len(set(cells))
    for node, sources in needs.items():
        place = found.places[node]
        if sources:
            assert found.lines[place.row, place.column - 2] == "▶"
            assert all(found.places[source].column < place.column for source in sources)
