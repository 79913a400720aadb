"""Metrics of the server in Prometheus' text format, with the prefix `lit_gpt:`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of its own: two apps in a process do not add up."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.prefix_hits = self._counter("prefix_cache_hit_tokens", "Prompt tokens found in the cache")
        self.finished = self._counter("requests_finished", "Sequences that ended, by reason", "reason")
        self.rejected = self._counter("requests_rejected", "Requests refused, by reason", "reason")
        self.disconnects = self._counter("client_disconnects", "Clients that left before their answer was whole")
        self.queue_time = self._histogram("request_queue_time_seconds", "From arrival to the first engine step")
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.per_token = self._histogram("time_per_output_token_seconds", "Between two tokens", _PER_TOKEN)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the end of a request")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose `value` is called at each scrape."""
        Gauge(f"lit_gpt:{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """The whole page of `/metrics`."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lit_gpt:{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"lit_gpt:{name}", text, registry=self.registry, buckets=buckets)
