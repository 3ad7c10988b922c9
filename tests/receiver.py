"""The client's end of an answer, without a network: what the program sent."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson

from proxy.edge.answer import Answer
from proxy.edge.connection import Connection


class Receiver:
    """`answer` is the program's own way out; what it sends is kept here."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.ended = False
        self.was_read = False
        """The program wanted the body of the request."""
        self.answer = Answer(
            self._take,
            Connection(asyncio.Transport()),
            request_id="req_1",
            traceparent="00-trace-span-01",
            trailer=False,
            clock=time.monotonic,
            silence=60.0,
        )

    async def _take(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        else:
            self.body += message["body"]
            self.ended = not message["more_body"]

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)
