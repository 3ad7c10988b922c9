"""What the transport tests share: the loop of production, and both adapters under one name."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trustme
import uvloop

from tests.transport.adapters import ADAPTERS, AnyTransport, MakeTransport


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """For tests that are not coroutines."""
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client's context that trusts the test authority and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="session")
def serving(authority: trustme.CA) -> ssl.SSLContext:
    """A server's context for `localhost`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(params=sorted(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def make(adapter: str, trusting: ssl.SSLContext) -> AsyncIterator[MakeTransport]:
    """Makes transports of the adapter under test; whatever a test did, at the end no slot is in use."""
    made: list[AnyTransport] = []

    def make_transport(**settings: Any) -> AnyTransport:
        settings = {"max_connections": 10, "connect_timeout": 5.0, "ssl_context": trusting, **settings}
        made.append(ADAPTERS[adapter](**settings))
        return made[-1]

    yield make_transport
    for transport in made:
        stats = transport.stats()
        await transport.aclose()
        await asyncio.sleep(0)
        assert (stats.in_use, stats.waiting) == (0, 0)
        assert transport.stats().idle == 0
