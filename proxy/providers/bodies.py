"""What a plain reply says, beyond what the client asked for: usage, and errors in the clothes of a success. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from proxy.errors import UpstreamBroken
from proxy.providers.refusals import error_in, fault_in
from proxy.providers.reshape import chat_to_stream, lenient, response_to_stream
from proxy.providers.streams import NO_ERROR
from proxy.tokens.usage import usage_of
from proxy.types import Ask, Usage

_ABSENT: Final = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT


_body = msgspec.json.Decoder(_Body).decode


def usage_in(body: bytes) -> Usage | None:
    """The usage of a plain reply. Raises UpstreamBroken when it is no JSON object, and what `fault_in` makes
    of an error in the clothes of a success (some routers answer 200 once the model has started)."""
    try:
        reply = lenient(_body, body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UpstreamBroken("The provider's reply is not a JSON object.", reason="protocol") from error
    if reply.error is not _ABSENT and bytes(reply.error) not in NO_ERROR and _is_bare_error(body):
        raise fault_in("The provider answered 200 with an error.", error_in(body))
    return None if reply.usage is _ABSENT else usage_of(reply.usage)


def usage_told(body: bytes) -> Usage | None:
    """The usage that a JSON text of any kind states at its top level; None if it states none. Never raises."""
    try:
        reply = lenient(_body, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if reply.usage is _ABSENT else usage_of(reply.usage)


def _is_bare_error(body: bytes) -> bool:
    try:
        reply = lenient(msgspec.json.decode, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True  # no client could read it either
    return not any(reply.get(member) for member in ("choices", "data", "output", "object"))


def as_stream(ask: Ask, body: bytes) -> bytes:
    """A whole reply as the event stream that was asked for. Raises UpstreamBroken."""
    try:
        if ask.dialect == "responses":
            return response_to_stream(body)
        return chat_to_stream(body, with_usage=ask.wants_usage)
    except ValueError as error:
        raise UpstreamBroken(
            "The provider answered a stream with a body of another kind.", reason="protocol"
        ) from error
