"""What an application may know of, and do to, the connection that its request came by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal, Protocol

from proxy.types import Headers

LostReason = Literal["gone", "too_large", "body_timeout", "malformed"]
"""Why a running request has no client any more: it left; or the guard refused the rest of its body, and has answered
with 413, 408 or 400 as far as an answer was still possible."""
OnLost = Callable[[LostReason], None]


class Response(Protocol):
    def take(self) -> bytes | None: ...

    def push(self, data: bytes) -> bool: ...

    def respond(self, status: int, headers: Headers, body: bytes) -> bool: ...


class Connection:
    """Found in `scope["extensions"]["breakwater"]`: one object per connection, always about its running request."""

    __slots__ = ("_callbacks", "_reason", "_response", "_transport", "push")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._callbacks: list[OnLost] = []
        self._reason: LostReason | None = None
        self._response: Response | None = None
        self.push: Callable[[bytes], bool] = _not_now
        """Writes a piece of the running response's body at once. False: not possible now, `send` is the way.

        What a streamed chunk costs is paid thousands of times a second; this is ASGI's `send` without its message.
        """

    def on_lost(self, callback: OnLost) -> None:
        """Calls back, synchronously and once, when the running request loses its client; at once if it already has.

        A client that leaves after the end of the response is not news, and not told.
        """
        if self._reason is not None:
            callback(self._reason)
        else:
            self._callbacks.append(callback)

    def off_lost(self, callback: OnLost) -> None:
        """Forgets the callback. Idempotent."""
        try:
            self._callbacks.remove(callback)
        except ValueError:
            pass

    def abort(self) -> None:
        """Cuts the connection, for a body that cannot be completed: a clean end would look like success."""
        self._transport.abort()

    def take(self) -> bytes | None:
        """The whole body of the running request, if it is there. None: ASGI's `receive` is the way to it."""
        return None if self._response is None else self._response.take()

    def respond(self, status: int, headers: Headers, body: bytes) -> bool:
        """Writes a whole response at once, its length among the headers. False: not possible now, `send` is the way."""
        return self._response is not None and self._response.respond(status, headers, body)

    # The server's side

    def next_request(self, response: Response) -> None:
        """Callbacks that the last request left behind are not about this one."""
        self._response = response
        self.push = response.push
        if self._callbacks:
            self._callbacks = []

    def lose(self, reason: LostReason) -> None:
        """The first reason counts; the connection serves no request after it."""
        if self._reason is None:
            self._reason = reason
        self._response = None
        self.push = _not_now
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(reason)


def _not_now(data: bytes) -> bool:
    return False
