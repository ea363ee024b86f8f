"""Whether two outputs say the same, where numbers come from training and times from the machine."""

import math
import re
from itertools import zip_longest

NUMBER = re.compile(r"[-+±]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
BARS = re.compile("[█▏▎▍▌▋▊▉]+")
TIME = r"\d[\d.,]* (?:ms|s|min|h)\b"
# What the machine alone decides: times and their ranges, memory (in bf16 half of that in fp32,
# where a CPU has no instructions for bf16), and the tokens per second in llama.cpp's table.
MACHINE = re.compile(
    rf"{TIME}(?: to {TIME})?|\d+(?= steps were timed)|[\d.]+ [KMG]iB|\d+(?=  (?:the same$|differs ))"
)


def same(one: str, other: str) -> bool:
    """Words alike, numbers near: what trained on another processor differs in its last digits, and
    where a rate is so high that seeds part, by as much as they do."""
    plain = (BARS.sub("", MACHINE.sub("·", text)) for text in (one, other))
    pieces = [[p for p in re.split(r"\s+(?!±)|(?<=[(=:])", text) if p] for text in plain]
    return all(_near(a or "", b or "") for a, b in zip_longest(*pieces))


def _near(one: str, other: str) -> bool:
    numbers = [NUMBER.findall(text) for text in (one, other)]
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    spread = max(
        (_value(number) for found in numbers for number in found if "±" in number), default=0.0
    )
    for a, b in zip(*numbers, strict=True):
        x, y = _value(a), _value(b)
        apart = max(spread, 8 if a.endswith("%") or "±" in a else 0.15)
        if not math.isclose(x, y, rel_tol=0.15, abs_tol=apart):
            return False
    return True


def _value(number: str) -> float:
    return float(number.replace(",", "").strip("±%+"))
