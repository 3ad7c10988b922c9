"""Finding the server that may be written to (sentinels, the owner of a cluster's slot), and being let in."""

from __future__ import annotations

import asyncio
import binascii
import socket
from collections.abc import Sequence
from typing import Any, Final

from proxy.store.address import Address, Credentials, Host
from proxy.store.base import StoreUnavailable
from proxy.store.connection import Command, Connection, Fault

SLOTS: Final = 16_384


def slot_of(tag: bytes) -> int:
    """The cluster slot of all keys with this text between their first braces (CRC-16/XMODEM)."""
    return binascii.crc_hqx(tag, 0) % SLOTS


class _Asked:
    """The owner of a connection that is being set up: an answer goes to whoever waits for it, faults included."""

    def answered(self, connection: Connection, command: Command, answer: Any) -> None:
        if not command.answer.done():
            command.answer.set_result(answer)

    def broken(self, connection: Connection, unanswered: Sequence[Command], *, late: bool) -> None:
        for command in unanswered:
            if not command.answer.done():
                command.answer.set_exception(StoreUnavailable("connect"))


class Dialer:
    """Opens connections to one address, for keys that have `tag` between their braces.

    `setup`: seconds that a connection may take altogether, discovery and TLS included.
    """

    def __init__(self, address: Address, *, tag: bytes, setup: float) -> None:
        self._address = address
        self._slot = slot_of(tag)
        self._setup = setup
        self._slot_owner: Host | None = None
        self._members: tuple[Host, ...] = ()

    def moved(self, target: str, asked: Host) -> None:
        """Notes where our slot went (`host:port`; no host is the one asked): the next connection goes there."""
        host, _, port = target.rpartition(":")
        self._slot_owner = (host or asked[0], int(port)) if port.isascii() and port.isdigit() else None

    async def connect(self) -> tuple[Connection, Host]:
        """A connection that is ready for commands, and where it leads. Raises StoreUnavailable(connect, refused)."""
        try:
            async with asyncio.timeout(self._setup):
                if self._address.topology == "standalone":
                    return await self.open(self._address.hosts[0]), self._address.hosts[0]
                return await self._discover()
        except TimeoutError as error:
            raise StoreUnavailable("connect") from error

    async def open(self, host: Host) -> Connection:
        """A connection to this very server."""
        address = self._address
        connection = await self._plain(host, address.credentials)
        if address.db and isinstance(await _ask(connection, b"SELECT", address.db), Fault):
            connection.abort()
            raise StoreUnavailable("refused")
        return connection

    async def _plain(self, host: Host, credentials: Credentials) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            transport, connection = await loop.create_connection(
                lambda: Connection(_Asked(), loop, self._setup), host[0], host[1], ssl=self._address.tls
            )
        except OSError as error:  # refused, unreachable, no such name, or TLS that failed
            raise StoreUnavailable("connect") from error
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if credentials.password:
            words = (credentials.username, credentials.password) if credentials.username else (credentials.password,)
            if isinstance(await _ask(connection, b"AUTH", *words), Fault):
                connection.abort()
                raise StoreUnavailable("refused")
        return connection

    async def _discover(self) -> tuple[Connection, Host]:
        """Asks one after the other until one leads to a server that answers."""
        cluster = self._address.topology == "cluster"
        if self._slot_owner is not None:
            host, self._slot_owner = self._slot_owner, None
            try:
                found = await self.open(host), host
            except StoreUnavailable:
                pass  # it is gone: whoever took over is found like the first one
            else:
                self._slot_owner = host
                return found
        failure = StoreUnavailable("connect")
        for host in dict.fromkeys((*self._address.hosts, *self._members)):
            try:
                return await (self._by_member(host) if cluster else self._by_sentinel(host))
            except StoreUnavailable as error:
                failure = error
        raise failure

    async def _by_sentinel(self, sentinel: Host) -> tuple[Connection, Host]:
        connection = await self._plain(sentinel, self._address.sentinel_credentials)
        try:
            answer = await _ask(connection, b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._address.service)
        finally:
            connection.abort()
        if not isinstance(answer, list) or len(answer) != 2:
            raise StoreUnavailable("refused")
        master = answer[0].decode(), int(answer[1])
        connection = await self.open(master)
        role = await _ask(connection, b"ROLE")
        if isinstance(role, list) and role[0] != b"master":
            connection.abort()  # the sentinels have not heard yet, and what we wrote here would be lost
            raise StoreUnavailable("refused")
        return connection, master

    async def _by_member(self, member: Host) -> tuple[Connection, Host]:
        connection = await self.open(member)
        ranges = await _ask(connection, b"CLUSTER", b"SLOTS")
        if not isinstance(ranges, list):
            connection.abort()
            raise StoreUnavailable("refused")
        masters = [(first, last, _node(nodes[0], member)) for first, last, *nodes in ranges]
        self._members = tuple(dict.fromkeys(master for _, _, master in masters))
        for first, last, master in masters:
            if first <= self._slot <= last:
                self._slot_owner = master
                if master == member:
                    return connection, master
                connection.abort()
                return await self.open(master), master
        connection.abort()
        raise StoreUnavailable("refused")


async def _ask(connection: Connection, *words: bytes | str | int) -> Any:
    """What the server answers; a Fault is returned, not raised."""
    loop = asyncio.get_running_loop()
    command = Command(words, loop.create_future(), loop.time())
    try:
        connection.send([command])
        return await command.answer
    except BaseException:
        connection.abort()
        raise


def _node(node: list[Any], asked: Host) -> Host:
    """A node of CLUSTER SLOTS; a server that does not know its own name leaves it empty."""
    host = (node[0] or b"").decode()
    return host if host and host != "?" else asked[0], int(node[1])
