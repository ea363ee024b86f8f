"""Counters for GET /metrics, in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

PREFIX = "lora"
# seconds, upper bounds
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Written on the event loop's thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.prompt_tokens = self.generated_tokens = 0
        self._first_tokens = [0] * (len(BUCKETS) + 1)  # by bucket; the last has no bound
        self._seconds = 0.0

    def observe_first_token(self, seconds: float) -> None:
        self._first_tokens[bisect_left(BUCKETS, seconds)] += 1
        self._seconds += seconds

    def render(self, running: int, waiting: int) -> str:
        """All values; `running` and `waiting` are the generator's sequences."""
        return "".join(f"{line}\n" for line in self._lines(running, waiting))

    def _lines(self, running: int, waiting: int) -> Iterator[str]:
        yield from _head("requests_total", "counter", "HTTP requests by route and status.")
        for (route, status), count in sorted(self.requests.items()):
            yield f'{PREFIX}_requests_total{{route="{route}",status="{status}"}} {count}'
        for name, kind, text, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("generation_tokens_total", "counter", "Generated tokens.", self.generated_tokens),
            ("requests_running", "gauge", "Sequences in the batch.", running),
            ("requests_waiting", "gauge", "Sequences that wait for the batch.", waiting),
        ):
            yield from _head(name, kind, text)
            yield f"{PREFIX}_{name} {value}"
        name = "time_to_first_token_seconds"
        yield from _head(name, "histogram", "From a request's arrival to its first token.")
        below = 0
        for bound, count in zip((*BUCKETS, "+Inf"), self._first_tokens, strict=True):
            below += count
            yield f'{PREFIX}_{name}_bucket{{le="{bound}"}} {below}'
        yield f"{PREFIX}_{name}_sum {self._seconds}"
        yield f"{PREFIX}_{name}_count {below}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} {kind}"
