"""The second transport: HTTP/2 and egress proxies, by way of `httpx2`.

Slower than `http1` by an order of magnitude, and the same to its callers but for three things. It never resends a
request silently, for here it cannot be told whether a byte of an answer had come (the library looks for a closed
connection before each re-use, and resends what it knows was not sent). An answer that comes while the request is still
being written may be lost. A body that ends by closing, over TLS, ends without TLS's own goodbye as well as with it.

One pool per origin, as in `http1`: the library's own limit would be over all origins together.

Closing suspends in the library, so it runs in a task of its own, which the transport owns: a caller that is being
cancelled leaves nothing open. The library's HTTP/1.1 parser (h11) accepts disagreeing framings, and keeps surplus bytes
for the next response on the same connection; both are looked after here.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Literal, cast

import httpx2

from proxy.errors import ConnectFailed, ProxyError, UpstreamBroken, UpstreamTimeout
from proxy.transport.base import Origin, Request
from proxy.transport.connect import trusting_the_system
from proxy.transport.framing import framing, request_head
from proxy.transport.pool import KEEPALIVE, PoolStats
from proxy.types import Headers

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class _Exchange:
    """How far a request got, as the library's trace tells it: an error means something else in each phase."""

    __slots__ = ("phase", "unclaimed")

    def __init__(self) -> None:
        self.phase: Literal["pool", "connect", "sent"] = "pool"
        self.unclaimed: Any = None
        """A TCP stream without a TLS session yet: the library forgets to close it when the handshake is cancelled."""

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith((".connect_tcp.started", ".start_tls.started")):
            self.phase = "connect"
        elif event.endswith(".connect_tcp.complete"):
            self.unclaimed = info["return_value"]
        elif event.endswith(".send_request_headers.started") and info["request"].method != b"CONNECT":
            self.phase = "sent"
            self.unclaimed = None


class HttpxResponse:
    """The port's `Response`."""

    __slots__ = (
        "_closing",
        "_complete",
        "_error",
        "_exchange",
        "_pieces",
        "_stream",
        "_transport",
        "headers",
        "status",
    )

    def __init__(self, transport: HttpxTransport, exchange: _Exchange, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.headers: Headers = [(name.lower(), value) for name, value in response.headers.raw]
        self._transport = transport
        self._exchange = exchange
        self._stream = cast("httpx2.AsyncByteStream", response.stream)
        self._pieces = cast("AsyncGenerator[bytes, None]", aiter(self._stream))
        self._complete = False
        self._error: ProxyError | None = None
        self._closing: asyncio.Task[None] | None = None

    async def read(self, deadline: float) -> bytes:
        if self._error is not None:
            raise self._error
        while not self._complete:
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(self._pieces)
            except StopAsyncIteration:
                self._complete = True
                self._close()
            except (TimeoutError, httpx2.HTTPError) as error:
                self._error = _translated(error, "sent")
                await self.aclose()
                raise self._error from error
            except asyncio.CancelledError:
                self._give_up()
                raise
            else:
                if piece:
                    return piece
        return b""

    async def aclose(self) -> None:
        self._give_up()
        await asyncio.shield(self._close())

    def _give_up(self) -> None:
        if not self._complete and self._error is None:
            self._error = UpstreamBroken("The response was given up before it was complete.", reason="closed")
        self._close()

    def _close(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = self._transport.finish(self._exchange, self._shut())
        return self._closing

    async def _shut(self) -> None:
        _forbid_reuse_with_surplus(self._stream)
        for close in (self._pieces.aclose, self._stream.aclose):
            try:
                await close()
            except (httpx2.HTTPError, OSError, RuntimeError):
                pass  # broken before, or (RuntimeError) another task is still reading and now meets a closed socket


class HttpxTransport:
    """The port's `Transport`.

    `max_connections`: per origin. `connect_timeout`: seconds, for TCP and for TLS each. `keepalive`: seconds that an
    idle connection is kept. `http2`: offered in the TLS handshake, HTTP/1.1 remains possible. `egress_proxy`: URL of an
    HTTP proxy, with credentials if it wants them; nothing is taken from the environment. `ssl_context`: None means the
    operating system's trust store; its ALPN protocols are set by the library.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        connect_timeout: float,
        keepalive: float = KEEPALIVE,
        http2: bool = False,
        egress_proxy: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._limits = httpx2.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=keepalive
        )
        self._timeout = {"connect": connect_timeout, "read": None, "write": None, "pool": None}
        self._http2 = http2
        self._egress_proxy = egress_proxy
        self._ssl_context = ssl_context
        self._pools: dict[tuple[str, str, int], httpx2.AsyncHTTPTransport] = {}
        self._exchanges: set[_Exchange] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def send(self, request: Request, deadline: float) -> HttpxResponse:
        """See the port. Raises ValueError for a request that cannot be written as one (control characters)."""
        request_head(request, b"")  # the same verdict as the other transport's
        origin = request.origin
        pool = self._pools.get((origin.scheme, origin.host, origin.port)) or self._open_pool(origin)
        exchange = _Exchange()
        self._exchanges.add(exchange)
        try:
            async with asyncio.timeout_at(deadline):
                answer = await pool.handle_async_request(self._outgoing(request, exchange))
        except (TimeoutError, httpx2.HTTPError) as error:
            self._failed(exchange)
            raise _translated(error, exchange.phase) from error
        except BaseException:  # cancelled
            self._failed(exchange)
            raise
        response = HttpxResponse(self, exchange, answer)
        if not _acceptable(response, answer.http_version, request.method):
            await response.aclose()
            raise UpstreamBroken("The upstream's answer is not valid HTTP.", reason="protocol")
        return response

    async def aclose(self) -> None:
        self._closed = True
        for pool in self._pools.values():
            await pool.aclose()
        if self._closing:
            await asyncio.wait(self._closing)

    def stats(self) -> PoolStats:
        """Of all origins together. The library does not tell how many connections are idle: always 0."""
        waiting = sum(exchange.phase == "pool" for exchange in self._exchanges)
        return PoolStats(in_use=len(self._exchanges) - waiting, idle=0, waiting=waiting)

    def finish(self, exchange: _Exchange, closing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `closing` to its end, whatever becomes of the task that asked for it."""

        def done(task: asyncio.Task[None]) -> None:
            self._closing.discard(task)
            self._exchanges.discard(exchange)

        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(done)
        return task

    def _failed(self, exchange: _Exchange) -> None:
        """After a failed `send` the library has given back what it held, or nearly so."""
        if exchange.unclaimed is None:
            self._exchanges.discard(exchange)
        else:
            self.finish(exchange, exchange.unclaimed.aclose())

    def _open_pool(self, origin: Origin) -> httpx2.AsyncHTTPTransport:
        if self._closed:
            raise ConnectFailed("The transport is closed.", reason="pool")
        self._ssl_context = tls = self._ssl_context or trusting_the_system()
        proxy = None
        if self._egress_proxy is not None:
            over_tls = self._egress_proxy.startswith("https:")
            proxy = httpx2.Proxy(self._egress_proxy, ssl_context=tls if over_tls else None)
        pool = httpx2.AsyncHTTPTransport(
            verify=tls, trust_env=False, http1=True, http2=self._http2, limits=self._limits, proxy=proxy
        )
        self._pools[origin.scheme, origin.host, origin.port] = pool
        return pool

    def _outgoing(self, request: Request, exchange: _Exchange) -> httpx2.Request:
        origin = request.origin
        return httpx2.Request(
            request.method.decode("ascii"),
            httpx2.URL(scheme=origin.scheme, host=origin.host, port=origin.port),
            headers=request.headers,
            content=request.body,
            # The target as it is: a URL object would rewrite its percent-encoding.
            extensions={"target": request.target, "timeout": self._timeout, "trace": exchange.trace},
        )


def _acceptable(response: HttpxResponse, version: str, method: bytes) -> bool:
    if response.status < 200:
        return False  # 101: the library hands out the bare connection
    if any(_CONTROL.search(value) for _, value in response.headers):
        return False  # the library lets them by, and a strict client would choke on our answer
    kind = framing(response.status, response.headers, head_only=method == b"HEAD")
    return kind is not None and not (kind == "chunked" and version != "HTTP/1.1")


def _forbid_reuse_with_surplus(stream: Any) -> None:
    """Closes an HTTP/1.1 connection, once its response is closed, if bytes are left over after that response.

    The library would take them for the beginning of the next response. It has no public word for this; should its
    insides change, this raises, and the conformance suite with it.
    """
    connection = stream._httpcore_stream._stream._connection
    state = getattr(connection, "_h11_state", None)
    if state is None:
        assert hasattr(connection, "_h2_state"), "neither HTTP/1.1 nor HTTP/2"
    elif state.trailing_data[0]:
        state.send_failed()


def _translated(error: Exception, phase: str) -> ProxyError:
    match error:
        case httpx2.ConnectTimeout():
            return ConnectFailed("The upstream did not accept the connection in time.", reason="timeout")
        case httpx2.ConnectError() | httpx2.ProxyError():
            return ConnectFailed("The upstream could not be reached.", reason=_reason(error))
        case TimeoutError() if phase == "pool":
            return ConnectFailed("No connection to the upstream came free in time.", reason="pool")
        case TimeoutError() if phase == "connect":
            return ConnectFailed("The upstream did not accept the connection in time.", reason="timeout")
        case TimeoutError():
            return UpstreamTimeout("The upstream sent nothing in time.")
        case httpx2.RemoteProtocolError():
            return UpstreamBroken("The upstream's answer is incomplete or not valid HTTP.", reason="protocol")
        case _ if phase == "sent":
            return UpstreamBroken("The connection to the upstream broke.", reason="reset")
    return ConnectFailed("The upstream could not be reached.", reason="network")


def _reason(error: BaseException) -> str:
    """The word for a failed connection, from what lies beneath the library's error."""
    todo: list[BaseException | None] = [error]
    while todo:
        cause = todo.pop()
        match cause:
            case None:
                continue
            case socket.gaierror():
                return "dns"
            case ssl.SSLError():
                return "tls"
            case ConnectionRefusedError():
                return "refused"
            case BaseExceptionGroup():
                todo.extend(cause.exceptions)
        todo.append(cause.__cause__ or cause.__context__)
    return "network"
