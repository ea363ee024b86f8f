"""Lay out a DAG in characters: one column per depth, edges from the right of a node to the left of the next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

N, E, S, W = 1, 2, 4, 8
LINES = {E | W: "─", N | S: "│", E | S: "┌", S | W: "┐", N | E: "└", N | W: "┘", N | E | S: "├", N | S | W: "┤"}
LINES |= {E | S | W: "┬", N | E | W: "┴", N | E | S | W: "┼", W: "─", E: "─", N: "│", S: "│"}
GUTTER = 3  # character columns before a node: bend, arrow, space


@dataclass(frozen=True)
class Position:
    """Where a node's label starts, and its width including the space after it."""

    row: int
    column: int
    width: int


@dataclass(frozen=True)
class Layout:
    """Positions of the nodes, and the line characters by (row, column)."""

    positions: Mapping[str, Position]
    lines: Mapping[tuple[int, int], str]
    rows: int
    columns: int


def layout(needs: Mapping[str, Sequence[str]], margin: int) -> Layout:
    """Lay out the nodes of `needs` (node → its dependencies), which must be in topological order.

    A label is `margin` columns wider than the node's name: a symbol before it and a space after it.
    """
    edges = [(source, node) for node in needs for source in _direct_needs(node, needs)]
    depth: dict[str, int] = {}
    for node in needs:
        depth[node] = 1 + max((depth[source] for source in needs[node]), default=-1)
    widths = [
        margin + max(len(node) for node in needs if depth[node] == level) for level in range(max(depth.values()) + 1)
    ]
    starts = [sum(widths[:level]) + GUTTER * level for level in range(len(widths))]
    rows = _assign_rows(needs, edges, depth)
    positions = {node: Position(rows[node], starts[depth[node]], margin + len(node)) for node in needs}
    return Layout(positions, _route_edges(edges, positions), 1 + max(rows.values()), starts[-1] + widths[-1])


def _direct_needs(node: str, needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The dependencies of `node` that are not implied by another (transitive reduction)."""
    indirect = {far for near in needs[node] for far in _transitive_needs(near, needs)}
    return [source for source in needs[node] if source not in indirect]


def _transitive_needs(node: str, needs: Mapping[str, Sequence[str]]) -> set[str]:
    return {far for near in needs[node] for far in (near, *_transitive_needs(near, needs))}


def _assign_rows(needs: Iterable[str], edges: Sequence[tuple[str, str]], depth: Mapping[str, int]) -> dict[str, int]:
    """Nodes of one depth get a row each. A single node continues the row of its only source, or is centred."""
    tallest = max(sum(other == level for other in depth.values()) for level in depth.values())
    rows: dict[str, int] = {}
    for level in range(max(depth.values()) + 1):
        nodes = [node for node in needs if depth[node] == level]
        for index, node in enumerate(nodes):
            sources = [source for source, target in edges if target == node]
            is_chain = len(nodes) == len(sources) == 1 and sum(source == sources[0] for source, _ in edges) == 1
            rows[node] = rows[sources[0]] if is_chain else (tallest - len(nodes)) // 2 + index
    return rows


def _route_edges(edges: Sequence[tuple[str, str]], positions: Mapping[str, Position]) -> dict[tuple[int, int], str]:
    """Every edge runs along the source's row, turns just before the target's column, and ends in an arrow."""
    directions: dict[tuple[int, int], int] = {}

    def add(row: int, column: int, direction: int) -> None:
        directions[row, column] = directions.get((row, column), 0) | direction

    for source, target in edges:
        start, end = positions[source], positions[target]
        bend = end.column - GUTTER
        for column in range(start.column + start.width, bend):
            add(start.row, column, E | W)
        low, high = sorted((start.row, end.row))
        for row in range(low, high):
            add(row, bend, S)
            add(row + 1, bend, N)
        add(start.row, bend, W)
        add(end.row, bend, E)
    characters = {cell: LINES[direction] for cell, direction in directions.items()}
    arrows = {(positions[target].row, positions[target].column - 2): "▶" for _, target in edges}
    return characters | arrows
