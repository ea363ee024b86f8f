"""A picture of a DAG in characters: columns by depth, lines from the right of a node to the left of another."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

N, E, S, W = 1, 2, 4, 8
LINES = {E | W: "─", N | S: "│", E | S: "┌", S | W: "┐", N | E: "└", N | W: "┘", N | E | S: "├", N | S | W: "┤"}
LINES |= {E | S | W: "┬", N | E | W: "┴", N | E | S | W: "┼", W: "─", E: "─", N: "│", S: "│"}
GUTTER = 3  # columns before a node: bend, arrow, space


@dataclass(frozen=True)
class Place:
    """Where a node's label starts, and how wide it is with the space after it."""

    row: int
    column: int
    width: int


@dataclass(frozen=True)
class Layout:
    """Places of the nodes, and the character of each cell that a line crosses, by (row, column)."""

    places: Mapping[str, Place]
    lines: Mapping[tuple[int, int], str]
    rows: int
    columns: int


def layout(needs: Mapping[str, Sequence[str]], margin: int) -> Layout:
    """Place every node; `needs` in an order in which what is needed comes first.

    A label is its node's name and `margin` columns: what stands before the name, and a space after it.
    """
    edges = [(source, node) for node in needs for source in _direct(node, needs)]
    depth: dict[str, int] = {}
    for node in needs:
        depth[node] = 1 + max((depth[source] for source in needs[node]), default=-1)
    widths = [
        margin + max(len(node) for node in needs if depth[node] == level) for level in range(max(depth.values()) + 1)
    ]
    starts = [sum(widths[:level]) + GUTTER * level for level in range(len(widths))]
    rows = _rows(needs, edges, depth)
    places = {node: Place(rows[node], starts[depth[node]], margin + len(node)) for node in needs}
    return Layout(places, _lines(edges, places), 1 + max(rows.values()), starts[-1] + widths[-1])


def _direct(node: str, needs: Mapping[str, Sequence[str]]) -> list[str]:
    """What `node` needs and does not get through something else that it needs."""
    through = {far for near in needs[node] for far in _all(near, needs)}
    return [source for source in needs[node] if source not in through]


def _all(node: str, needs: Mapping[str, Sequence[str]]) -> set[str]:
    return {far for near in needs[node] for far in (near, *_all(near, needs))}


def _rows(needs: Iterable[str], edges: Sequence[tuple[str, str]], depth: Mapping[str, int]) -> dict[str, int]:
    """Nodes side by side get rows of their own; a lone node the row of the only one it follows, or the middle."""
    tallest = max(sum(other == level for other in depth.values()) for level in depth.values())
    rows: dict[str, int] = {}
    for level in range(max(depth.values()) + 1):
        nodes = [node for node in needs if depth[node] == level]
        for index, node in enumerate(nodes):
            sources = [source for source, target in edges if target == node]
            alone = len(nodes) == len(sources) == 1 and sum(source == sources[0] for source, _ in edges) == 1
            rows[node] = rows[sources[0]] if alone else (tallest - len(nodes)) // 2 + index
    return rows


def _lines(edges: Sequence[tuple[str, str]], places: Mapping[str, Place]) -> dict[tuple[int, int], str]:
    """Along the source's row, up or down just before the target's column, into the target."""
    ways: dict[tuple[int, int], int] = {}

    def add(row: int, column: int, way: int) -> None:
        ways[row, column] = ways.get((row, column), 0) | way

    for source, target in edges:
        start, end = places[source], places[target]
        bend = end.column - GUTTER
        for column in range(start.column + start.width, bend):
            add(start.row, column, E | W)
        low, high = sorted((start.row, end.row))
        for row in range(low, high):
            add(row, bend, S)
            add(row + 1, bend, N)
        add(start.row, bend, W)
        add(end.row, bend, E)
    characters = {place: LINES[way] for place, way in ways.items()}
    arrows = {(places[target].row, places[target].column - 2): "▶" for _, target in edges}
    return characters | arrows
