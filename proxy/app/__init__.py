"""Where everything is put together: the only room that names concrete classes; it opens them and closes them.

Heavy parts that a configuration does not use are imported only when it does (HTTP/2 and egress proxies, FastAPI).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from proxy import __version__
from proxy.app.budgets import budget_of, budgets_shown, gauges_of, measure, readiness_of, used_here
from proxy.app.circuits import CircuitDesk, circuits_of
from proxy.app.context import context_of
from proxy.app.keys import AdministeredKeys, Keys, door_of, follower_of, registry_of
from proxy.app.ledger import Ledger, ledger_of
from proxy.app.owners import ownership_of
from proxy.app.upstreams import failover_of, provider_of, routing_of
from proxy.budget.hold import Budget
from proxy.budget.rollups import as_csv
from proxy.catalog import Catalog
from proxy.config.effective import nested
from proxy.config.loader import Loaded
from proxy.config.settings import Settings
from proxy.edge.asgi import App, Gateway, Side
from proxy.edge.auth import AdminKeys, Keyless, is_loopback
from proxy.edge.follow import KeyFollower
from proxy.edge.head import Limits
from proxy.edge.settings import ListenSettings
from proxy.fault_tolerance.guard import Circuits, NoCircuits
from proxy.observability.events import Bus, ConnectionRefused
from proxy.observability.metrics import CONTENT_TYPE, Metrics
from proxy.observability.scrub import Scrubber
from proxy.owners import Owners
from proxy.pipeline import Pipeline
from proxy.providers.base import Provider
from proxy.providers.settings import OpenAISettings
from proxy.tokens.count import Counter


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
        follower: KeyFollower | None,
        owners: Owners,
        ledger: Ledger,
        circuits: Circuits | NoCircuits,
    ) -> None:
        self.gateway = gateway
        self.side = side
        """Metrics, health and administration, for a port of their own."""
        self.limits = limits
        self._metrics = metrics
        self._providers = providers
        self._executor = executor
        self.budget = budget
        self._follower = follower
        self._owners = owners
        self._ledger = ledger
        self.circuits = circuits

    async def start(self) -> None:
        """Before anything is served."""
        await self._ledger.start()
        if self.budget.policies.refuses:
            await self.budget.counter.prepare()  # else the first to come near a limit would delay all others
        self.budget.start()
        self.circuits.start()
        if self._follower is not None:
            await self._follower.start()

    async def aclose(self) -> None:
        if self._follower is not None:
            await self._follower.aclose()
        await self.circuits.aclose()
        await self.budget.aclose()
        await self._owners.aclose()
        await self._ledger.aclose()
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
    counter = Counter(executor=executor)
    budget = budget_of(settings, bus, counter)
    registry = registry_of(budget.access.store)
    door = door_of(settings, complete=registry is None)
    follower = follower_of(registry, settings, door, budget.policies, bus) if registry and settings.tenants else None
    owners = Owners(
        ownership_of(budget.access.store), strict=bool(settings.tenants), providers=providers, emit=bus.emit
    )
    circuits = circuits_of(settings, bus, budget.access.store)
    pipeline = Pipeline(
        door if settings.tenants else Keyless(any_host=insecure),
        routing,
        failover_of(settings, providers, circuits, bus),
        Catalog(routing, providers, uncached=_with_callers_key(settings), clock=clock),
        context_of(settings, bus, budget, counter, executor),
        budget,
        owners,
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
        circuits=circuits.states,
    )
    measure(budget, metrics)
    bus.subscribe(metrics)
    keys = Keys(registry, [one.name for one in settings.tenants])
    desk = CircuitDesk(settings, circuits)
    side = _side(settings, metrics, budget, lambda: _admin(loaded, budget, keys, desk, lambda: gateway.in_flight))
    gateway = Gateway(
        pipeline,
        bus,
        side,
        max_in_flight=listen.max_in_flight,
        max_body_bytes=listen.max_body_bytes,
        own_port=listen.admin_port is not None,
        clock=clock,
    )
    ledger = ledger_of(settings, budget.access.store, bus)
    return Running(
        gateway, side, _limits(listen), metrics, providers, executor, budget, follower, owners, ledger, circuits
    )


def _side(settings: Settings, metrics: Metrics, budget: Budget, admin: Callable[[], App]) -> Side:
    """Metrics, health and administration. `admin` is called when it is first asked for."""
    local = is_loopback(settings.listen.host)
    return Side(
        metrics.render,
        CONTENT_TYPE,
        AdminKeys(key.get_secret_value() for key in settings.admin.keys),
        metrics_open=local or settings.observability.metrics_public,
        any_host=not local,
        admin=admin,
        store=readiness_of(settings, budget),
    )


def _limits(listen: ListenSettings) -> Limits:
    return Limits(
        body_bytes=listen.max_body_bytes,
        head_seconds=listen.header_timeout_ms / 1000,
        body_seconds=listen.body_timeout_ms / 1000,
        write_seconds=listen.write_timeout_ms / 1000,
        keep_alive_seconds=listen.keep_alive_ms / 1000,
    )


def refused_into(bus: Bus) -> Callable[[int, str], None]:
    """What the HTTP guard calls for a request that never reached the application."""
    return lambda status, code: bus.emit(ConnectionRefused(status=status, code=code))


def _with_callers_key(settings: Settings) -> list[str]:
    return [
        name for name, one in settings.providers.items() if isinstance(one, OpenAISettings) and one.passes_client_key
    ]


def _admin(loaded: Loaded, budget: Budget, keys: Keys, desk: CircuitDesk, in_flight: Callable[[], int]) -> App:
    from proxy.admin.api import create_admin
    from proxy.admin.circuits import add_circuits
    from proxy.admin.keys import add_keys

    admin = create_admin(
        config_hash=loaded.hash,
        effective=lambda: {"config": nested(loaded.settings), "origins": dict(loaded.origins)},
        in_flight=in_flight,
        budgets=partial(budgets_shown, budget),
        usage=partial(used_here, budget),
        usage_csv=as_csv,
        more=(partial(add_circuits, shown=desk.shown, command=desk.command, known=desk.known),),
    )
    add_keys(admin, AdministeredKeys(keys))
    return admin
