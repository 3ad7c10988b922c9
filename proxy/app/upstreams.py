"""Providers and their transports, as the configuration wants them."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from random import random

from proxy.config.settings import Settings
from proxy.fault_tolerance.failover import Failover
from proxy.fault_tolerance.permits import Guard
from proxy.fault_tolerance.retry import RetryPolicy
from proxy.observability.events import Bus
from proxy.observability.scrub import Scrubber
from proxy.providers.base import Provider
from proxy.providers.mock.counting import real_counts
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.script import read_script
from proxy.providers.openai import OpenAIProvider, Timeouts
from proxy.providers.settings import OpenAISettings, ProviderSettings
from proxy.routing import Route, Routing
from proxy.transport.base import Transport
from proxy.transport.http1 import Http1Transport
from proxy.transport.scripted import ScriptedTransport
from proxy.types import Headers


def provider_of(name: str, settings: ProviderSettings, scrubber: Scrubber) -> Provider:
    """Raises OSError and ScriptError for files that cannot be read."""
    limits = settings.timeouts
    timeouts = Timeouts(limits.first_event_ms / 1000, limits.idle_ms / 1000, limits.total_ms / 1000)
    if not isinstance(settings, OpenAISettings):
        mock = Mock(
            real_counts(),
            seed=settings.seed,
            tokens_per_second=settings.tokens_per_second,
            first_token_ms=settings.first_token_ms,
            script=read_script(settings.script) if settings.script is not None else None,
            prompt_cache=settings.prompt_cache,
        )
        return OpenAIProvider(name, "http://mock/v1", ScriptedTransport(mock), timeouts)
    headers: Headers = []
    if settings.organization is not None:
        headers.append((b"openai-organization", settings.organization.encode()))
    if settings.project is not None:
        headers.append((b"openai-project", settings.project.encode()))
    return OpenAIProvider(
        name,
        settings.base_url,
        _transport(settings),
        timeouts,
        api_keys=[key.get_secret_value() for key in settings.credentials],
        callers_key=settings.passes_client_key,
        extra_headers=headers,
        scrub=scrubber.scrub_bytes,
    )


def routing_of(settings: Settings) -> Routing:
    routes = (Route(model.name, model.groups) for model in settings.models)
    return Routing(routes, settings.providers, fallback=settings.fault_tolerance.fallback_provider)


def failover_of(settings: Settings, providers: Mapping[str, Provider], circuits: Guard, bus: Bus) -> Failover:
    section = settings.fault_tolerance
    retry = section.retry
    policy = RetryPolicy(
        max_attempts=retry.max_attempts if section.acts else 1,
        base_delay=retry.base_delay_ms / 1000,
        max_delay=retry.max_delay_ms / 1000,
        jitter=retry.jitter,
        on_timeout=retry.on_timeout,
    )
    return Failover(
        providers,
        circuits,
        policy,
        deadline=section.deadline_ms / 1000,
        max_calls=section.max_upstream_calls,
        clock=time.monotonic,
        now=asyncio.get_running_loop().time,
        random=random,
        emit=bus.emit,
        heeds_rests=section.acts,
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
