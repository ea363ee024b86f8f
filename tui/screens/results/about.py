"""What the panes of the screen say of themselves."""

from textual.binding import Binding

from tui.panes.pane import About

BEST, FRONT = "◂", "◆"  # the model that forgot least or has the lowest loss; the Pareto front
CHAT = Binding("c", "screen.ask('chat')", "chat", id="results.chat")
CURVE = Binding("o", "screen.ask('curve')", "curve", id="results.open")
NUMBERS = Binding("i", "screen.ask('numbers')", "all numbers", id="results.fields")
EVALUATE = Binding("E", "screen.ask('evaluate')", "evaluate", id="results.evaluate")
SHIP = Binding("x", "screen.ask('ship')", "ship", id="results.ship")

PANES = {
    "scatter": About(
        "Learned against kept",
        """\
Each sign is a model: **to the right** it learned more of what is new, **upwards** it kept more of
what the base knew. The best is in the upper right corner. A quantity of which less is better, such
as a loss, is drawn from right to left, so this always holds. Lines through a sign are the 95%
bootstrap intervals of a task's score. Models in one cell share a sign and a label.

- `h` chooses what is shown to the right, `v` upwards: what was measured, and each task of
  `evaluate.tasks`.
""",
        [
            Binding("h", "screen.axis('x')", "horizontal", id="results.horizontal"),
            Binding("v", "screen.axis('y')", "vertical", id="results.vertical"),
        ],
    ),
    "methods": About(
        "Methods",
        f"""\
A row for each model that `lora evaluate` compared; further to the right is all else it measured.

- **learned**: answers as expected, new sentences completed word for word, or the loss on them
  (nats per token, less is better).
- **kept**: next-token choices on old sentences that are still the base's. Green: more than half;
  red: little.
- **trained**: share of all parameters. **size**: weights to store; an adapter's are beside one
  copy of its base.
- **task**: `··──●──·` is the score from 0 to 1 with its 95% bootstrap interval.
- `{BEST}` forgot least. `✗` breaks a limit of `evaluate.limits`; the pane *Model* says which.
  `●`: its settings are not those of params.yaml, as after `--set`.

`c` or Enter prompts the model beside the base. `o` shows its loss curve, `i` all its numbers, `E`
evaluates again. `s` sorts, `<` `>` sort by the column beside. ← → move to the columns that do not
fit.
""",
        [CHAT, CURVE, NUMBERS, EVALUATE, SHIP],
        filters="filter",
    ),
    "model": About(
        "Model",
        """\
The model that the table's cursor is on. A task's line is its score from 0 to 1 with the 95%
bootstrap interval, then the change from the base, example by example, with its own interval: a
change whose interval holds 0 may be chance.
""",
    ),
    "sweep": About(
        "Sweep",
        f"""\
A row for each adapter of `finetune_sweep`. **loss**: on held-out data; without any, of the last
epoch of training (nats per token). **divergence**: KL from the base on `finetune_sweep.old_data`,
else `evaluate.old_data` (nats per token). Less is better of both.

- `{BEST}` has the lowest loss. `{FRONT}` is on the **Pareto front**: no other has a lower loss
  without diverging more.
- *best at the edge*: it has the highest or lowest value that was tried, so a better one may be
  beyond it.
- An adapter that diverged, or that the search stopped early, has no loss.

`c` or Enter prompts it beside the base, `o` shows its loss curve. `E` evaluates it: **kept** is
then the share of old answers that are still the base's.
""",
        [CHAT, CURVE, EVALUATE, SHIP],
        filters="filter",
    ),
    "plots": About(
        "Loss by key",
        f"""\
A plot for each key that the sweep varied: its values to the right, the loss upwards. Values that
span a decade have a logarithmic axis. With `finetune_sweep.old_data`, the first plot is the loss
against the divergence from the base, and `{FRONT}` are the Pareto front: the adapters that no
other beats in both. The adapter that the table's cursor is on has its name beside it.

`+` enlarges the pane.
""",
    ),
    "reports": About(
        "Reports", "The reports that there are. Enter moves to the page.", filters="filter"
    ),
    "report": About(
        "Report",
        """\
The report that a stage wrote, as text. Arrows, j k, PgUp PgDn, g G move in it.

- `/` searches: what is typed is marked, and the page moves to the first; `n` moves to the next.
- `▣` stands where the page has a picture: `f` shows it.
""",
        filters="search",
    ),
    "figures": About(
        "Figures",
        "The pictures that the evaluation and other stages wrote. Enter moves to the picture.",
        filters="filter",
    ),
    "figure": About(
        "Figure",
        """\
The picture as well as the terminal can draw it: its pixels in kitty, Ghostty, WezTerm, iTerm2,
foot, mlterm, mintty, Contour and Windows Terminal; half blocks elsewhere, in tmux and in a
browser. `+` enlarges it.

- `p` draws it in another way: half blocks, sixel, kitty's protocol. Where nothing appears, the
  terminal cannot; `p` again.
- `o` shows the numbers that it was drawn from. An SVG is for a browser; its PNG is shown here.
""",
        [
            Binding("o", "screen.figure_numbers", "numbers", id="results.figure_numbers"),
            Binding("p", "screen.pixels", "pixels", id="results.pixels"),
        ],
    ),
}
