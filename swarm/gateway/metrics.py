"""Figures for Prometheus, named after vLLM's where they mean the same.

A registry of their own: two gateways in one process do not share figures.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from swarm.messages import HopTime

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ANSWER = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600)


class Meter:
    """What a gateway counts."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.running = Gauge("num_requests_running", "Answers being generated.", registry=own)
        self.waiting = Gauge("num_requests_waiting", "Requests that wait for room.", registry=own)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the request read to the first token.",
            buckets=_ANSWER,
            registry=own,
        )
        self.next_token = Histogram(
            "time_per_output_token_seconds",
            "From one token to the next.",
            buckets=_TOKEN,
            registry=own,
        )
        self.whole = Histogram(
            "e2e_request_latency_seconds", "Of a whole answer.", buckets=_ANSWER, registry=own
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts sent.", registry=own)
        self.reused = Counter(
            "prompt_tokens_cached", "Of these, what hops had already.", registry=own
        )
        self.tokens = Counter("generation_tokens", "Tokens generated.", registry=own)
        self.ended = Counter(
            "request_success", "Answers that ended, by why.", ["finished_reason"], registry=own
        )
        self.responses = Counter(
            "http_responses",
            "Responses begun, by path and status.",
            ["path", "status"],
            registry=own,
        )
        self.hop = Histogram(
            "swarm_hop_seconds",
            "What a hop computed and waited for one step, by its place on the route.",
            ["hop"],
            buckets=_TOKEN,
            registry=own,
        )
        self.failovers = Counter("swarm_failovers", "Repairs of routes.", registry=own)
        self.replayed = Counter("swarm_replayed_tokens", "Positions sent again.", registry=own)
        self.lost = Counter("swarm_lost_answers", "Answers that no repair saved.", registry=own)

    def step(self, times: Sequence[HopTime]) -> None:
        """Count what each hop told of one step."""
        for place, time in enumerate(times):
            self.hop.labels(str(place)).observe(time.computed + time.waited)

    def text(self) -> bytes:
        """All figures in Prometheus' text form."""
        return generate_latest(self._registry)
