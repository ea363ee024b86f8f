"""The verdict of an evaluation on its models: the limits that they break, in words, and what to do
next.

Commands, exports and screens all show it by this module.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

LIMITS = "evaluate.limits"  # begins the error of a command whose models break them, and no other
PASSED = "passed"
FORGETTING = frozenset({"answers_kept", "old_loss_rise", "divergence", "must_keep", "task_drop"})
# the other limits are maximums
MINIMUMS = frozenset({"answers", "answers_kept", "must_keep", "tasks"})
MOST = 3  # broken limits that a sentence names
RETAIN = (
    "To forget less, name texts that must stay as they are in retention_data (LoRA), raise "
    "retention_weight, or lower "
    "learning_rate; then train again."
)
AGAIN = "Train again with other settings, or change the limits."


class Broken(NamedTuple):
    """A limit that a variant does not keep; `value` is None if it was not measured."""

    variant: str
    limit: str
    wanted: float
    value: float | None


class Verdict(NamedTuple):
    """The models that were checked, and the limits that they break; none if they keep all."""

    models: tuple[str, ...]
    broken: tuple[Broken, ...]

    @property
    def counted(self) -> str:
        """ "2 limits", as many as are broken."""
        return f"{len(self.broken)} limit{'s' * (len(self.broken) != 1)}"

    @property
    def badge(self) -> str:
        """ "passed" or "failed: 2 limits"."""
        return f"failed: {self.counted}" if self.broken else PASSED

    @property
    def reasons(self) -> list[str]:
        """Each broken limit with what was measured; with the model's name, where there are
        several.
        """
        several = len(self.models) > 1
        return [
            f"{each.variant}: {_describe(each)}" if several else _describe(each)
            for each in self.broken
        ]

    @property
    def next_step(self) -> str:
        """What to do about the broken limits: retention if one of them measures forgetting."""
        names = {each.limit.partition(".")[0] for each in self.broken}
        return RETAIN if names & FORGETTING else AGAIN

    @property
    def error(self) -> str:
        """Why a command ends with 1, and what to do next."""
        names = ", ".join(dict.fromkeys(each.variant for each in self.broken))
        are = "is" if len(self.broken) == 1 else "are"
        return f"{LIMITS}: {self.counted} {are} broken, by {names}. {self.next_step}"

    def warning(self, name: str) -> str:
        """What is said of a model that breaks limits where it is shipped."""
        more = len(self.broken) - MOST
        reasons = "; ".join(self.reasons[:MOST]) + f"; {more} more" * (more > 0)
        return f"{name} breaks {LIMITS}: {reasons}. {self.next_step}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and a row of texts for each broken limit, for report and terminal."""
        rows = [[each.variant, each.limit, *_numbers(each)] for each in self.broken]
        return ["model", "limit", "wanted", "measured"], rows


def read_verdict(document: Mapping[str, Any], model: str | None = None) -> Verdict | None:
    """The verdict in metrics.json or an evaluation's manifest; of one model, or of all.

    None if there were no limits, or none for this model. The document may come from elsewhere.
    """
    try:
        gate = document["gate"]
        models = tuple(str(name) for name in gate["variants"])
        broken = tuple(_read(entry) for entry in gate["broken"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if model is None:
        return Verdict(models, broken)
    if model not in models:
        return None
    return Verdict((model,), tuple(each for each in broken if each.variant == model))


def _read(entry: Mapping[str, Any]) -> Broken:
    value = entry["value"]
    return Broken(
        str(entry["variant"]),
        str(entry["limit"]),
        float(entry["wanted"]),
        None if value is None else float(value),
    )


def _describe(broken: Broken) -> str:
    wanted, measured = _numbers(broken)
    return f"{broken.limit} {measured}, wanted {wanted}"


def _numbers(broken: Broken) -> tuple[str, str]:
    least = "least" if broken.limit.partition(".")[0] in MINIMUMS else "most"
    measured = "not measured" if broken.value is None else f"{broken.value:.6g}"
    return f"at {least} {broken.wanted:g}", measured
