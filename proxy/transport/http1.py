"""The transport on the hot path: HTTP/1.1 over our own connections.

One `send` is: build the head, take the warmest idle connection (no suspension), one write, one future until the head
is there. No task, queue or timer is made per request. What it does when things go wrong is in `connection`, who may
have a connection is in `pool`, how one is opened is in `connect`.
"""

from __future__ import annotations

import asyncio
import ssl

from proxy.errors import ConnectFailed, UpstreamBroken
from proxy.transport.base import Origin, Request
from proxy.transport.connect import Names, open_connection, trusting_the_system
from proxy.transport.connection import Connection
from proxy.transport.framing import request_head
from proxy.transport.pool import KEEPALIVE, Pool, PoolStats
from proxy.transport.response import Http1Response


class _Site:
    """What is known of an origin, worked out once."""

    __slots__ = ("authority", "origin", "pool", "tls")

    def __init__(self, origin: Origin, pool: Pool[Connection], tls: ssl.SSLContext | None) -> None:
        self.origin = origin
        self.pool = pool
        self.tls = tls
        self.authority = origin.authority


class Http1Transport:
    """The port's `Transport`.

    `max_connections`: per origin. `connect_timeout`: seconds for name, TCP and TLS together. `keepalive`: seconds that
    an idle connection is kept. `max_head_bytes`: of a response's head. `ssl_context`: None means the operating
    system's trust store, read when the first https origin is met (about 25 ms).
    """

    def __init__(
        self,
        *,
        max_connections: int,
        connect_timeout: float,
        keepalive: float = KEEPALIVE,
        max_head_bytes: int = 65536,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._max_connections = max_connections
        self._connect_timeout = connect_timeout
        self._keepalive = keepalive
        self._max_head_bytes = max_head_bytes
        self._ssl_context = ssl_context
        self._sites: dict[tuple[str, str, int], _Site] = {}
        self._names = Names()
        self._closed = False

    async def send(self, request: Request, deadline: float) -> Http1Response:
        """See the port. Raises ValueError for a request that cannot be written as one (control characters)."""
        origin = request.origin
        site = self._sites.get((origin.scheme, origin.host, origin.port)) or self._open_site(origin)
        head = request_head(request, site.authority)
        connection = site.pool.reuse() if request.replayable else _reuse_silent(site.pool)
        if connection is None:
            connection = await self._acquire(site, deadline, replayable=request.replayable)
        head_only = request.method == b"HEAD"
        response = Http1Response(connection, head_only=head_only)
        connection.start(response, head, request.body)
        try:
            await response.head(deadline)
        except UpstreamBroken:
            if not (response.stale and request.replayable):
                raise
            connection = await self._replace(site, deadline)
            response = Http1Response(connection, head_only=head_only)
            connection.start(response, head, request.body)
            await response.head(deadline)
        return response

    async def aclose(self) -> None:
        self._closed = True
        self._names.close()
        for site in self._sites.values():
            site.pool.close()

    def stats(self) -> PoolStats:
        """Of all origins together."""
        stats = [site.pool.stats() for site in self._sites.values()]
        return PoolStats(sum(s.in_use for s in stats), sum(s.idle for s in stats), sum(s.waiting for s in stats))

    def _open_site(self, origin: Origin) -> _Site:
        if self._closed:
            raise ConnectFailed("The transport is closed.", reason="pool")
        tls = None
        if origin.scheme == "https":
            tls = self._ssl_context = self._ssl_context or trusting_the_system()
        pool: Pool[Connection] = Pool(asyncio.get_running_loop(), self._max_connections, self._keepalive)
        site = self._sites[origin.scheme, origin.host, origin.port] = _Site(origin, pool, tls)
        return site

    async def _acquire(self, site: _Site, deadline: float, *, replayable: bool) -> Connection:
        """A connection with its slot: one that is given back meanwhile, or a new one."""
        connection = await site.pool.acquire(deadline)
        if connection is not None:
            if connection.usable() and (replayable or connection.silent()):
                return connection
            connection.abort()
        return await self._connect(site, deadline)

    async def _replace(self, site: _Site, deadline: float) -> Connection:
        """A new connection with its slot, never an idle one: where one idle connection was dead, others may be."""
        connection = site.pool.reuse() or await site.pool.acquire(deadline)
        if connection is not None:
            connection.abort()
        return await self._connect(site, deadline)

    async def _connect(self, site: _Site, deadline: float) -> Connection:
        """A new connection for the slot that the caller holds; the slot is given back if there is none."""
        loop = asyncio.get_running_loop()
        connection = Connection(loop, site.pool, self._max_head_bytes)
        try:
            deadline = min(deadline, loop.time() + self._connect_timeout)
            transport = await open_connection(connection, site.origin, site.tls, deadline, self._names)
            site.pool.add(connection)
            _check(transport, site.tls is not None)
        except BaseException:  # cancelled as well as failed
            site.pool.free()
            raise
        return connection


def _reuse_silent(pool: Pool[Connection]) -> Connection | None:
    """For a request that must not be sent twice: an idle connection that not even the kernel knows to be dead."""
    while (connection := pool.reuse()) is not None:
        if connection.silent():
            return connection
        connection.abort()
        pool.free()
    return None


def _check(transport: asyncio.Transport, tls: bool) -> None:
    """Raises ConnectFailed for a connection that no request should be written to."""
    if transport.is_closing():
        raise ConnectFailed("The upstream closed the connection at once.", reason="network")
    if tls and transport.get_extra_info("ssl_object").selected_alpn_protocol() not in (None, "http/1.1"):
        transport.abort()
        raise ConnectFailed("The upstream insists on another protocol than HTTP/1.1.", reason="tls")
