"""The way of one request. The first file to read: one function shows the whole order, and nothing else decides it.

What is refused is refused before anything was sent. What must be undone is an `async with`, and only that. The reply is
pushed to `out` inside of it, by one path for streamed and plain replies: a plain reply is one event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from proxy.budget.cut import ending
from proxy.budget.hold import Budget
from proxy.budget.plan import want_of
from proxy.budget.records import tags_in
from proxy.budget.tab import Tab
from proxy.catalog import Catalog
from proxy.children import Children
from proxy.context.view import Context
from proxy.fault_tolerance.failover import Failover
from proxy.owners import Claims, Owners
from proxy.routing import Routing
from proxy.store.ownership import Owner
from proxy.types import OTHER, Ask, Call, Event, Groups, Out, Reply, Target, Tenant
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
        failover: Failover,
        catalog: Catalog,
        context: Context,
        budget: Budget,
        owners: Owners,
        *,
        tenants_configured: bool,
        clock: Callable[[], float],
    ) -> None:
        self.tenants = tenants
        self.routing = routing
        self.failover = failover
        self.catalog = catalog
        self.context = context
        self.children = Children(routing, failover)
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
        groups = self._groups(ask, tenant, home)  # 404
        bounds = self.failover.bounds(call)  # 400
        targets = self.failover.order(groups, ask)
        first = targets[0]
        record.model, record.provider, record.upstream_model = first.label, first.provider, first.model
        if ask.stream:
            record.stream = True
            out.expect_stream()
        want = want_of(ask, "" if call.tags is None else tags_in(call.tags))
        want.deadline = bounds.deadline
        want.view = view = self.context.view(
            ask, targets, tenant, want.asked, record, choices=want.choices, deadline=bounds.deadline
        )
        hold = self.budget.hold(
            tenant.name, tenant.key, want, targets, record, call.request_id, afterwards=out.afterwards
        )
        async with hold as charge:  # 400, 429, 503
            if self.context.summaries:
                view.complete = partial(self.children.complete, call, tenant, charge, bounds)
            opening = self.failover.open(ask, targets, charge, record, bounds, view)
            async with opening as reply:  # 429, 503, 504
                claims = None if ask.objects is None else self.owners.claims(ask, tenant, opening.target, reply)
                await self._push(reply, charge, out, claims)

    def _groups(self, ask: Ask, tenant: Tenant, home: Owner | None) -> Groups:
        if ask.model and (ask.dialect != "passthrough" or ask.fields):
            groups = self.routing.targets(ask.model, tenant)
        elif home is None:
            return self.routing.passthrough(tenant, ask.model)
        else:
            return ((Target(home.provider, "", OTHER),),)
        return groups if home is None else self.owners.lead(ask, groups, home)

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
            if not out.push(event):
                await out.write(event)
            if outgrown and not await charge.grow():
                last = ending(charge.want.ask.dialect, charge.head, charge.want.returned)
                event = Event(last, terminator=len(last))
                if claims is not None:
                    await claims.see(event)
                await out.write(event)
                return
            if event.last:
                return
        if not started:
            await out.start(reply.status, reply.headers, stream=reply.stream, length=reply.length)
