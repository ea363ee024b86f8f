"""What the panes of the screen say of themselves."""

from tui.panes.pane import About

PANES = {
    "question": About(
        "Question",
        """\
Each key press is answered at once. Only the fields that matter to the chosen method are shown; an
empty field means what it shows in grey. `‹ a choice ›` steps with ← and →, a number with + and −,
any field with Page Up and Page Down; Ctrl+B brings a field's default back. In *model* type a part
of a name, then Enter; a path is read, a hub id is fetched by Enter: of the weights, headers alone.

Ctrl+T pins the configuration, to compare it with what you ask next: in parentheses how much more or
less it takes. Again unpins it. Ctrl+N begins anew.
""",
    ),
    "verdict": About(
        "Does it fit?",
        """\
The predicted peak of a training step against the memory of the GPU, CUDA's context included. The
bar is green below half of it, yellow below 85%, red above: other programs and fragmentation take
memory too.
""",
    ),
    "answers": About(
        "Answers",
        """\
* **at most**: the largest batch, sequence length and rank that fit, and the best precision of the
  base, each with everything else as it is.
* **to make it fit**: the change that costs the least quality and time. Changes after a `;` are
  needed together.
* **rank, batch, sequence**: the peak with other values; `▶` is the present one, `✗` is more than
  the GPU has.
* **GPUs**: those that hold the peak, and those that do not.
""",
    ),
    "memory": About(
        "Memory by method",
        """\
The same step with other methods; `▶` is yours, `①` and `②` are pinned. `│` is where the GPU ends,
unless that is far beyond all bars, `»` a bar that goes on. The parts of a bar, always in this
order: `█` weights, `◆` adapter, `▓` gradients, `▒` optimizer, `░` activations, `≡` logits, `·`
overhead. Weights, adapter and optimizer stay for the whole step; gradients, activations and logits
come and go, and are counted at the peak.
""",
    ),
    "details": About(
        "Parameters and formulas",
        """\
The number of trained parameters by the rule of thumb 2·r·d, where it applies. Below, the formula of
each number with its values: for each kind of linear layer that gets an adapter A and B, how many
there are, and their parameters.
""",
    ),
}
