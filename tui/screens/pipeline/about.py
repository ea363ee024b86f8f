"""What the panes of the screen say of themselves."""

from textual.binding import Binding

from tui.panes.pane import About

STAGES = About(
    "Stages",
    """\
The tree is the DAG: a stage stands below the one that it needs, *after …* names what else it
needs. The sign is its state. Of a stage that runs: how much is done and how long it will take,
from its pace of late and that of its last run. Of a changed one: what changed since its artifact
was made. At the right: how long the last run took.

The cursor follows the stage that runs, until you move it. **Enter** goes to its params, **S** runs
this stage alone, **F** again though nothing changed, **R** all that is out of date. **Space** (or
← →) folds the studies. A *fleet* below a stage is a run of `--on`: how many of its units are done,
how far they are together; **Enter** goes to its units.""",
    [Binding("enter", "screen.pane('params')", "params")],
)
FACTS = About(
    "Stage",
    "The state of the stage that the cursor is on, why it is so, who runs it, and notes of its "
    "last run.",
)
UNITS = About(
    "Units",
    """\
The units of a fleet's run: what each does, where, in which attempt, how far it is, and what it
makes, or why it failed. It is what their files tell; `lora fleet` asks the engine's queue too. The
curves are on the screen Curves. **s** sorts.""",
    filters="filter",
)
PARAMS = About(
    "Params",
    """\
The settings of the stage that the cursor is on. **●** was another value when its artifact was
made: the stage runs again with the new one. Then come those that params.yaml sets, the others of
this stage (grey: their defaults), and groups of settings that all training shares. Below the
cursor: what the param means (the comment in params.yaml, if it has one), the valid values, and
where its value is set.

**Enter** edits the value in place, checked while you type; ↑ ↓ step through the values that a
choice has. **Enter** again writes it to params.yaml (comments and layout stay), **Esc** keeps it
as it was, **z** takes a write back. **Space**, ← → fold a group. **/** finds a param in all groups
by its name, value or meaning.""",
    [Binding("enter", "screen.edit_param", "edit", id="pipeline.edit")],
    filters="filter",
)
LOG = About(
    "Log",
    """\
What the stage printed when the pipeline ran it last, and the steps that it logged. The newest
lines are followed until you scroll up; **End** or **f** follows again. **/** searches: **n** goes
to the next match, **N** to the one before. **a** shows the whole log of the pipeline, with what
dvc says. **y** copies the lines, **+** gives the log the whole screen. A stage that was started in
a terminal prints there; of it only the steps are here.""",
    [
        Binding("a", "screen.whole_log", "all stages", id="pipeline.whole_log"),
        Binding("f", "follow", "follow", id="pipeline.follow"),
        Binding("y", "copy", "copy", id="pipeline.copy_log"),
    ],
    filters="search",
)
METRICS = About(
    "Metrics since the last commit",
    """\
Each number of `artifacts/evaluation/metrics.json` that differs from the one in the last git
commit, in six digits. What the numbers mean, and the models side by side, is on the screen
Results.""",
)
PANES = {"stages": STAGES, "facts": FACTS, "units": UNITS, "params": PARAMS, "metrics": METRICS}
