"""Where everything is put together: the only room that names concrete classes; it opens them and closes them.

Heavy parts that a configuration does not use are imported only when it does (HTTP/2 and egress proxies, FastAPI).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from proxy import __version__
from proxy.app.budgets import budget_of, budgets_shown, gauges_of, used
from proxy.app.upstreams import failover_of, provider_of, routing_of
from proxy.budget.hold import Budget
from proxy.catalog import Catalog
from proxy.config.effective import nested
from proxy.config.loader import Loaded
from proxy.config.settings import Settings
from proxy.edge.asgi import App, Gateway, Side
from proxy.edge.auth import AdminKeys, KeyedTenants, Keyless, is_loopback
from proxy.edge.head import Limits
from proxy.observability.events import Bus, ConnectionRefused
from proxy.observability.metrics import CONTENT_TYPE, Metrics
from proxy.observability.scrub import Scrubber
from proxy.pipeline import Pipeline, Tenants
from proxy.providers.base import Provider
from proxy.providers.settings import OpenAISettings
from proxy.store.base import DIMENSIONS
from proxy.tokens.count import Counter
from proxy.types import Tenant


class Running:
    """An application that is open. `aclose` gives everything back; it is called once, when nothing is in flight."""

    def __init__(
        self,
        gateway: Gateway,
        side: Side,
        limits: Limits,
        metrics: Metrics,
        providers: Mapping[str, Provider],
        executor: ThreadPoolExecutor,
        budget: Budget,
    ) -> None:
        self.gateway = gateway
        self.side = side
        """Metrics, health and administration, for a port of their own."""
        self.limits = limits
        self._metrics = metrics
        self._providers = providers
        self._executor = executor
        self.budget = budget

    async def start(self) -> None:
        """Before anything is served."""
        self.budget.start()

    async def aclose(self) -> None:
        await self.budget.aclose()
        await self.budget.access.store.aclose()
        for provider in self._providers.values():
            await provider.aclose()
        self._metrics.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


def create_app(
    loaded: Loaded, bus: Bus, scrubber: Scrubber, *, lines_dropped: Callable[[], int], insecure: bool = False
) -> Running:
    """Builds the whole on the running event loop. Raises OSError and ScriptError for files that cannot be read."""
    settings = loaded.settings
    clock = time.monotonic  # the loop's own clock has steps of a millisecond: good for deadlines, not for measuring
    executor = ThreadPoolExecutor(1, thread_name_prefix="tokens")
    providers = {name: provider_of(name, one, scrubber) for name, one in settings.providers.items()}
    routing = routing_of(settings)
    budget = budget_of(settings, bus, Counter(executor=executor))
    pipeline = Pipeline(
        _tenants(settings, insecure),
        routing,
        failover_of(settings, providers, bus),
        Catalog(routing, providers, uncached=_with_callers_key(settings), clock=clock),
        budget,
        tenants_configured=bool(settings.tenants),
        clock=clock,
    )
    listen = settings.listen
    metrics = Metrics(
        version=__version__,
        config_hash=loaded.hash,
        in_flight=lambda: gateway.in_flight,
        lines_dropped=lines_dropped,
        degraded=lambda: budget.access.away,
        budgets=lambda: gauges_of(budget),
    )
    budget.observe = metrics.estimated
    budget.refusals.count = metrics.budget_refused
    bus.subscribe(metrics)
    local = is_loopback(listen.host)
    side = Side(
        metrics.render,
        CONTENT_TYPE,
        AdminKeys(key.get_secret_value() for key in settings.admin.keys),
        metrics_open=local or settings.observability.metrics_public,
        any_host=not local,
        admin=lambda: _admin(loaded, budget, lambda: gateway.in_flight),
    )
    gateway = Gateway(
        pipeline,
        bus,
        side,
        max_in_flight=listen.max_in_flight,
        max_body_bytes=listen.max_body_bytes,
        own_port=listen.admin_port is not None,
        clock=clock,
    )
    limits = Limits(
        body_bytes=listen.max_body_bytes,
        head_seconds=listen.header_timeout_ms / 1000,
        body_seconds=listen.body_timeout_ms / 1000,
        write_seconds=listen.write_timeout_ms / 1000,
        keep_alive_seconds=listen.keep_alive_ms / 1000,
    )
    return Running(gateway, side, limits, metrics, providers, executor, budget)


def refused_into(bus: Bus) -> Callable[[int, str], None]:
    """What the HTTP guard calls for a request that never reached the application."""
    return lambda status, code: bus.emit(ConnectionRefused(status=status, code=code))


def _tenants(settings: Settings, insecure: bool) -> Tenants:
    if not settings.tenants:
        return Keyless(any_host=insecure)
    by_key = {}
    for one in settings.tenants:
        tenant = Tenant(one.name, one.models, one.providers, one.passthrough)
        by_key.update({key.get_secret_value(): tenant for key in one.keys})
    return KeyedTenants(by_key)


def _with_callers_key(settings: Settings) -> list[str]:
    return [
        name for name, one in settings.providers.items() if isinstance(one, OpenAISettings) and one.passes_client_key
    ]


def _admin(loaded: Loaded, budget: Budget, in_flight: Callable[[], int]) -> App:
    from proxy.admin.api import create_admin

    return create_admin(
        config_hash=loaded.hash,
        effective=lambda: {"config": nested(loaded.settings), "origins": dict(loaded.origins)},
        in_flight=in_flight,
        budgets=partial(budgets_shown, budget),
        usage=partial(used, budget),
        dimensions=DIMENSIONS,
    )
