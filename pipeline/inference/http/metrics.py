"""What GET /metrics says, in Prometheus' text format."""

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.inference.batching import BatchedGenerator

CONTENT_TYPE = "text/plain; version=0.0.4"
# seconds, upper bounds
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, and its generator's sequences."""

    def __init__(self, generator: BatchedGenerator) -> None:
        # leaves out the times at which counters were made
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "lora", "registry": self._registry}
        self.requests = Counter(
            "requests", "HTTP requests by route and status.", ("route", "status"), **shared
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **shared)
        self.generated_tokens = Counter("generation_tokens", "Generated tokens.", **shared)
        running = Gauge("requests_running", "Sequences in the batch.", **shared)
        running.set_function(lambda: generator.running)
        waiting = Gauge("requests_waiting", "Sequences that wait for the batch.", **shared)
        waiting.set_function(lambda: generator.waiting)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=BUCKETS,
            **shared,
        )

    def render(self) -> bytes:
        return generate_latest(self._registry)
