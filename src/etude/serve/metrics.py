"""What is counted, for /metrics and the access log."""

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from etude.infer.request import Piece

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Name -> (key of InferenceEngine.stats, what it is).
GAUGES = {
    "etude_queue": ("waiting", "samples in the queue"),
    "etude_running": ("running", "samples that are computed"),
    "etude_pages": ("pages", "pages of the cache"),
    "etude_pages_free": ("pages_free", "pages that hold nothing"),
    "etude_pages_cached": ("pages_cached", "pages of finished samples, kept for equal beginnings"),
    "etude_pages_used": ("pages_used", "pages of running samples"),
    "etude_last_step_seconds": ("last_step", "since the engine's last step"),
}
COUNTERS = {
    "etude_prefix_hit_tokens": ("prefix_hit_tokens", "tokens of prompts that were found in the cache"),
    "etude_prefix_query_tokens": ("prefix_query_tokens", "tokens of prompts that were looked for in the cache"),
    "etude_preemptions": ("preemptions", "samples that gave their pages back and are computed again"),
    "etude_steps": ("steps", "steps of the engine"),
}


class Metrics:
    """The server's own registry; `stats` are the engine's, None before it is there."""

    def __init__(self, stats: Callable[[], dict[str, Any] | None]):
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("etude_requests", "answered requests", ["route", "status"], **named)
        self.seconds = Histogram("etude_request_seconds", "from a request's arrival to the answer's end", ["route"], buckets=FIRST, **named)  # fmt: skip
        self.prompt = Counter("etude_prompt_tokens", "tokens of prompts", **named)
        self.completion = Counter("etude_completion_tokens", "tokens that were generated", **named)
        self.first = Histogram("etude_time_to_first_token_seconds", "from a request's arrival to its first token", buckets=FIRST, **named)  # fmt: skip
        self.between = Histogram(
            "etude_inter_token_seconds", "between two tokens of a sample", buckets=BETWEEN, **named
        )
        self.registry.register(_Engine(stats))


class _Engine(Collector):
    """The engine's numbers, read when they are asked for."""

    def __init__(self, stats: Callable[[], dict[str, Any] | None]):
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self.stats()
        if found is None:
            return
        for name, (key, what) in GAUGES.items():
            yield GaugeMetricFamily(name, what, value=found[key])
        for name, (key, what) in COUNTERS.items():
            yield CounterMetricFamily(name, what, value=found[key])


@dataclasses.dataclass
class Record:
    """One request, for the log and the metrics."""

    id: str
    method: str
    path: str
    metrics: Metrics
    start: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 0  # 0: the client went before it had one
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None  # seconds
    error: str | None = None  # what an answer ended with after it had begun
    gone: bool = False
    last: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)  # when a sample grew

    def grew(self, pieces: list[Piece]) -> None:
        now = time.monotonic()
        for piece in pieces:
            if not piece.tokens:
                continue
            if self.first_token is None:
                self.first_token = now - self.start
                self.metrics.first.observe(self.first_token)
            sample = piece.request, piece.choice
            if (last := self.last.get(sample)) is not None:
                for _ in piece.tokens:
                    self.metrics.between.observe((now - last) / len(piece.tokens))
            self.last[sample] = now
            self.completion_tokens += len(piece.tokens)

    def bug(self, error: BaseException) -> None:
        self.error = f"{type(error).__name__}"
        print(f"{self.id}: {''.join(traceback.format_exception(error))}", file=sys.stderr, end="", flush=True)

    def close(self, route: str, log: bool) -> None:
        """Count it, and write its line: no text of a prompt, no key."""
        seconds = time.monotonic() - self.start
        status = str(self.status) if self.status and not self.gone else "gone"
        self.metrics.requests.labels(route, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        self.metrics.prompt.inc(self.prompt_tokens)
        self.metrics.completion.inc(self.completion_tokens)
        if log:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            first = "-" if self.first_token is None else f"{self.first_token:.3f}s"
            tokens = f"{self.prompt_tokens}+{self.completion_tokens}"
            line = f"{stamp} {self.id} {self.method} {self.path} {status} tokens={tokens} first={first} total={seconds:.3f}s"
            print(line + (f" error={self.error!r}" if self.error else ""), file=sys.stderr, flush=True)
