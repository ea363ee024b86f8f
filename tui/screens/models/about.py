"""What the panes of the models say of themselves."""

from textual.binding import Binding

from tui.panes.pane import About

MODELS = About(
    "Models",
    """\
The pipeline's models, then a line for each folder of others. `●` is chosen, the sign and colour
before the name are those of the method's curve.

* **learned**: share of the answers to new prompts that are as expected (of long ones their
  ROUGE-L), of the new sentences that it completes, or of the chosen answers that it prefers: the
  first of these that is known; else the loss on new sentences, in nats per token, as in Results.
* **kept**: share of the base's answers to old sentences that are still the same; **forgot**: how
  much the loss on them rose, in nats per token. Of a folder: of the one that keeps most.
* **loss**: mean loss of the last epoch of training.
* **✓**: `✓` the files are those that training wrote, `✗` they are not, or the model breaks a
  limit of `evaluate.limits`; `?` there is no manifest. `★` is a run's best checkpoint.

Sorted, all models are in one list, whatever folder they are in.""",
    [
        Binding("c", "screen.chat", "chat", id="models.chat"),
        Binding("s", "sort", "sort", id="table.sort"),
        Binding("E", "screen.evaluate", "evaluate", id="models.evaluate"),
        Binding("x", "screen.ship", "ship", id="models.ship"),
        Binding("p", "screen.pipeline", "pipeline's", id="models.pipeline"),
        Binding("f", "screen.folder", "folder", id="models.folder"),
        Binding("m", "screen.spectrum", "spectrum", id="models.spectrum", show=False),
        Binding("i", "screen.fields", "all fields", id="models.fields", show=False),
    ],
    filters="filter",
)
DETAILS = About(
    "Model",
    """\
**ΔW** is what an adapter adds to each weight matrix: the columns are its singular values, the
largest first. One high column means a change in one direction; the percentage is that direction's
share.

`m` measures it, which takes a moment, once per adapter; `i` shows all fields of its files.""",
    [
        Binding("m", "screen.spectrum", "spectrum"),
        Binding("i", "screen.fields", "all fields"),
    ],
)
