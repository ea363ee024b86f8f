"""What the title of the message says: what is set, and how full the model's window is."""

from collections.abc import Iterator, Sequence

from textual.content import Content

from pipeline.inference.talk import Turn
from tui.screens.conversation.session import Session, sign_of
from tui.widgets.cells import interval_strip

MAX_NAMES = 4  # of models
STRONGEST, TRACK = 2.0, 11  # strength, and cells of its scale


def title_facts(session: Session, turns: Sequence[Turn]) -> Iterator[Content | str]:
    """The most important first: what does not fit is cut at the end."""
    names = [Content.styled(entry.label, sign_of(entry)[1]) for entry in session.entries]
    shown = Content(" beside ").join(names) or "no model"
    yield shown if len(names) <= MAX_NAMES else f"{len(names)} models"
    if session.models.inference.replays:
        yield "recorded answers"
    if session.scales:
        at = session.strength / STRONGEST
        yield f"×{session.strength:.2f} {interval_strip(0.0, at, at, TRACK)}"
    for answer in turns[-1].reply.answers[:1] if turns else ():
        if answer.window:
            yield f"context {answer.prompt_tokens + answer.tokens:,} of {answer.window:,}"
    yield str(session.sampling)
    if session.template and not session.chats:
        yield "chat template"
