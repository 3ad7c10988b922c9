"""Where everything is put together: the only file that names concrete classes; it opens them and closes them.

Heavy parts that a configuration does not use are imported only when it does (HTTP/2 and egress proxies, FastAPI).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from proxy import __version__
from proxy.budget.access import Access
from proxy.budget.answers import store_unavailable
from proxy.budget.estimate import Expectations
from proxy.budget.hold import Budget
from proxy.budget.plan import Planner
from proxy.budget.policy import Policies, TenantBudget
from proxy.budget.pricing import (
    FREE,
    Account,
    Library,
    ModelFacts,
    NoLibrary,
    PriceBook,
    facts_of,
    vendor_of,
)
from proxy.budget.report import by_tenant, gauges, shown, usage_shown
from proxy.budget.watch import Watch
from proxy.catalog import Catalog
from proxy.config.effective import nested
from proxy.config.loader import Loaded
from proxy.config.settings import Settings
from proxy.edge.asgi import App, Gateway, Side
from proxy.edge.auth import AdminKeys, KeyedTenants, Keyless, is_loopback
from proxy.edge.head import Limits
from proxy.errors import StoreUnavailable
from proxy.observability.events import Bus, ConnectionRefused
from proxy.observability.metrics import CONTENT_TYPE, Gauged, Metrics
from proxy.observability.scrub import Scrubber
from proxy.pipeline import Pipeline, Tenants
from proxy.providers.base import Provider
from proxy.providers.mock.counting import real_counts
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.script import read_script
from proxy.providers.openai import OpenAIProvider, Timeouts
from proxy.providers.settings import OpenAISettings, ProviderSettings
from proxy.routing import Route, Routing
from proxy.store.base import DIMENSIONS, ROLLUP_MS
from proxy.store.base import StoreUnavailable as StoreAway
from proxy.store.memory import MemoryStore
from proxy.tokens.count import Counter
from proxy.transport.base import Transport
from proxy.transport.http1 import Http1Transport
from proxy.transport.scripted import ScriptedTransport
from proxy.types import Headers, Tenant


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
    providers = {name: _provider(name, one, scrubber) for name, one in settings.providers.items()}
    routing = Routing((Route(model.name, model.targets[0]) for model in settings.models), providers)
    budget = _budget(settings, bus, Counter(executor=executor))
    pipeline = Pipeline(
        _tenants(settings, insecure),
        routing,
        providers,
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
        budgets=lambda: _gauges(budget),
    )
    budget.observe = metrics.estimated
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


def _budget(settings: Settings, bus: Bus, counter: Counter) -> Budget:
    clock = asyncio.get_running_loop().time
    policies = Policies(
        settings.budget,
        everyone=settings.global_budget,
        accounts={name: one.limits for name, one in settings.providers.items()},
        tenants={one.name: TenantBudget(one.budget) for one in settings.tenants},
    )
    return Budget(
        Access(MemoryStore(), Watch(), clock=clock, emit=bus.emit, collect_ms=0),
        Planner(_prices(settings), Expectations()),
        policies,
        counter,
        local=MemoryStore,
        clock=clock,
        emit=bus.emit,
        prompt=True,
    )


def _prices(settings: Settings) -> PriceBook:
    library: Library = NoLibrary()
    patterns: list[tuple[str, str]] = []
    if any(_has_list_prices(one) for one in settings.providers.values()):
        from proxy.budget.library import GenaiPrices

        known = GenaiPrices()
        library, patterns = known, list(known.patterns())
    accounts: dict[str, Account] = {}
    for name, one in settings.providers.items():
        models = {glob: facts_of(facts) for glob, facts in one.models.items()}
        if isinstance(one, OpenAISettings):
            vendor = one.vendor or vendor_of(one.base_url, patterns)
            accounts[name] = Account(None if vendor == "none" else vendor, models)
        else:
            accounts[name] = Account(None, {**models, "*": models.get("*", ModelFacts()).over(ModelFacts(FREE))})
    return PriceBook(accounts, {one.name: facts_of(one) for one in settings.models}, library, time.time)


def _has_list_prices(settings: ProviderSettings) -> bool:
    """Whether the price list, which takes a quarter of a second to load, can say anything of a provider."""
    if not isinstance(settings, OpenAISettings) or settings.vendor is not None:
        return isinstance(settings, OpenAISettings) and settings.vendor != "none"
    host = urlsplit(settings.base_url).hostname or ""
    try:
        return not ip_address(host).is_private  # no vendor's address
    except ValueError:
        return host != "localhost"


def _with_callers_key(settings: Settings) -> list[str]:
    return [
        name for name, one in settings.providers.items() if isinstance(one, OpenAISettings) and one.passes_client_key
    ]


def _provider(name: str, settings: ProviderSettings, scrubber: Scrubber) -> Provider:
    limits = settings.timeouts
    timeouts = Timeouts(limits.first_event_ms / 1000, limits.idle_ms / 1000, limits.total_ms / 1000)
    if not isinstance(settings, OpenAISettings):
        mock = Mock(
            real_counts(),
            seed=settings.seed,
            tokens_per_second=settings.tokens_per_second,
            first_token_ms=settings.first_token_ms,
            script=read_script(settings.script) if settings.script is not None else None,
        )
        return OpenAIProvider(name, "http://mock/v1", ScriptedTransport(mock), timeouts)
    headers: Headers = []
    if settings.organization is not None:
        headers.append((b"openai-organization", settings.organization.encode()))
    if settings.project is not None:
        headers.append((b"openai-project", settings.project.encode()))
    key = settings.credential
    return OpenAIProvider(
        name,
        settings.base_url,
        _transport(settings),
        timeouts,
        api_key=key.get_secret_value() if key is not None else None,
        callers_key=settings.passes_client_key,
        extra_headers=headers,
        scrub=scrubber.scrub_bytes,
    )


def _transport(settings: OpenAISettings) -> Transport:
    context = ssl.create_default_context(cafile=str(settings.ca_file)) if settings.ca_file is not None else None
    connect = settings.timeouts.connect_ms / 1000
    if settings.transport == "http1":
        return Http1Transport(max_connections=settings.max_connections, connect_timeout=connect, ssl_context=context)
    from proxy.transport.httpx import HttpxTransport

    proxy = settings.egress_proxy
    return HttpxTransport(
        max_connections=settings.max_connections,
        connect_timeout=connect,
        ssl_context=context,
        http2=settings.http2,
        egress_proxy=proxy.get_secret_value() if proxy is not None else None,
    )


def _admin(loaded: Loaded, budget: Budget, in_flight: Callable[[], int]) -> App:
    from proxy.admin.api import create_admin

    async def budgets(tenant: str | None) -> list[dict[str, Any]]:
        found = await budget.report()
        return shown(found if tenant is None else by_tenant(found, tenant))

    async def usage(span_ms: int, by: list[str]) -> list[dict[str, Any]]:
        names = [one for name in by for one in DIMENSIONS if one == name]
        now = budget.wall_ms()
        since = (now - span_ms) // ROLLUP_MS * ROLLUP_MS
        try:
            return usage_shown(await budget.access.store.usage(since, now + ROLLUP_MS, names), names)
        except StoreAway as error:
            raise store_unavailable() from error

    return create_admin(
        config_hash=loaded.hash,
        effective=lambda: {"config": nested(loaded.settings), "origins": dict(loaded.origins)},
        in_flight=in_flight,
        budgets=budgets,
        usage=usage,
        dimensions=DIMENSIONS,
    )


async def _gauges(budget: Budget) -> Gauged:
    try:
        return gauges(await budget.report())
    except StoreUnavailable:
        return {}, {}  # A page without them says more than figures of the past.
