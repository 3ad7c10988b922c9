"""The way of one request. The first file to read: one function shows the whole order, and nothing else decides it.

What is refused is refused before anything was sent. What must be undone is an `async with`, and only that. The reply is
pushed to `out` inside of it, by one path for streamed and plain replies: a plain reply is one event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from proxy.budget.cut import ending
from proxy.budget.hold import Budget
from proxy.budget.plan import want_of
from proxy.budget.records import tags_in
from proxy.budget.tab import Tab
from proxy.catalog import Catalog
from proxy.errors import InternalError, ProxyError, UpstreamError, UpstreamRateLimited
from proxy.owners import Claims, Owners
from proxy.providers.base import Provider
from proxy.routing import Routing
from proxy.store.ownership import Owner
from proxy.types import OTHER, Ask, Call, Event, Out, Record, Reply, Target, Tenant
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
        budget: Budget,
        owners: Owners,
        *,
        tenants_configured: bool,
        clock: Callable[[], float],
    ) -> None:
        self.tenants = tenants
        self.routing = routing
        self.providers = providers
        self.catalog = catalog
        self.budget = budget
        self.owners = owners
        self.tenants_configured = tenants_configured
        self.clock = clock

    async def handle(self, call: Call, read: Callable[[], Awaitable[bytes]], out: Out) -> None:
        """Serves `call`, whose body is still to be `read`, into `out`.

        Raises ProxyError; before or after the first forwarded event, `out` knows which.
        """
        record = out.record
        record.degraded = self.budget.access.away
        tenant = self.tenants.identify(call)  # 401, 403
        record.tenant = tenant.name
        call.body = await read()  # 413; nobody without a key makes us hold a byte of it
        ask = requests.parse(call, tenant, tenants_configured=self.tenants_configured)  # 400, 404, 405
        record.route = ask.route
        if ask.dialect == "models":
            await self.catalog.answer(ask, tenant, out)
            return
        home = None if ask.objects is None else await self.owners.home(ask, tenant)  # 404, 503
        target = self._target(ask, tenant, home)  # 404
        record.model, record.provider, record.upstream_model = target.label, target.provider, target.model
        if ask.stream:
            record.stream = True
            out.expect_stream()
        want = want_of(ask, tags_in(call.header(b"x-breakwater-tags")))
        hold = self.budget.hold(
            tenant.name, tenant.key, want, (target,), record, call.request_id, afterwards=out.afterwards
        )
        async with hold as charge:  # 400, 429, 503
            await self._attempt(charge, target, ask, out, tenant)

    async def _attempt(self, charge: Tab, target: Target, ask: Ask, out: Out, tenant: Tenant) -> None:
        await charge.cover(target)
        attempt = Attempt(self.providers[target.provider], ask, target, out.record, self.clock, charge.output_cap)
        try:
            async with attempt as reply:  # 429, 503, 504
                charge.answered(reply.status)
                await self._push(reply, charge, out, self.owners.claims(ask, tenant, target, reply))
        except ProxyError as error:
            charge.failed(error)
            raise
        except Exception:  # a fault of ours: where no answer had begun, nothing is known to have been used
            charge.failed(InternalError())
            raise

    def _target(self, ask: Ask, tenant: Tenant, home: Owner | None) -> Target:
        if ask.model and (ask.dialect != "passthrough" or ask.fields):
            target = self.routing.target(ask.model, tenant)
        elif home is None:
            target = self.routing.passthrough(tenant, ask.model)
        else:
            return Target(home.provider, "", OTHER)
        return target if home is None else self.owners.lead(ask, target, home)

    async def _push(self, reply: Reply, charge: Tab, out: Out, claims: Claims | None) -> None:
        record = out.record
        started = False
        async for event in reply.events:
            outgrown = charge.see(event)
            if not started:
                started = True
                record.first_event = self.clock()
                await out.start(reply.status, reply.headers, stream=reply.stream, length=reply.length)
            if claims is not None:
                await claims.see(event)
            await out.write(event)
            if outgrown and not await charge.grow():
                last = ending(charge.want.ask.dialect, charge.head, charge.want.returned)
                event = Event(last, terminator=len(last))
                if claims is not None:
                    await claims.see(event)
                await out.write(event)
                return
        if not started:
            await out.start(reply.status, reply.headers, stream=reply.stream, length=reply.length)


class Attempt:
    """One try at one target: times it, closes its reply, and tells an error where it happened."""

    __slots__ = (
        "_ask",
        "_cap",
        "_clock",
        "_provider",
        "_record",
        "_reply",
        "_target",
    )

    def __init__(
        self,
        provider: Provider,
        ask: Ask,
        target: Target,
        record: Record,
        clock: Callable[[], float],
        output_cap: int | None = None,
    ) -> None:
        self._provider = provider
        self._ask = ask
        self._target = target
        self._record = record
        self._clock = clock
        self._cap = output_cap
        self._reply: Reply | None = None

    async def __aenter__(self) -> Reply:
        record = self._record
        record.attempts += 1
        record.upstream_started = self._clock()
        try:
            reply = await self._provider.open(self._ask, self._target.model, output_cap=self._cap)
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
