"""What the panes of a conversation say of themselves."""

from tui.panes.pane import About

HISTORY = About(
    "Conversation",
    """\
The messages and the answers, newest last. With several models, each reads the messages and *its own*
answers. The table has the most likely next tokens of each, in percent, and how that differs from the
first.

- The cursor is the line at the left: ↑ ↓ move it, Enter edits the message it is on (the former one
  stays as a branch), or takes the answer it is on to the data, to be corrected; `y` copies
- `‹ 2/3 ›` is the second of three branches; ← → show the others, with all that followed
- `▸ thoughts` are folded; Ctrl+T shows them. Thoughts are not part of what the model reads in
  later turns
- `◌` waits, `◐` writes, `▪` was interrupted, `…` reached the limit, `✗` failed
- *tokens/s* counts from the first token on; reading the prompt is not part of it
- yellow text tells what no longer fitted into the model's window and was left out, or that an
  answer was given at another strength than the one that is set""",
)
MESSAGE = About(
    "Message",
    """\
Enter asks, Ctrl+J begins a new line, ↑ in the first line goes to the history.

The title: the models, the strength of adapters from 0 (the base) over 1 (as trained) to 2, the
tokens of the model's window that the last turn used, and the sampling. A model without a chat
template goes on with the text: the messages and answers are one text for it, and the system prompt
stands before them. The line below is the process that runs the models.""",
)
