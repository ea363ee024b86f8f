"""The verdict of an evaluation on its models: the limits that they break, and what to do next.

Commands, exports and screens all show it by this module.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# The error of a command whose models break limits begins with this, and no other error does.
LIMITS = "evaluate.limits"
PASSED = "passed"
FORGETTING = frozenset({"answers_kept", "old_loss_rise", "divergence", "must_keep", "task_drop"})
# the other limits are maximums
MINIMUMS = frozenset({"answers", "answers_kept", "must_keep", "tasks"})
MOST = 3  # broken limits that a sentence names
RETAIN = (
    "To forget less, name texts that must stay as they are in retention_data (LoRA), raise "
    "retention_weight, or lower learning_rate; then train again."
)
AGAIN = "Train again with other settings, or change the limits."


class Broken(NamedTuple):
    """A limit that a variant does not keep; `value` is None if it was not measured."""

    variant: str
    limit: str
    wanted: float
    value: float | None

    def __str__(self) -> str:
        wanted, measured = self.numbers
        return f"{self.limit} {measured}, wanted {wanted}"

    @property
    def numbers(self) -> tuple[str, str]:
        """What is wanted and what was measured, in words."""
        least = "least" if self.limit.partition(".")[0] in MINIMUMS else "most"
        measured = "not measured" if self.value is None else f"{self.value:.6g}"
        return f"at {least} {self.wanted:g}", measured


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
        """Each broken limit with what was measured; its model's name first if there are several."""
        if len(self.models) > 1:
            return [f"{limit.variant}: {limit}" for limit in self.broken]
        return [str(limit) for limit in self.broken]

    @property
    def next_step(self) -> str:
        """What to do about the broken limits: retention if one of them measures forgetting."""
        names = {broken.limit.partition(".")[0] for broken in self.broken}
        return RETAIN if names & FORGETTING else AGAIN

    @property
    def error(self) -> str:
        """Why a command ends with exit code 1, and what to do next."""
        names = ", ".join(dict.fromkeys(broken.variant for broken in self.broken))
        are = "is" if len(self.broken) == 1 else "are"
        return f"{LIMITS}: {self.counted} {are} broken, by {names}. {self.next_step}"

    def warning(self, name: str) -> str:
        """What an export says of a model that breaks limits; `name` is the model's."""
        reasons = self.reasons[:MOST]
        if len(self.broken) > MOST:
            reasons.append(f"{len(self.broken) - MOST} more")
        return f"{name} breaks {LIMITS}: {'; '.join(reasons)}. {self.next_step}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and a row of texts for each broken limit, for report and terminal."""
        rows = [[broken.variant, broken.limit, *broken.numbers] for broken in self.broken]
        return ["model", "limit", "wanted", "measured"], rows


def read_verdict(document: Mapping[str, Any], model: str | None = None) -> Verdict | None:
    """The verdict in metrics.json or an evaluation's manifest; of one model, or of all.

    None if there were no limits, or none for this model. The document may come from elsewhere.
    """
    try:
        gate = document["gate"]
        models = tuple(map(str, gate["variants"]))
        broken = tuple(map(_read, gate["broken"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if model is None:
        return Verdict(models, broken)
    if model not in models:
        return None
    return Verdict((model,), tuple(limit for limit in broken if limit.variant == model))


def _read(entry: Mapping[str, Any]) -> Broken:
    value = entry["value"]
    return Broken(
        str(entry["variant"]),
        str(entry["limit"]),
        float(entry["wanted"]),
        None if value is None else float(value),
    )
