"""An answer as the bytes of HTTP/1.1, encoded once and kept with the answer."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from proxy.transport.answer import Answer, End

_BODILESS: Final = (204, 304)


class Wire:
    """The head but for the request id, and the steps in their framing."""

    __slots__ = ("delays", "head", "paced", "steps", "tail", "whole")

    def __init__(self, answer: Answer, *, framed: bool, bodiless: bool = False) -> None:
        """`framed` False: an HTTP/1.0 client, for whom the close of the connection ends the body.

        `bodiless`: the answer to a HEAD, which declares what it does not send.
        """
        chunked = answer.length is None and framed and answer.status not in _BODILESS
        head = [b"HTTP/1.1 %d %s" % (answer.status, _reason(answer.status))]
        head += [name + b": " + value for name, value in answer.headers]
        if chunked:
            head.append(b"transfer-encoding: chunked")
        elif answer.length is not None and answer.status not in _BODILESS:
            head.append(b"content-length: %d" % answer.length)
        self.head = b"\r\n".join(head) + b"\r\n"
        sent = () if bodiless else answer.steps
        self.steps: Sequence[bytes] = [b"%x\r\n%b\r\n" % (len(data), data) if chunked else data for _, data in sent]
        self.delays = [delay for delay, _ in sent]
        self.tail = b"0\r\n\r\n" if chunked and not bodiless and answer.end is End.COMPLETE else b""
        self.paced = any(self.delays)
        self.whole = b"" if self.paced else b"".join(self.steps) + self.tail


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Unknown"
