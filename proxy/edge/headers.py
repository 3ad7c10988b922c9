"""Names that a request gets: its id and its place in a trace. Pure, but for the random source given to it."""

from __future__ import annotations

import re
from collections.abc import Callable

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NO_TRACE = b"0" * 32
_NO_SPAN = b"0" * 16


def request_id(sent: bytes | None, random: Callable[[int], bytes]) -> str:
    """The client's own id if it is harmless, else a new one. `random(n)` gives n bytes."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent.decode()
    return "req_" + random(12).hex()


def traceparent(sent: bytes | None, random: Callable[[int], bytes]) -> str:
    """W3C trace context: the client's trace continued by a span of ours, or a new, sampled one."""
    match = _TRACEPARENT.fullmatch(sent) if sent is not None else None
    if match is None or match[1] == _NO_TRACE or match[2] == _NO_SPAN:
        fresh = random(24).hex()
        return f"00-{fresh[:32]}-{fresh[32:]}-01"
    return f"00-{match[1].decode()}-{random(8).hex()}-{match[3].decode()}"
