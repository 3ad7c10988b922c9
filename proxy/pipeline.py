"""The way of one request. The first file to read: one function shows the whole order, and nothing else decides it.

What is refused is refused before anything was sent. What must be undone is an `async with`, and only that. The reply is
pushed to `out` inside of it, by one path for streamed and plain replies: a plain reply is one event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from proxy.catalog import Catalog
from proxy.errors import UpstreamError, UpstreamRateLimited
from proxy.providers.base import Provider
from proxy.routing import Routing
from proxy.tokens.count import Counter
from proxy.tokens.encodings import encoding_of
from proxy.tokens.meter import Meter
from proxy.types import Ask, Call, Event, Out, Record, Reply, Target, Tenant, Usage
from proxy.validation import requests


class Tenants(Protocol):
    def identify(self, call: Call) -> Tenant:
        """Raises InvalidKey or OriginNotAllowed."""


class Pipeline:
    """Constructed once. `clock` is monotonic (seconds)."""

    def __init__(
        self,
        tenants: Tenants,
        routing: Routing,
        providers: Mapping[str, Provider],
        catalog: Catalog,
        counter: Counter,
        *,
        tenants_configured: bool,
        clock: Callable[[], float],
    ) -> None:
        self.tenants = tenants
        self.routing = routing
        self.providers = providers
        self.catalog = catalog
        self.counter = counter
        self.tenants_configured = tenants_configured
        self.clock = clock

    async def handle(self, call: Call, read: Callable[[], Awaitable[bytes]], out: Out) -> None:
        """Serves `call`, whose body is still to be `read`, into `out`.

        Raises ProxyError; before or after the first forwarded event, `out` knows which.
        """
        record = out.record
        tenant = self.tenants.identify(call)  # 401, 403
        record.tenant = tenant.name
        call.body = await read()  # 413; nobody without a key makes us hold a byte of it
        ask = requests.parse(call, tenant, tenants_configured=self.tenants_configured)  # 400, 404, 405
        record.route = ask.route
        if ask.dialect == "models":
            await self.catalog.answer(ask, tenant, out)
            return
        target = self._target(ask, tenant)  # 404
        record.model, record.provider, record.upstream_model = target.label, target.provider, target.model
        if ask.stream:
            record.stream = True
            out.expect_stream()
        attempt = Attempt(self.providers[target.provider], ask, target, record, self.clock)
        with Metered(self.counter, ask, target, out) as meter:
            async with attempt as reply:  # 429, 503, 504
                await self._push(reply, meter, out)

    def _target(self, ask: Ask, tenant: Tenant) -> Target:
        if ask.dialect == "passthrough":
            return self.routing.passthrough(tenant)
        return self.routing.target(ask.model, tenant)

    async def _push(self, reply: Reply, meter: Metered, out: Out) -> None:
        record = out.record
        started = False
        async for event in reply.events:
            meter.see(event)
            if not started:
                started = True
                record.first_event = self.clock()
                await out.start(reply.status, reply.headers, stream=reply.stream, length=reply.length)
            await out.write(event)
        if not started:
            await out.start(reply.status, reply.headers, stream=reply.stream, length=reply.length)


class Attempt:
    """One try at one target: times it, closes its reply, and tells an error where it happened."""

    __slots__ = (
        "_ask",
        "_clock",
        "_provider",
        "_record",
        "_reply",
        "_target",
    )

    def __init__(
        self, provider: Provider, ask: Ask, target: Target, record: Record, clock: Callable[[], float]
    ) -> None:
        self._provider = provider
        self._ask = ask
        self._target = target
        self._record = record
        self._clock = clock
        self._reply: Reply | None = None

    async def __aenter__(self) -> Reply:
        record = self._record
        record.attempts += 1
        record.upstream_started = self._clock()
        try:
            reply = await self._provider.open(self._ask, self._target.model)
        except UpstreamError as error:
            self._explain(error)
            raise
        finally:
            record.upstream_ended = self._clock()
        self._reply = reply
        record.upstream_status = reply.status
        record.upstream_request_id = reply.upstream_request_id
        return reply

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record.upstream_ended = self._clock()
        if isinstance(error, UpstreamError) and not self._record.first_event:
            self._explain(error)
        if self._reply is not None:
            await self._reply.aclose()

    def _explain(self, error: UpstreamError) -> None:
        """Adds the list of attempts, and stops SDKs from repeating what was given up on its merits."""
        status = error.details.pop("upstream_status", None)
        self._record.upstream_status = status or 0
        self._record.upstream_request_id = error.details.pop("upstream_request_id", "")
        attempt: dict[str, Any] = {"target": f"{self._target.provider}/{self._target.model}".rstrip("/")}
        attempt["status"] = status
        attempt["reason"] = getattr(error, "reason", error.code)
        attempt["ms"] = round((self._clock() - self._record.upstream_started) * 1000)
        error.details["attempts"] = [attempt]
        if not isinstance(error, UpstreamRateLimited):
            error.headers.append((b"x-should-retry", b"false"))


class Metered:
    """What one reply costs in tokens: the provider's figures where it gives them, counted and marked otherwise.

    The last usage seen wins (some servers send a running total with every chunk). Written to the record on every way
    out: a hang-up or a cut leaves an estimate of what was forwarded. Counting can take its time, so it is done
    afterwards.
    """

    __slots__ = (
        "_ask",
        "_counter",
        "_meter",
        "_out",
        "_record",
        "_seen",
        "_target",
    )

    def __init__(self, counter: Counter, ask: Ask, target: Target, out: Out) -> None:
        self._counter = counter
        self._ask = ask
        self._target = target
        self._out = out
        self._record = out.record
        self._meter: Meter | None = Meter() if ask.dialect != "passthrough" else None
        self._seen = False

    def __enter__(self) -> Metered:
        return self

    def see(self, event: Event) -> None:
        self._seen = True
        if event.usage is not None:
            self._record.usage = event.usage
        elif self._meter is not None:
            self._meter.see(event.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        record = self._record
        if self._meter is not None and self._seen and record.usage is None and record.upstream_status < 300:
            self._out.afterwards(partial(self._estimate, self._meter))

    async def _estimate(self, meter: Meter) -> None:
        encoding = encoding_of(self._target.model)
        prompt = await self._counter.count_prompt(self._ask.dialect, self._ask.fields, encoding)
        output = await meter.output_tokens(self._counter, encoding)
        self._record.usage = Usage(prompt, output, estimated=True)
