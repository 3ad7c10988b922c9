"""Opening a connection: resolve the name, try its addresses, do the TLS handshake; say in one word what went wrong.

The event loop's own `create_connection` reports several refused addresses as one error without an errno, and one
address that swallows packets costs it the whole time allowed. So the addresses are tried here, in the resolver's
order, each with its share of what is left; the TLS handshake then has all that remains.

Names are resolved in a few threads that all of the process shares, and nothing stops one that hangs. So of each name
there is one question at a time, whoever waits for it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from proxy.errors import ConnectFailed
from proxy.transport.base import Origin

_MESSAGES = {
    "dns": "The upstream's host name could not be resolved.",
    "refused": "The upstream refused the connection.",
    "tls": "The TLS handshake with the upstream failed.",
    "timeout": "The upstream did not accept the connection in time.",
    "network": "The upstream could not be reached.",
}

_Address = tuple[Any, ...]


class Names:
    """Questions to the resolver that are under way. `resolve`: the event loop's own `getaddrinfo` if it is None."""

    __slots__ = ("_asked", "_resolve")

    def __init__(self, resolve: Callable[..., Awaitable[list[_Address]]] | None = None) -> None:
        self._resolve = resolve
        self._asked: dict[tuple[str, int], asyncio.Task[list[_Address]]] = {}

    async def addresses(self, host: str, port: int) -> list[_Address]:
        """Raises OSError. A caller that is cancelled leaves the question to the others, and to those who come later."""
        place = (host, port)
        asked = self._asked.get(place)
        if asked is None:
            asked = self._asked[place] = asyncio.get_running_loop().create_task(self._ask(host, port))
            asked.add_done_callback(partial(self._answered, place))
        return await asyncio.shield(asked)

    def close(self) -> None:
        for asked in self._asked.values():
            asked.cancel()

    async def _ask(self, host: str, port: int) -> list[_Address]:
        resolve = self._resolve or asyncio.get_running_loop().getaddrinfo
        return await resolve(host, port, type=socket.SOCK_STREAM)

    def _answered(self, place: tuple[str, int], asked: asyncio.Task[list[_Address]]) -> None:
        del self._asked[place]
        if not asked.cancelled():
            asked.exception()  # seen, also where nobody waits any more


async def open_connection(
    protocol: asyncio.Protocol, origin: Origin, tls: ssl.SSLContext | None, deadline: float, names: Names
) -> asyncio.Transport:
    """Connects `protocol` to `origin`; its `connection_made` has been called when this returns.

    `deadline` is on the loop's clock and bounds everything: name, TCP, TLS. Raises ConnectFailed (dns, refused, tls,
    timeout, network). On any error, also on cancellation, the socket is closed.
    """
    loop = asyncio.get_running_loop()
    stage = "dns"
    try:
        async with asyncio.timeout_at(deadline):
            addresses = await names.addresses(_ascii(origin.host), origin.port)
            stage = "network"
            sock = await first_to_answer(loop, addresses, deadline)
            stage = "tls" if tls is not None else "network"
            return await _start(loop, lambda: protocol, sock, tls, _ascii(origin.host))
    except TimeoutError as error:
        raise _failed("timeout") from error
    except (OSError, UnicodeError) as error:
        raise _failed(_reason(error, stage)) from error


def trusting_the_system() -> ssl.SSLContext:
    """Certificates and host names checked, against the operating system's trust store. Reading it takes about 25 ms."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def first_to_answer(loop: asyncio.AbstractEventLoop, addresses: list[_Address], deadline: float) -> socket.socket:
    """A connected socket of the first address that accepts. Raises the last address's OSError when none does."""
    failure: OSError = OSError()
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            share = (deadline - loop.time()) / (len(addresses) - tried)
            async with asyncio.timeout(share):
                await loop.sock_connect(sock, address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:  # cancelled: the socket has no owner yet but us
            sock.close()
            raise
    raise failure


async def _start(
    loop: asyncio.AbstractEventLoop,
    factory: Callable[[], asyncio.Protocol],
    sock: socket.socket,
    tls: ssl.SSLContext | None,
    host: str,
) -> asyncio.Transport:
    try:
        transport, _ = await loop.create_connection(
            factory, sock=sock, ssl=tls, server_hostname=host if tls is not None else None
        )
    except BaseException:  # cancelled or failed: harmless where the loop has closed it already
        sock.close()
        raise
    return transport


def _ascii(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _reason(error: Exception, stage: str) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "dns"
    if isinstance(error, ssl.SSLError) or stage == "tls":
        return "tls"
    return "refused" if isinstance(error, ConnectionRefusedError) else stage


def _failed(reason: str) -> ConnectFailed:
    return ConnectFailed(_MESSAGES[reason], reason=reason)
