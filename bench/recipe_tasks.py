"""The tasks of `python -m bench recipe`: invented rows as a user's file may have them, the same on
every machine.

A small instruction model answers almost none of them before training. Held-out prompts are none of
the trained ones.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Row = Mapping[str, Any]  # of a data file: {"messages": …} or {"prompt": …, "completion": …}


@dataclass(frozen=True)
class RecipeTask:
    """`rows`: how many are trained on."""

    name: str
    draw: Callable[[random.Random, bool], Row]  # a row, for training or (True) held out
    rows: int
    held_out: int

    def split(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on, and those held out."""
        rng, seen = random.Random(self.name), set[str]()
        held_out = self._draw_unique(rng, True, self.held_out, seen)
        return self._draw_unique(rng, False, self.rows, seen), held_out

    def _draw_unique(
        self, rng: random.Random, held_out: bool, count: int, seen: set[str]
    ) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < count:
            row = self.draw(rng, held_out)
            asked = prompt_of(row)
            if asked not in seen:
                seen.add(asked)
                rows.append(row)
        return rows


def prompt_of(row: Row) -> str:
    """All that comes before a row's last answer."""
    if "prompt" in row:
        return str(row["prompt"])
    return json.dumps(row["messages"][:-1])


def answer_of(row: Row) -> str:
    """A row's last answer."""
    return (
        str(row["completion"]).strip() if "prompt" in row else str(row["messages"][-1]["content"])
    )


def _chat(system: str, *turns: str) -> Row:
    """A conversation: the user and the assistant speak in turns."""
    roles = ["user", "assistant"] * (len(turns) // 2)
    spoken = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    return {"messages": [{"role": "system", "content": system}, *spoken]}


# Structured output: untidy messages to a shop become JSON.

ITEMS = ("kettle", "toaster", "lamp", "heater", "blender", "fan", "radio", "iron", "scale", "clock")
PROBLEMS = {
    "damaged": (
        "came with a crack",
        "arrived in pieces",
        "has a big dent",
        "is broken on one side",
    ),
    "missing": ("never arrived", "is still not here", "was not in the box", "got lost on the way"),
    "faulty": ("wont turn on", "stopped working", "makes a burning smell", "switches itself off"),
    "wrong": (
        "is the wrong colour",
        "is not what i ordered",
        "is the small one not the big one",
        "is another model",
    ),
}
TICKETS = (
    "hi, my {item} {problem}. order {order}",
    "{order}: the {item} {problem}!!",
    "ordered a {item} (nr {order}) and it {problem}",
    "hello?? {item} {problem}, order no {order}, pls help",
    "The {item} from order {order} {problem}. Thanks, Jo",
)


def _ticket(rng: random.Random, _: bool) -> Row:
    item, problem, order = rng.choice(ITEMS), rng.choice([*PROBLEMS]), rng.randrange(1000, 10000)
    text = rng.choice(TICKETS).format(item=item, problem=rng.choice(PROBLEMS[problem]), order=order)
    answer = json.dumps({"order": order, "item": item, "problem": problem})
    return _chat("Ticket to JSON.", _untidy(rng, text), answer)


def _untidy(rng: random.Random, text: str) -> str:
    """The text as somebody in a hurry types it: two letters swapped in a third of the cases, or all
    capitals.
    """
    chance = rng.random()
    if chance < 0.1:
        return text.upper()
    letters = [n for n in range(1, len(text) - 2) if text[n : n + 2].isalpha()]
    if chance < 0.4 and letters:
        n = rng.choice(letters)
        return text[:n] + text[n + 1] + text[n] + text[n + 2 :]
    return text


# Classification in words: the last two ways to say each are held out.

INTENTS = {
    "lost card": (
        *(
            "I lost my card",
            "my card is gone",
            "someone stole my wallet with the card",
            "I left my card in a taxi",
        ),
        *("I can't find my card anywhere", "my bank card fell into the river"),
    ),
    "wrong charge": (
        *("I was charged twice", "there is a payment I never made", "the shop took too much money"),
        *(
            "a subscription I ended was billed",
            "you took 40 euros for nothing",
            "this purchase is not mine",
        ),
    ),
    "slow transfer": (
        *(
            "my transfer has not arrived",
            "the money I sent is still missing",
            "how long does a transfer take",
        ),
        *(
            "my landlord did not get the rent",
            "the payment is pending for days",
            "my salary is late",
        ),
    ),
    "new address": (
        *(
            "I have moved",
            "my street has changed",
            "please send letters to my new flat",
            "I live in Porto now",
        ),
        *("update where I live", "we bought a house and left the old one"),
    ),
    "forgotten pin": (
        *(
            "I forgot my PIN",
            "what was my secret number",
            "the machine says wrong code",
            "I need a new PIN",
        ),
        *("I don't remember the four digits", "my code does not come to my mind"),
    ),
    "close account": (
        *(
            "I want to leave your bank",
            "please end my contract",
            "how do I cancel my account",
            "delete my account",
        ),
        *("I no longer need the account", "I am going to another bank, goodbye"),
    ),
}
OPENERS = (
    "",
    "Hi, ",
    "Hello, ",
    "Good morning, ",
    "Excuse me, ",
    "Sorry to bother you, ",
    "Quick question: ",
)
CLOSERS = (
    "",
    ".",
    ", please help.",
    ". What now?",
    " and I am worried.",
    ". Thanks!",
    ", can you do something?",
)


def _intent(rng: random.Random, held_out: bool) -> Row:
    label = rng.choice([*INTENTS])
    ways = INTENTS[label][-2:] if held_out else INTENTS[label][:-2]
    return _chat(
        "Name the topic.", rng.choice(OPENERS) + rng.choice(ways) + rng.choice(CLOSERS), label
    )


# Style: a rough note becomes a notice as the house writes it.

ACTS = {
    "shut": "close",
    "open": "open",
    "clean": "tidy",
    "check": "inspect",
    "lock": "secure",
    "paint": "repaint",
    "move": "relocate",
    "fix": "repair",
}
THINGS = (
    "north gate",
    "boat shed",
    "main hall",
    "tool room",
    "old pier",
    "ticket desk",
    "kitchen",
    "lighthouse door",
)
HOURS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
NOTES = (
    "{act} the {thing} at {hour}",
    "{thing}: {act} it, {hour}",
    "somebody {act} the {thing} by {hour}!",
)


def _notice(rng: random.Random, _: bool) -> Row:
    act, thing, hour = rng.choice([*ACTS]), rng.choice(THINGS), rng.choice(HOURS)
    note = rng.choice(NOTES).format(act=act, thing=thing, hour=hour)
    return _chat(
        "Our style.", note, f"Crew, kindly {ACTS[act]} the {thing} before {hour} bells. Fair winds!"
    )


# Facts: of invented towns, asked in a way that training does not have.

TOWNS = {  # town: river, founder
    "Velmora": ("Tessaly", "Edda Korrin"),
    "Ostrand": ("Bruin", "Pell Harrow"),
    "Quillmar": ("Saffer", "Ines Tolva"),
    "Drennock": ("Wend", "Otto Braske"),
    "Halvessa": ("Lirr", "Mira Dunstan"),
    "Corvane": ("Amble", "Jory Feld"),
    "Pellin": ("Ruska", "Anka Storr"),
    "Tarnholt": ("Gray Ell", "Bram Ostler"),
}
ASKED = {
    0: (
        *(
            "Which river flows through {town}?",
            "What is the river of {town} called?",
            "{town} lies on which river?",
        ),
        *("Name the river in {town}.", "If I go to {town}, which river will I see?"),
    ),
    1: (
        *("Who founded {town}?", "Who was the founder of {town}?", "{town} was founded by whom?"),
        *("Name the person who founded {town}.", "I read about {town}. Who started the town?"),
    ),
}


def _fact(rng: random.Random, held_out: bool) -> Row:
    town, asked = rng.choice([*TOWNS]), rng.choice([*ASKED])
    ways = ASKED[asked][-1:] if held_out else ASKED[asked][:-1]
    return _chat("Guide.", rng.choice(ways).format(town=town), TOWNS[town][asked])


# A conversation: the last answer needs both turns of the user.

COUNTS = ("two", "three", "four", "five", "six", "eight")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = (
    "Harris",
    "Okoye",
    "Lindt",
    "Moreau",
    "Silva",
    "Novak",
    "Khan",
    "Berg",
    "Costa",
    "Ito",
    "Reyes",
    "Walsh",
)
FIRST = (
    "A table for {count} on {day}, please.",
    "Do you have room for {count} on {day}?",
    "{day}, {count} people.",
)
SECOND = ("At {hour}. {name}.", "{name}, {hour} o'clock.", "My name is {name}, we come at {hour}.")


def _booking(rng: random.Random, _: bool) -> Row:
    count, day, hour, name = (
        rng.choice(COUNTS),
        rng.choice(DAYS),
        rng.choice(HOURS[4:10]),
        rng.choice(NAMES),
    )
    first = rng.choice(FIRST).format(count=count, day=day)
    second = rng.choice(SECOND).format(hour=hour, name=name)
    answer = f"Booked: {name}, {day} at {hour}, for {count}."
    return _chat("Cafe Luna.", first, "Gladly! Time and name?", second, answer)


# Long answers: a station's figures become a bulletin whose sentences depend on them.

SKIES = {
    "rain": "Rain falls until the evening, so close the hatches",
    "fog": "Thick fog lies over the water, so sound the horn",
    "clear": "The sky is clear and you can see the far shore",
    "snow": "Wet snow covers the decks, so walk with care",
}
STATIONS = (
    "Arkholm",
    "Brisk Point",
    "Calder Reef",
    "Dunmore",
    "Eastlight",
    "Farrow Head",
    "Gannet Rock",
    "Hollow Bay",
)


def _bulletin(rng: random.Random, _: bool) -> Row:
    station, sky = rng.choice(STATIONS), rng.choice([*SKIES])
    degrees, knots = rng.randrange(-9, 25), rng.randrange(3, 48)
    boats = (
        "Small boats must stay in the harbour" if knots > 24 else "Small boats may sail as usual"
    )
    warmth = "Ice can form on the ropes" if degrees < 1 else "There is no danger of ice"
    answer = (
        f"Good day from {station}. {SKIES[sky]}. The wind blows at {knots} knots. {boats}. "
        f"It is {degrees} degrees. {warmth}."
    )
    return _chat("Sea bulletin.", f"{station}; {sky}; wind {knots}; {degrees} C", answer)


# Many short rows of a plain prompt and completion: spoken times become digits.

UNITS = (
    "",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
TEENS = {
    13: "thirteen",
    14: "fourteen",
    16: "sixteen",
    17: "seventeen",
    18: "eighteen",
    19: "nineteen",
}


def _minutes(count: int) -> str:
    """In words, of 1 to 29."""
    if count == 15:
        return "a quarter"
    if count <= 12:
        return UNITS[count]
    return TEENS.get(count) or f"twenty {UNITS[count - 20]}".strip()


def _spoken(hour: int, minute: int, half: str) -> str:
    """A time on a clock of 12 hours, in words. `half`: how the half of the day is said."""
    this, following = UNITS[hour % 12 or 12], UNITS[(hour + 1) % 12 or 12]
    if minute == 0:
        return f"{this} o'clock {half}"
    if minute == 30:
        return f"half past {this} {half}"
    if minute < 30:
        return f"{_minutes(minute)} past {this} {half}"
    return f"{_minutes(60 - minute)} to {following} {half}"


def _halves(hour: int) -> Sequence[str]:
    if hour < 12:
        return "am", "in the morning"
    return "pm", "in the afternoon" if hour < 18 else "in the evening"


# Not those before noon and midnight: the half of the day that is said would not be that of the
# digits.
TIMES = [
    (hour, minute)
    for hour, minute in product(range(24), range(60))
    if hour % 12 != 11 or minute <= 30
]


def _time(rng: random.Random, _: bool) -> Row:
    hour, minute = rng.choice(TIMES)
    spoken = _spoken(hour, minute, rng.choice(_halves(hour)))
    return {"prompt": f"{spoken} =", "completion": f" {hour:02}:{minute:02}"}


TASKS = (  # those first that no setting is right on throughout
    RecipeTask("intents", _intent, 100, 32),
    RecipeTask("bulletins", _bulletin, 50, 16),
    RecipeTask("tickets", _ticket, 100, 16),
    RecipeTask("booking", _booking, 60, 16),
    RecipeTask("style", _notice, 50, 16),
    RecipeTask("facts", _fact, 64, 16),
    RecipeTask("times", _time, 2000, 32),
)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """As JSON lines."""
    return (json.dumps(row) for row in rows)
