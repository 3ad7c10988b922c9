"""The metrics of the process: what each event adds, and the page that a scrape gets.

Label sets are closed: every value is a configured name, a route template, a status, or `other`. The cap on the number
of series is a belt for the day when somebody breaks that rule: what comes beyond it is counted under `other`.

All observations happen on the event loop's thread, without a lock; see `series` for how a scrape stays off it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from proxy.money import NANO
from proxy.observability.context_events import ContextTrimmed
from proxy.observability.events import ConnectionRefused, Notice, RequestFinished, RequestRefused
from proxy.observability.series import CONTENT_TYPE, Counter, Gauge, Histogram, Reading, Snapshot
from proxy.observability.upstream_events import (
    CircuitClosed,
    CircuitHalfOpen,
    CircuitOpened,
    UpstreamFailedOver,
    UpstreamRetried,
)
from proxy.types import OTHER, Usage

__all__ = ["CONTENT_TYPE", "Metrics"]

_REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_OVERHEAD_SECONDS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_FIRST_TOKEN_SECONDS: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_RATIOS: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
_ERRORS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_PLACE: Final = ("route", "model", "provider")
_KINDS: Final = ("input", "output", "cache_read", "cache_write", "reasoning")

Gauged = tuple[Mapping[tuple[str, ...], float], Mapping[tuple[str, ...], float]]
"""Of budgets: the used part by (tenant, window), what is reserved by (tenant, unit)."""
_Key = tuple[str, str, str, str, int]


class _Bound:
    """Every series that one kind of request touches, looked up once."""

    __slots__ = (
        "cost",
        "cut",
        "duration",
        "first_token",
        "left",
        "overhead",
        "requests",
        "tokens",
        "unpriced",
        "upstream",
    )

    def __init__(self, families: _Families, key: _Key) -> None:
        route, model, tenant, provider, status = key
        place = (route, model, provider)
        self.requests = families.requests.child(route, model, tenant, provider, str(status) if status else OTHER)
        self.duration = families.duration.child(*place)
        self.overhead = families.overhead.child(*place)
        self.upstream = families.upstream.child(*place)
        self.first_token = families.first_token.child(*place)
        # At 0 from the first request on: a rate over a counter that is born as 1 misses that 1.
        self.cut = families.interruptions.child(*place)
        self.left = families.disconnects.child(*place)
        self.cost = families.cost.child(model, tenant, provider)
        self.unpriced = families.unpriced.child(model, tenant, provider)
        self.tokens = tuple([families.tokens.child(model, tenant, kind) for kind in _KINDS])

    def count_tokens(self, usage: Usage) -> None:
        given, made, cache_read, cache_write, reasoning = self.tokens
        given.value += usage.input
        made.value += usage.output
        if usage.cache_read:
            cache_read.value += usage.cache_read
        if usage.cache_write:
            cache_write.value += usage.cache_write
        if usage.reasoning:
            reasoning.value += usage.reasoning


class _Families:
    """Every family that events write to, by name."""

    def __init__(self) -> None:
        self._of_requests()
        self._of_money()
        self._of_upstreams()
        self._of_context()

    def _of_requests(self) -> None:
        p = "breakwater_"
        self.requests = Counter(
            f"{p}requests_total",
            "Requests answered, by the status sent; 499 is a client that left.",
            ("route", "model", "tenant", "provider", "status"),
        )
        self.tokens = Counter(
            f"{p}tokens_total",
            "Tokens. input includes cache_read and cache_write, output includes reasoning: never add the details.",
            ("model", "tenant", "kind"),
        )
        self.interruptions = Counter(
            f"{p}stream_interruptions_total", "Streams whose upstream died after the first event.", _PLACE
        )
        self.disconnects = Counter(f"{p}client_disconnects_total", "Clients that left before the end.", _PLACE)
        self.connections_refused = Counter(
            f"{p}connections_refused_total", "Refused by the HTTP guard before there was a request.", ("code",)
        )
        self.duration = Histogram(
            f"{p}request_duration_seconds", "From request to end of answer.", _PLACE, _REQUEST_SECONDS
        )
        self.overhead = Histogram(f"{p}overhead_seconds", "Time added by this process.", _PLACE, _OVERHEAD_SECONDS)
        self.upstream = Histogram(
            f"{p}upstream_duration_seconds", "Time spent at the provider.", _PLACE, _REQUEST_SECONDS
        )
        self.first_token = Histogram(
            f"{p}time_to_first_token_seconds", "Streams: until the first forwarded event.", _PLACE, _FIRST_TOKEN_SECONDS
        )

    def _of_money(self) -> None:
        p = "breakwater_"
        self.cost = Counter(
            f"{p}cost_usd_total",
            "Dollars that replies cost.",
            ("model", "tenant", "provider"),
            NANO,
        )
        self.unpriced = Counter(
            f"{p}cost_unknown_total", "Requests whose cost nobody knows.", ("model", "tenant", "provider")
        )
        self.refusals = Counter(
            f"{p}budget_refusals_total",
            "Full windows of budgets; in mode observe, of requests that were served all the same.",
            ("tenant", "window", "mode"),
        )
        self.store_errors = Counter(
            f"{p}store_errors_total", "Calls that the store of budgets did not answer as it should.", ("op",)
        )
        self.estimates = Histogram(
            f"{p}estimate_error_ratio", "Tokens that a request took, as a part of those reserved.", (), _RATIOS
        )

    def _of_upstreams(self) -> None:
        p = "breakwater_"
        self.transitions = Counter(
            f"{p}circuit_transitions_total",
            "Circuits of this process that changed their state, by the new one.",
            ("provider", "model", "to"),
        )
        self.retries = Counter(
            f"{p}retries_total",
            "Repeated attempts at the same target, by why the one before failed.",
            ("provider", "reason"),
        )
        self.failovers = Counter(f"{p}failovers_total", "Requests that went on at another target.", ("from", "to"))

    def _of_context(self) -> None:
        p = "breakwater_"
        self.trims = Counter(
            f"{p}context_trims_total",
            "Requests that were sent without their oldest messages or outputs.",
            ("strategy",),
        )
        self.trimmed = Counter(f"{p}context_tokens_trimmed_total", "Tokens that were not sent for it.", ())
        self.counts = Histogram(
            f"{p}context_estimate_error_ratio",
            "By how much our count of a prompt differs from its provider's, as a part of that.",
            (),
            _ERRORS,
        )

    def counters(self) -> list[Counter]:
        requests = [self.requests, self.tokens, self.interruptions, self.disconnects, self.connections_refused]
        upstream = [self.transitions, self.retries, self.failovers]
        return [
            *requests,
            self.cost,
            self.unpriced,
            self.refusals,
            self.store_errors,
            *upstream,
            self.trims,
            self.trimmed,
        ]

    def histograms(self) -> list[Histogram]:
        return [self.duration, self.overhead, self.upstream, self.first_token, self.estimates, self.counts]

    def size(self) -> int:
        return sum(map(len, self.counters())) + sum(map(len, self.histograms()))


class Metrics:
    """A subscriber of the bus that owns every series, and renders them.

    `in_flight`, `lines_dropped` and `circuits` (states by provider and model) are read at each scrape.
    `clock` is in seconds and drives only the page's cache.
    Call it (and `render`) from one thread, the event loop's.
    """

    def __init__(
        self,
        *,
        version: str,
        config_hash: str,
        in_flight: Callable[[], int],
        lines_dropped: Callable[[], int],
        degraded: Callable[[], bool] = lambda: False,
        budgets: Callable[[], Awaitable[Gauged]] | None = None,
        circuits: Callable[[], Mapping[tuple[str, ...], float]] = dict,
        clock: Callable[[], float] = time.monotonic,
        max_series: int = 20_000,
        cache_seconds: float = 1.0,
    ) -> None:
        self._families = _Families()
        self._bound: dict[_Key, _Bound] = {}
        self._max_series = max_series
        self._overflow: _Bound | None = None
        self._readings = [
            Reading("breakwater_in_flight_requests", "Requests being served now.", "gauge", in_flight),
            Reading(
                "breakwater_log_lines_dropped_total", "Log lines lost: the sink was too slow.", "counter", lines_dropped
            ),
            Reading("breakwater_degraded", "1 while the store of budgets is away.", "gauge", lambda: int(degraded())),
            Reading("breakwater_config_info", "The configuration in force.", "gauge", _one, hash=config_hash),
            Reading("breakwater_build_info", "The running version.", "gauge", _one, version=version),
        ]
        self._budgets = budgets
        self._circuits = circuits
        self._circuit_state = Gauge("breakwater_circuit_state", "0 closed, 1 half-open, 2 open.", ("provider", "model"))
        self._used = Gauge("breakwater_budget_used_ratio", "Part of a limit that is spent.", ("tenant", "window"))
        self._reserved = Gauge("breakwater_budget_reserved", "Reserved by requests in progress.", ("tenant", "unit"))
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            RequestFinished: self._finished,
            RequestRefused: self._refused,
            ConnectionRefused: self._connection_refused,
            CircuitOpened: partial(self._circuit_moved, "open"),
            CircuitHalfOpen: partial(self._circuit_moved, "half_open"),
            CircuitClosed: partial(self._circuit_moved, "closed"),
            UpstreamRetried: self._retried,
            UpstreamFailedOver: self._failed_over,
            ContextTrimmed: self._trimmed,
        }
        self._clock = clock
        self._cache_seconds = cache_seconds
        self._page: bytes | None = None
        self._page_at = 0.0
        self._scrape: asyncio.Task[bytes] | None = None
        # Its own thread: the loop's shared pool can be full of name look-ups that hang, and that is when one scrapes.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    def __call__(self, event: Notice) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def _finished(self, event: RequestFinished) -> None:
        key = (event.route, event.model, event.tenant, event.provider, event.status)
        bound = self._bound.get(key) or self._bind(key)
        bound.requests.value += 1
        bound.duration.observe(event.duration)
        if event.overhead is not None:
            bound.overhead.observe(event.overhead)
        if event.upstream_duration is not None:
            bound.upstream.observe(event.upstream_duration)
        if event.time_to_first_token is not None and event.stream:
            bound.first_token.observe(event.time_to_first_token)
        if event.usage is not None:
            bound.count_tokens(event.usage)
            if event.counted and event.usage.input and not event.usage.estimated:
                difference = abs(event.counted - event.usage.input)
                self._families.counts.child().observe(difference / event.usage.input)
            if event.nano_usd is None:
                bound.unpriced.value += 1
            else:
                bound.cost.value += event.nano_usd
        elif event.unpriced:
            bound.unpriced.value += 1
        if event.disconnected:
            bound.left.value += 1
        if event.interrupted:
            bound.cut.value += 1

    def _refused(self, event: RequestRefused) -> None:
        key = (event.route, event.model, event.tenant, "", event.status)
        bound = self._bound.get(key) or self._bind(key)
        bound.requests.value += 1
        bound.duration.observe(event.duration)

    def _connection_refused(self, event: ConnectionRefused) -> None:
        self._families.connections_refused.child(event.code).value += 1

    def _circuit_moved(self, to: str, event: CircuitOpened | CircuitHalfOpen | CircuitClosed) -> None:
        if event.was != to:  # else an open circuit is open for another reason
            self._families.transitions.child(event.provider, event.model, to).value += 1

    def _retried(self, event: UpstreamRetried) -> None:
        self._families.retries.child(event.provider, event.reason).value += 1

    def _failed_over(self, event: UpstreamFailedOver) -> None:
        self._families.failovers.child(event.from_provider, event.to_provider).value += 1

    def _trimmed(self, event: ContextTrimmed) -> None:
        if event.mode == "enforce":
            self._families.trims.child(event.strategy).value += 1
            self._families.trimmed.child().value += event.before - event.after

    def budget_refused(self, tenant: str, window: str, mode: str) -> None:
        """A request met a full window. (Not every one has an event of its own.)"""
        self._families.refusals.child(tenant, window, mode).value += 1

    def estimated(self, taken: int, reserved: int) -> None:
        """A settled request: the tokens that it took and those that were reserved for it."""
        if reserved:
            self._families.estimates.child().observe(taken / reserved)

    def store_failed(self, op: str) -> None:
        """A verb of the store failed."""
        self._families.store_errors.child(op).value += 1

    def _bind(self, key: _Key) -> _Bound:
        """A new kind of request. At the cap it shares the series of `other` and is not remembered."""
        if self._families.size() < self._max_series:
            bound = self._bound[key] = _Bound(self._families, key)
            return bound
        if self._overflow is None:
            self._overflow = _Bound(self._families, (OTHER, OTHER, OTHER, OTHER, 0))
        return self._overflow

    async def render(self) -> bytes:
        """The page (`CONTENT_TYPE`), at most `cache_seconds` old. However many ask at once, it is rendered once.

        A caller that is cancelled leaves the rendering to the others.
        """
        if self._page is not None and self._clock() - self._page_at < self._cache_seconds:
            return self._page
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.get_running_loop().create_task(self._refresh())
        return await asyncio.shield(self._scrape)

    async def _refresh(self) -> bytes:
        taken_at = self._clock()
        if self._budgets is not None:
            used, reserved = await self._budgets()
            self._used.replace(used)
            self._reserved.replace(reserved)
        self._circuit_state.replace(self._circuits())
        gauges = [self._used, self._reserved, self._circuit_state]
        snapshot = Snapshot([*self._families.counters(), *self._readings, *gauges], self._families.histograms())
        loop = asyncio.get_running_loop()
        self._page = await loop.run_in_executor(self._executor, self._write, snapshot)
        self._page_at = taken_at
        return self._page

    def _write(self, snapshot: Snapshot) -> bytes:
        return snapshot.render().encode() + generate_latest(self._process)

    def close(self) -> None:
        """Lets the rendering thread go. Does not wait for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _one() -> int:
    return 1
