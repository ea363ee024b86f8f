"""The DAG of the stages for people: as a tree, each stage below the one that it needs."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.fleet.states import Fleet
from pipeline.project.stage_graph import Stage
from pipeline.views.stages import StageState, State

GROUP = "(group)"  # the key of the group's row, which is no stage's name
URGENCY: Sequence[State] = (
    "running",
    "died",
    "failed",
    "stopped",
    "changed",
    "waits",
    "missing",
    "current",
)

Names = Mapping[str, Sequence[str]]  # a stage → others


@dataclass(frozen=True)
class StageRow:
    """A row of the tree: a stage, or the group of those whose outputs share a folder."""

    key: str
    guides: str  # lines from the stage above
    label: str
    stage: str  # of the group, the member that needs attention most
    state: StageState | None  # of `stage`; None while it is computed
    after: Sequence[str] = ()  # labels of what else it needs
    parent: str | None = None  # GROUP, in the group
    members: Sequence[StageState | None] = ()  # of the group
    fleet: Fleet | None = None  # a run whose units make the stage elsewhere


def short_name(stage: Stage) -> str:
    """lora for finetune_lora, rank for study_rank; the names that others have are kept."""
    return stage.method if stage.look or stage.group else stage.name


def stage_rows(
    stages: Mapping[str, Stage],
    needs: Names,
    states: Mapping[str, StageState],
    fleets: Iterable[Fleet] = (),
) -> list[StageRow]:
    """The tree from top to bottom. `needs`: stage → the stages that it reads; both are in the DAG's
    order. A run of a fleet stands below its stage.
    """
    ancestors = _ancestors(needs)
    nearest = _nearest(needs, ancestors)
    parents, after = dict[str, str](), dict[str, list[str]]()
    for name in stages:
        shared = _deepest_shared([[need, *ancestors[need]] for need in nearest[name]], ancestors)
        parents[name] = shared
        after[name] = [need for need in nearest[name] if need != shared]

    members = [name for name, stage in stages.items() if stage.group]
    if len(members) < 2:
        members = []
    labels = {name: short_name(stage) for name, stage in stages.items()}
    if members:
        parents[GROUP] = _deepest_shared([ancestors[name] for name in members], ancestors)
        labels |= dict.fromkeys((GROUP, *members), stages[members[0]].group)
    for name in stages:
        if name in members:
            parents[name] = GROUP
        elif parents[name] in members:  # the group would hide it
            after[name].insert(0, parents[name])
            parents[name] = parents[GROUP]

    rows = []
    urgent = _most_urgent(members, states)
    children, below = _children(stages, parents), {f"fleet {run.name}": run for run in fleets}
    for key, run in below.items():
        children[run.stage if run.stage in stages else ""].insert(0, key)
    for key, guides in _walk(children, "", ""):
        if key in below:
            run = below[key]
            parent, state = GROUP if run.stage in members else None, states.get(run.stage)
            rows.append(StageRow(key, guides, "fleet", run.stage, state, parent=parent, fleet=run))
        elif key == GROUP:
            found = [states.get(name) for name in members]
            rows.append(
                StageRow(key, guides, labels[key], urgent, states.get(urgent), members=found)
            )
        else:
            others = list(dict.fromkeys(labels[need] for need in after[key]))
            parent = GROUP if key in members else None
            label = short_name(stages[key])
            rows.append(StageRow(key, guides, label, key, states.get(key), others, parent))
    return rows


def _ancestors(needs: Names) -> dict[str, set[str]]:
    """Stage → all that it needs, directly or not. What stands later in the DAG is left out."""
    ancestors = dict[str, set[str]]()
    for name, sources in needs.items():
        known = [need for need in sources if need in ancestors]
        ancestors[name] = set(known).union(*(ancestors[need] for need in known))
    return ancestors


def _nearest(needs: Names, ancestors: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Stage → those of its needs that no other of them needs too (transitive reduction)."""
    nearest = {}
    for name, sources in needs.items():
        known = [need for need in sources if need in ancestors[name]]
        implied = set[str]().union(*(ancestors[need] for need in known))
        nearest[name] = [need for need in known if need not in implied]
    return nearest


def _deepest_shared(groups: Sequence[Iterable[str]], ancestors: Mapping[str, set[str]]) -> str:
    """The last in the DAG of the stages that are in all groups; "" if there is none."""
    shared = set.intersection(*map(set, groups)) if groups else set[str]()
    return max(shared, key=lambda name: len(ancestors[name]), default="")


def _most_urgent(members: Iterable[str], states: Mapping[str, StageState]) -> str:
    """The member that needs attention most; while no state is known, the first."""
    known = [name for name in members if name in states]
    first = next(iter(members), "")
    return min(known, key=lambda name: URGENCY.index(states[name].state), default=first)


def _children(names: Iterable[str], parents: Mapping[str, str]) -> dict[str, list[str]]:
    """The children of each row in the DAG's order; the group stands where its first member would."""
    children = defaultdict[str, list[str]](list)
    for name in names:
        if parents[name] == GROUP and not children[GROUP]:
            children[parents[GROUP]].append(GROUP)
        children[parents[name]].append(name)
    return children


def _walk(children: Names, parent: str, guides: str) -> Iterator[tuple[str, str]]:
    """Every row's key, and its guides."""
    for number, key in enumerate(children.get(parent, ()), 1):
        branch, below = "├ ", "│ "
        if not parent:
            branch = below = ""
        elif number == len(children[parent]):
            branch, below = "└ ", "  "
        yield key, guides + branch
        yield from _walk(children, key, guides + below)
