"""Compares an answer with the expected one: exactly, but for white space, as JSON, by ROUGE-L."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

EXACT, WHITE_SPACE, JSON = "exact", "white space", "JSON"
SIMILAR, DIFFERENT = "similar", "different"
AS_EXPECTED = (EXACT, WHITE_SPACE, JSON)
# a text with more of either is long: an answer in other words can be as good
LONG_WORDS, LONG_CHARACTERS = 24, 160
MOST_FIELDS = 20  # fields that differ: listed of one answer, and counted over all answers
MOST_PATH = 80  # characters of a field's path, whose names a model may have written
CJK = "぀-ヿ㐀-䶿一-鿿가-힣"  # written without spaces: each character counts as a word
WORDS = re.compile(rf"[{CJK}]|[^\W{CJK}]+")


class Match(NamedTuple):
    """How an answer compares with the expected one."""

    how: str  # one of AS_EXPECTED, or "different"; for a long text that is no JSON "similar"
    # paths of JSON fields that differ, such as items[0].price; "" is the whole value
    differs: tuple[str, ...] = ()
    rouge_l: float | None = None  # of a long text, from 0 to 1

    @property
    def as_expected(self) -> bool:
        return self.how in AS_EXPECTED

    @property
    def score(self) -> float:
        """1 for the expected answer, else 0; of a long text its ROUGE-L."""
        return float(self.as_expected) if self.rouge_l is None else self.rouge_l

    @property
    def sign(self) -> str:
        """Whether it is the expected one, in a list; ~ where only similarity is measured."""
        if self.how == SIMILAR:
            return "~"
        return "✓" if self.as_expected else "✗"


def match(answer: str, expected: str) -> Match:
    """Compare an answer with the expected one."""
    answer, expected = answer.strip(), expected.strip()
    wanted, is_json = _read_json(expected)
    if not is_json and is_long(expected):
        return Match(SIMILAR, rouge_l=rouge_l(answer, expected))
    if answer == expected:
        return Match(EXACT)
    if is_json:
        given, could_read = _read_json(answer)
        differs = _different_fields(given, wanted) if could_read else ("",)
        return Match(DIFFERENT, differs) if differs else Match(JSON)
    return Match(WHITE_SPACE if answer.split() == expected.split() else DIFFERENT)


def is_long(text: str) -> bool:
    """Whether a text is so long that an answer in other words can be as good."""
    return len(WORDS.findall(text)) > LONG_WORDS or len(text) > LONG_CHARACTERS


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, whatever their case."""
    ours, theirs = (WORDS.findall(text.casefold()) for text in (answer, expected))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * _common_subsequence(ours, theirs) / (len(ours) + len(theirs))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence (Hyyrö 2004).

    A row of the usual table is the bits of one number: a thousand words take a millisecond.
    """
    places: dict[str, int] = {}
    for n, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << n
    row = every = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(one) - row.bit_count()


def _read_json(text: str) -> tuple[Any, bool]:
    """The value of a JSON object or list, and whether `text` is one."""
    if text[:1] not in ("{", "["):
        return None, False
    try:
        return json.loads(text, parse_constant=_refuse_constant), True
    except (ValueError, RecursionError):
        return None, False


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _different_fields(given: Any, wanted: Any) -> tuple[str, ...]:
    try:
        return tuple(islice(_walk(given, wanted, ""), MOST_FIELDS))
    except RecursionError:
        return ("",)


def _walk(given: Any, wanted: Any, path: str) -> Iterator[str]:
    """The paths at which two JSON values differ; a number is the same however it is written."""
    if isinstance(given, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*wanted, *given)):
            inner = (f"{path}.{key}" if path else key)[:MOST_PATH]
            if key in given and key in wanted:
                yield from _walk(given[key], wanted[key], inner)
            else:
                yield inner
    elif isinstance(given, list) and isinstance(wanted, list) and len(given) == len(wanted):
        for n, (left, right) in enumerate(zip(given, wanted, strict=True)):
            yield from _walk(left, right, f"{path}[{n}]"[:MOST_PATH])
    elif isinstance(given, bool) != isinstance(wanted, bool) or given != wanted:
        yield path


def count(matches: Sequence[Match]) -> dict[str, Any]:
    """For metrics.json: how many of `n` answers are as expected, and how.

    `differs`: the JSON fields that differ, with the number of answers in which they do. `similar`:
    the number of long texts and their mean ROUGE-L.
    """
    long = [match.rouge_l for match in matches if match.rouge_l is not None]
    short = [match for match in matches if match.rouge_l is None]
    counts: dict[str, Any] = {"n": len(short)}
    if short:
        hows = Counter(match.how for match in short)
        counts["as_expected"] = sum(hows[how] for how in AS_EXPECTED)
        counts |= {_key(how): hows[how] for how in AS_EXPECTED}
    if fields := Counter(chain.from_iterable(match.differs for match in short)):
        counts["differs"] = dict(fields.most_common(MOST_FIELDS))
    if long:
        counts["similar"] = {"n": len(long), "rouge_l": math.fsum(long) / len(long)}
    return counts


def _key(how: str) -> str:
    return how.replace(" ", "_").lower()


def describe(counts: Mapping[str, Any]) -> str:
    """Counts as a phrase: "5 of 20 as expected (4 exactly, 1 as JSON)"; empty if there are none."""
    parts = []
    if n := counts.get("n"):
        part = f"{counts['as_expected']} of {n} as expected"
        ways = ((EXACT, "exactly"), (WHITE_SPACE, "but for white space"), (JSON, "as JSON"))
        numbers = [(counts[_key(how)], words) for how, words in ways]
        if counts["exact"] < counts["as_expected"]:
            part += f" ({', '.join(f'{number} {words}' for number, words in numbers if number)})"
        parts.append(part)
    if similar := counts.get("similar"):
        plural = "s" if similar["n"] > 1 else ""
        parts.append(
            f"{similar['n']} long answer{plural}: similarity {similar['rouge_l']:.2f} (ROUGE-L)"
        )
    return "; ".join(parts)


def share(counts: Mapping[str, Any]) -> float | None:
    """The share of answers that are as expected; None if none could be counted."""
    return counts["as_expected"] / counts["n"] if counts.get("n") else None
