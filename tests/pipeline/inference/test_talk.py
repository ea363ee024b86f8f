"""The tree of a conversation: nothing is lost, and each model reads its own answers."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.talk import Answer, State, Talk, Turn

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "edit", "again", "turn", "reply"]),
        st.integers(0, 5),
        st.sampled_from([-1, 1]),
    ),
    max_size=40,
)


def answer(text: str, model: str = "m", chat: bool = True) -> Answer:
    return Answer(model, model, chat=chat, state=State.END, text=text)


def texts(turns: list[Turn]) -> list[str]:
    return [turn.text for turn in turns]


@given(STEPS)
def test_no_operation_loses_a_message_and_each_can_be_shown_again(
    steps: list[tuple[str, int, int]],
) -> None:
    talk, turns, answers = Talk(), list[Turn](), list[Answer]()
    for number, (kind, index, by) in enumerate(steps):
        shown = talk.turns
        turn = shown[index % len(shown)] if shown else None
        if kind in ("ask", "edit", "again"):
            answers.append(answer(f"a{number}"))
        if kind == "ask" or (kind in ("edit", "again") and turn is None):
            turns.append(talk.ask(f"q{number}", [answers[-1]]))
            assert talk.turns == [*shown, turns[-1]]
        elif turn is None:
            continue
        elif kind == "edit":
            before = shown[: shown.index(turn)]
            turns.append(talk.edit(turn, f"q{number}", [answers[-1]]))
            assert talk.turns == [*before, turns[-1]]
        elif kind == "again":
            talk.ask_again(turn, [answers[-1]])
            assert talk.turns == [*shown[: shown.index(turn)], turn]
            assert turn.reply.answers == [answers[-1]]
        else:
            branches = turn.siblings if kind == "turn" else turn.replies
            there = 0 <= branches.index + by < len(branches.items)
            assert branches.step(by) == there
    assert sorted(texts(list(talk.every_turn()))) == sorted(texts(turns))
    kept = [
        each for turn in talk.every_turn() for reply in turn.replies.items for each in reply.answers
    ]
    assert sorted(each.text for each in kept) == sorted(each.text for each in answers)
    for turn in turns:
        show(talk, turn)
        assert turn in talk.turns


def show(talk: Talk, wanted: Turn) -> None:
    """Step to the branch of a turn, as the arrow keys do."""

    def leads(turn: Turn) -> bool:
        return turn is wanted or any(
            leads(later) for reply in turn.replies.items for later in reply.turns.items
        )

    for _ in range(100):
        for turn in talk.turns:
            if turn is wanted:
                return
            siblings = turn.siblings
            if not leads(turn):
                target = next(n for n, other in enumerate(siblings.items) if leads(other))
                assert siblings.step(1 if target > siblings.index else -1)
                break
            replies = turn.replies
            target = next(n for n, r in enumerate(replies.items) if any(map(leads, r.turns.items)))
            if target != replies.index:
                assert replies.step(1 if target > replies.index else -1)
                break


def test_the_former_branch_is_as_it_was_when_one_steps_back() -> None:
    talk = Talk()
    first = talk.ask("one", [answer("1")])
    talk.ask("two", [answer("2")])
    edited = talk.edit(first, "uno", [answer("I")])
    assert (texts(talk.turns), str(edited.siblings)) == (["uno"], "‹ 2/2 ›")
    assert not edited.siblings.step(1)
    assert edited.siblings.step(-1)
    assert texts(talk.turns) == ["one", "two"]
    talk.ask_again(first, [answer("one again")])
    assert (texts(talk.turns), str(first.replies)) == (["one"], "‹ 2/2 ›")
    assert first.replies.step(-1)
    assert texts(talk.turns) == ["one", "two"]


def test_each_model_reads_the_messages_and_its_own_answers() -> None:
    talk = Talk()
    talk.system = "short"
    talk.ask("one", [answer("1", "a"), answer("<think>hm</think>\n\neins", "b")])
    talk.ask("alone", [answer("only a", "a")])
    talk.ask("unanswered", [answer("", "a"), answer("", "b")])
    last = talk.ask("last", [answer("", "a"), answer("", "b")])

    def contents(model: str) -> list[str]:
        return [message["content"] for message in talk.messages(last, model)]

    assert contents("a") == ["short", "one", "1", "alone", "only a", "last"]
    assert contents("b") == ["short", "one", "eins", "alone", "only a", "last"], (
        "thoughts are not part of a history"
    )
    roles = [message["role"] for message in talk.messages(last, "a")]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


def test_a_text_that_ended_at_once_goes_on() -> None:
    talk = Talk()
    talk.ask("eins", [answer("", chat=False)])
    talk.ask("wortlos", [Answer("m", "m", state=State.FAILED, error="m does not know: wortlos.")])
    last = talk.ask("zwei", [answer("", chat=False)])
    assert [message["content"] for message in talk.messages(last, "m")] == ["eins", "zwei"]


def test_a_completion_keeps_its_white_space() -> None:
    assert answer(" <think> tisch ", chat=False).content == " <think> tisch "
