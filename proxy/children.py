"""Calls to providers that a client's request causes beside its own: for the same tenant, on the same bill, in the same
bounds.

They go the way of any other call, through routing, budget and failover, but are neither trimmed nor pushed to anybody.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from proxy.budget.plan import want_of
from proxy.budget.tab import Tab
from proxy.errors import UpstreamUnavailable
from proxy.fault_tolerance.failover import Failover
from proxy.fault_tolerance.retry import Bounds
from proxy.routing import Routing
from proxy.types import Ask, Call, Record, Tenant
from proxy.validation.requests import decode
from proxy.validation.stored import member

_ROUTE: Final = "/v1/chat/completions"
_CREDENTIALS: Final = (b"authorization", b"api-key", b"x-api-key")
"""A provider may want the caller's own. Nothing else of its headers concerns a call that it knows nothing of."""


class Children:
    """One for the process."""

    def __init__(self, routing: Routing, failover: Failover) -> None:
        self._routing = routing
        self._failover = failover

    async def complete(self, call: Call, tenant: Tenant, charge: Tab, bounds: Bounds, body: bytes) -> bytes:
        """The body of the answer to a plain chat request. Raises ProxyError, also for any answer but 200.

        The tenant may use the model of it even where its own list of models does not name it: it is the operator's
        choice, not the client's. Providers that it may not use stay out.
        """
        headers = [header for header in call.headers if header[0] in _CREDENTIALS]
        own = replace(
            call, method="POST", path=_ROUTE, raw_path=_ROUTE.encode(), query=b"", headers=headers, body=body,
        )  # fmt: skip
        fields = decode(body)
        model = member(fields, "model")
        ask = Ask("chat", _ROUTE, own, model=str(model), fields=fields, replayable=True)
        groups = self._routing.targets(ask.model, Tenant(tenant.name, providers=tenant.providers))
        targets = self._failover.order(groups, ask)
        record = Record(tenant=tenant.name, model=targets[0].label)
        want = want_of(ask)
        want.deadline = bounds.deadline
        async with (
            charge.child(want) as child,
            self._failover.open(ask, targets, child, record, bounds) as reply,
        ):
            answer = b""
            async for event in reply.events:
                child.see(event)
                answer += event.data
        if reply.status != 200:
            raise UpstreamUnavailable("A model that was asked on behalf of this request refused.")
        return answer
