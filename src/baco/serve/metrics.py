"""The server's metrics, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baco.kv_cache.prefix_cache import PrefixCache
from baco.outputs import Chunk, Completion
from baco.serve.connections import Connections
from baco.serve.engine_thread import EngineThread
from baco.source import MIXED, MODELS

_SHARES = tuple(tenth / 10 for tenth in range(11))
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_SPEEDS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Counters and histograms of a server; the engine thread's load and the kept prefixes are read
    at each scrape.
    """

    def __init__(
        self,
        engine_thread: EngineThread,
        connections: Connections,
        prefix_cache: PrefixCache | None,
    ) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineThreadCollector(engine_thread))
        if prefix_cache is not None:
            registry.register(_PrefixCacheCollector(prefix_cache))
        registry.register(_ConnectionsCollector(connections))
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "baco_requests", "Requests that have ended.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "baco_prompt_tokens",
            "Tokens of prompts, as the aligned model reads them.",
            registry=registry,
        )
        self._tokens = Counter(
            "baco_tokens",
            "Tokens of answers and of their thinking.",
            ["source"],
            registry=registry,
        )
        self._share = Histogram(
            "baco_answer_base_share",
            "Share of an answer's tokens whose source is base.",
            buckets=_SHARES,
            registry=registry,
        )
        self.first_token = Histogram(
            "baco_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "baco_request_seconds",
            "From a request's arrival to its end.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._speed = Histogram(
            "baco_answer_tokens_per_second",
            "Speed of an answer, from its prompt's start to its end.",
            buckets=_SPEEDS,
            registry=registry,
        )
        for source in (*MODELS, MIXED):
            self._tokens.labels(source)

    def count(self, chunk: Chunk) -> None:
        """Count a chunk of an answer."""
        for token in chunk.tokens:
            self._tokens.labels(token.source or MIXED).inc()
        self._tokens.labels("aligned").inc(chunk.thinking_tokens)
        if chunk.completion is not None:
            self._ended(chunk.completion)

    def _ended(self, completion: Completion) -> None:
        if completion.base_share is not None:
            self._share.observe(completion.base_share)
        self._speed.observe(completion.tokens_per_second)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineThreadCollector(Collector):
    def __init__(self, engine_thread: EngineThread) -> None:
        self._engine_thread = engine_thread

    def collect(self) -> Iterator[Metric]:
        load = self._engine_thread.load
        for name, help_, value in (
            ("baco_prompts_open", "Prompts that have not ended.", self._engine_thread.open),
            ("baco_answers_waiting", "Answers that have no row in the batch.", load.waiting),
            ("baco_answers_running", "Answers in the batch.", load.running),
            (
                "baco_acceptance",
                "Share of draft tokens that were accepted, since the start.",
                load.accepted / load.drafted if load.drafted else 0.0,
            ),
        ):
            yield GaugeMetricFamily(name, help_, value)
        yield CounterMetricFamily("baco_drafted_tokens", "Tokens drafted.", load.drafted)
        yield CounterMetricFamily(
            "baco_accepted_tokens", "Draft tokens that were accepted.", load.accepted
        )


class _PrefixCacheCollector(Collector):
    def __init__(self, prefix_cache: PrefixCache) -> None:
        self._prefix_cache = prefix_cache

    def collect(self) -> Iterator[Metric]:
        for name, help_, counts in (
            (
                "baco_prefix_cache_queries",
                "Tokens of prompts that were looked up among the kept prefixes.",
                self._prefix_cache.queries,
            ),
            (
                "baco_prefix_cache_hits",
                "Tokens of prompts that were kept and not read again.",
                self._prefix_cache.hits,
            ),
        ):
            counter = CounterMetricFamily(name, help_, labels=["model"])
            for model in MODELS:
                counter.add_metric([model], counts[model])
            yield counter
        yield GaugeMetricFamily(
            "baco_prefix_cache_bytes", "Bytes of kept prefixes.", self._prefix_cache.bytes
        )


class _ConnectionsCollector(Collector):
    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        open_connections = GaugeMetricFamily(
            "baco_connections", "Open connections by phase.", labels=["phase"]
        )
        for phase, count in self._connections.counts().items():
            open_connections.add_metric([phase], count)
        yield open_connections
        closed = CounterMetricFamily(
            "baco_connections_closed",
            "Connections that the server closed, by reason.",
            labels=["reason"],
        )
        for reason, count in sorted(self._connections.closed.items()):
            closed.add_metric([reason], count)
        yield closed
