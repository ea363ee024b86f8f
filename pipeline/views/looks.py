"""The color and sign of a run in every chart: its method's, or the first of OTHERS free."""

from collections.abc import Mapping

from pipeline.project.stage_graph import Look
from pipeline.stages.registry import GRAPH

# of runs that are not a stage's last
OTHERS = ("#999999", "#009E73", "#CC79A7")
OTHER_SIGNS = "○△□◇▽◀▶◁▷"
OTHER_LOOKS = len(OTHERS) * len(OTHER_SIGNS)


def other_look(number: int) -> Look:
    """The look of the `number`th older run. There are `OTHER_LOOKS`, then they repeat."""
    # After each round of colors the sign moves on by one more. As 3 divides 9, each sign would
    # otherwise have one color only.
    return Look(
        OTHERS[number % len(OTHERS)],
        OTHER_SIGNS[(number + number // len(OTHERS)) % len(OTHER_SIGNS)],
    )


def assign_looks(stages: Mapping[str, str], looks: dict[str, Look]) -> None:
    """Give each run a look, in place. `stages`: run → its stage, a stage's last run first.

    The last run of a method gets the method's look; any other keeps the first that was free.
    """
    of_methods = {stage.look for stage in GRAPH.stages.values()}
    seen: set[str] = set()
    for run, stage in stages.items():
        of_method = GRAPH.stages[stage].look if stage not in seen else None
        seen.add(stage)
        if of_method:
            looks[run] = of_method
        elif run not in looks or looks[run] in of_methods:
            taken = {looks[other] for other in stages if other in looks}
            free = (look for look in map(other_look, range(OTHER_LOOKS)) if look not in taken)
            looks[run] = next(free, other_look(len(taken)))
