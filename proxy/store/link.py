"""The way to the server, as one line: batches out, answers in, redirections followed, failures bounded.

What one turn of the event loop asks for leaves in one write: the first command of a turn calls for a flush, which runs
when everything that was ready has run. Batches do not wait for one another; the connection is a pipeline.

Bounds. A command waits `timeout` and no longer, whether for a connection or for its answer. It is tried a second time,
within the same time, if its connection broke under it: every command here may be repeated. After five failures in a
row (connections that broke, or on which nothing came in time) the circuit opens and the answer is immediate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from proxy.store.address import Host
from proxy.store.base import Reason, StoreUnavailable
from proxy.store.circuit import Circuit
from proxy.store.connection import Command, Connection, Fault, Words, pack
from proxy.store.dial import Dialer

MAX_WAITING: Final = 20_000
REDIRECTIONS: Final = 4

_OURS: Final[Mapping[str, Reason]] = {
    "OOM": "full",
    "WRONGTYPE": "corrupt",
    "ERR": "corrupt",
    "TRYAGAIN": "moving",
    "ASK": "moving",
}
"""Answers to one command that say nothing against the server: others go on.

ASK (a slot is on its way, try over there) is not followed, on purpose: over there, a key that has not arrived yet looks
like one that never was, and a scope would begin anew at nothing spent. For that moment the store is away.
"""

StateListener = Callable[[bool, Reason | None], None]
"""Told when the circuit opens (False and why) and closes (True): once for each change."""


class Link:
    """Commands to one server. `texts`: of scripts, by their digest, for a server that does not know them.

    `timeout`: seconds that a command may take. `listener` is called within the event loop and must not block.
    """

    def __init__(
        self, dialer: Dialer, *, timeout: float, texts: Mapping[bytes, bytes], listener: StateListener | None = None
    ) -> None:
        self._dialer = dialer
        self._timeout = timeout
        self._texts = texts
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._circuit = Circuit()
        self._connection: Connection | None = None
        self._host: Host = ("", 0)
        self._connecting: asyncio.Task[None] | None = None
        self._queue: list[Command] = []
        self._flushes = False
        self._queue_timer: asyncio.TimerHandle | None = None
        self._open: set[Connection] = set()
        self._closed = False

    def submit(self, words: Words) -> asyncio.Future[Any]:
        """The answer to come. Raises StoreUnavailable at once where there is no point in waiting."""
        now = self._loop.time()
        if self._closed:
            raise StoreUnavailable("stopped")
        if not self._circuit.allows(now):
            raise StoreUnavailable("open")
        waiting = self._connection.waiting if self._connection is not None else 0
        if len(self._queue) + waiting >= MAX_WAITING:
            raise StoreUnavailable("overloaded")
        answer = self._loop.create_future()
        self._queue.append(Command(words, answer, now))
        self._call_for_flush()
        return answer

    async def aclose(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        for connection in list(self._open):
            connection.abort()
        queue, self._queue = self._queue, []
        self._fail(queue, "stopped")
        if self._queue_timer is not None:
            self._queue_timer.cancel()

    # -- out ---------------------------------------------------------------------------------------------------------

    def _call_for_flush(self) -> None:
        if not self._flushes:
            self._flushes = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushes = False
        if not self._queue:
            return
        if self._connection is None:
            if self._connecting is None:
                self._connecting = self._loop.create_task(self._connect())
            self._watch_queue()
            return
        queue, self._queue = self._queue, []
        commands = [command for command in queue if not command.answer.done()]  # the others were cancelled
        if commands:
            self._connection.send(commands)

    async def _connect(self) -> None:
        try:
            connection, self._host = await self._dialer.connect()
        except StoreUnavailable as error:
            self._connecting = None
            queue, self._queue = self._queue, []
            self._failure(error.reason)
            self._fail(queue, error.reason)
            return
        self._connecting = None
        if not connection.over:
            connection.owner = self
            connection.timeout = self._timeout
            self._open.add(connection)
            self._connection = connection
        self._flush()

    def _watch_queue(self) -> None:
        """Nobody waits longer for a connection than for an answer."""
        if self._queue_timer is None:
            self._queue_timer = self._loop.call_at(self._queue[0].since + self._timeout, self._clear_queue)

    def _clear_queue(self) -> None:
        self._queue_timer = None
        due = self._loop.time() - self._timeout
        late = [command for command in self._queue if command.since <= due]
        self._queue = [command for command in self._queue if command.since > due]
        if late:
            self._failure("connect")
            self._fail(late, "connect")
        if self._queue:
            self._watch_queue()

    # -- in ----------------------------------------------------------------------------------------------------------

    def answered(self, connection: Connection, command: Command, answer: Any) -> None:
        if type(answer) is Fault:
            self._fault(connection, command, answer)
            return
        if self._circuit.troubled:
            self._success()
        if not command.answer.done():
            command.answer.set_result(answer)

    def broken(self, connection: Connection, unanswered: Sequence[Command], *, late: bool) -> None:
        self._open.discard(connection)
        if connection is self._connection:
            self._connection = None
        if not unanswered:
            return  # an idle connection may be closed at any time
        if self._closed:
            self._fail(unanswered, "stopped", uncertain=True)
            return
        reason: Reason = "timeout" if late else "closed"
        self._failure(reason)
        again = [] if late else [command for command in unanswered if self._may_try_again(command)]
        self._fail([command for command in unanswered if command not in again], reason, uncertain=True)
        self._queue.extend(again)
        if again:
            self._call_for_flush()

    def _may_try_again(self, command: Command) -> bool:
        command.tries += 1
        due = command.since + self._timeout
        return command.tries == 1 and not self._circuit.is_open and self._loop.time() < due

    def _fault(self, connection: Connection, command: Command, fault: Fault) -> None:
        if fault.code == "NOSCRIPT" and command.words[0] == b"EVALSHA":
            digest, *rest = command.words[1:]
            command.words = (b"EVAL", self._texts[digest], *rest)  # type: ignore[index]  # of EVALSHA: the digest
            command.packed = pack(command.words)
            self._requeue(command)
        elif fault.code == "MOVED":
            self._moved(connection, command, fault)
        elif fault.code in _OURS:
            if self._circuit.troubled:
                self._success()
            self._fail([command], _OURS[fault.code])
        else:
            # Loading, read-only, not let in: another connection may lead elsewhere, this one leads to no answer.
            if self._may_try_again(command):
                self._requeue(command)
            else:
                self._failure("refused")
                self._fail([command], "refused")
            connection.abort()

    def _requeue(self, command: Command) -> None:
        if not command.answer.done():
            self._queue.append(command)
            self._call_for_flush()

    def _moved(self, connection: Connection, command: Command, fault: Fault) -> None:
        """Our slot lives elsewhere from now on."""
        command.tries += 1
        if command.tries > REDIRECTIONS:
            self._fail([command], "refused")
            return
        if connection is self._connection:
            self._dialer.moved(fault.target, self._host)
            connection.abort()  # what else is under way would get the same answer: it is tried over there
        self._requeue(command)

    # -- outcomes ----------------------------------------------------------------------------------------------------

    def _fail(self, commands: Iterable[Command], reason: Reason, *, uncertain: bool = False) -> None:
        for command in commands:
            if not command.answer.done():
                command.answer.set_exception(StoreUnavailable(reason, uncertain=uncertain))

    def _failure(self, reason: Reason) -> None:
        if self._circuit.failed(self._loop.time()) and self._listener is not None:
            self._listener(False, reason)

    def _success(self) -> None:
        if self._circuit.succeeded() and self._listener is not None:
            self._listener(True, None)
