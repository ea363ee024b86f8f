"""What the panes of the screen say of themselves."""

from textual.binding import Binding, BindingType

from pipeline.views.series import METRICS
from tui.panes.pane import About

HELP = """\
What the training runs log over their steps: loss, held-out loss, divergence, pace, memory, and the
answers that they gave. Running ones are followed. `x` saves what is shown as a picture or as
numbers.
"""
KEYS: list[BindingType] = [
    Binding("left", "plots('sideways', (-1,))", "Step cursor", id="curves.left", key_display="← →"),
    Binding(
        "right",
        "plots('sideways', (1,))",
        "Step cursor to the right",
        id="curves.right",
        show=False,
    ),
    Binding("l", "plots('toggle_log')", "Log", id="curves.log"),
    Binding(
        "comma",
        "plots('smooth', (-1,))",
        "Smooth less",
        id="curves.smooth_less",
        key_display=",",
        show=False,
    ),
    Binding(
        "full_stop", "plots('smooth', (1,))", "Smooth", id="curves.smooth_more", key_display=", ."
    ),
    Binding("x", "export", "Export", id="curves.export"),
    Binding("a", "answers", "Answers", id="curves.answers"),
    Binding("0", "plots('reset')", "All steps", id="curves.reset"),
    Binding("f", "plots('follow')", "Follow", id="curves.follow"),
]

PANES = {
    "chart": About(
        METRICS["loss"].title,
        """\
One metric over the steps, the smoothed line of each run that is on. The run that the list's cursor
is on is thicker, lies on top, and has its raw values behind it. Beside each line's end: its name
and newest value, or the value at the step cursor.

`×` measured on held-out examples · `»` flat from here: later epochs' mean losses stay within 5% of
the total drop.

The scale is logarithmic where the values span a factor of ten; `l` switches. *All steps* grows
with the run, *last … steps* moves with it, *steps … to …* stays. A drag moves the picture, the
wheel zooms, a click sets the step cursor.
""",
        [
            Binding("up", "screen.plots('zoom', (0.7,))", "zoom in", id="curves.zoom_in"),
            # 1.43 takes a step of 0.7 back
            Binding("down", "screen.plots('zoom', (1.43,))", "out", id="curves.zoom_out"),
            Binding("v", "screen.plots('zoom', (1, 0.7))", "values in", id="curves.zoom_values_in"),
            Binding("V", "screen.plots('zoom', (1, 1.43))", "out", id="curves.zoom_values_out"),
            Binding(
                "home,g", "screen.plots('step', (0,))", "first step", id="curves.first", show=False
            ),
            Binding(
                "end,G", "screen.plots('step', (1,))", "last step", id="curves.last", show=False
            ),
        ],
    ),
    "small": About(
        "Also logged",
        """\
What the runs log beside the large chart, each with the value of the run that the list's cursor is
on (at the step cursor, if there is one). What does not change is a number and no plot. Enter, or a
click, enlarges one in place of the loss; Esc brings the loss back.

*divergence* is the Kullback–Leibler divergence from the base on the retention texts, in nats a
token: 0 means that nothing was forgotten · *margin* and *accuracy* compare chosen with rejected
answers · *memory* is measured at the peak of a step.
""",
        [
            Binding("enter", "focused.open", "enlarge", id="curves.enlarge"),
            Binding(
                "left",
                "screen.plots('choose', (-1,))",
                "choose",
                id="curves.choose",
                key_display="← →",
            ),
            Binding(
                "right", "screen.plots('choose', (1,))", "next", id="curves.choose_next", show=False
            ),
        ],
    ),
    "runs": About(
        "Runs",
        """\
The runs: sign and colour of the method (`·` where it is off), name, loss, and the share of the
base's answers on old sentences that it kept, if it was evaluated. The loss is on held-out examples
if they were measured. For a run that is not finished: `▶` running, `‖` stopped, `✗` failed or
died, and how far it is. One that is off shows when it ended.

On are the latest run of each method and what is running; Space switches. A sweep is one line,
drawn as its best adapter (bright) and the others (dim); Enter opens it. Names tell what differs
from the current settings.
""",
        [
            Binding("space", "screen.switch", "show", id="curves.toggle"),
            Binding("enter", "screen.open", "open", id="curves.open"),
            Binding("i", "screen.info", "all", id="curves.info"),
            Binding("o", "screen.stage", "stage", id="curves.stage"),
            Binding("c", "screen.chat", "chat", id="curves.chat"),
        ],
        filters="filter",
    ),
    "run": About(
        "Run",
        """\
The run that the list's cursor is on: its state, values at its newest step or at the step cursor,
memory as it was predicted and measured, and its pace. The time left is estimated from the last 200
steps. `i` in the list tells all.
""",
    ),
    "answers": About(
        "Answers",
        """\
What the runs that are on answered to the prompts of `samples` while they trained: at the step
cursor, or at last.
""",
    ),
}
