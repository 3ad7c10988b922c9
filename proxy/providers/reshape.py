"""Bodies that must change their shape between provider and client, and those that must not be taken for another. Pure.

Three cases, each met in the field: a server that ignores `encoding_format: base64`, and the JavaScript SDK then decodes
its floats into an empty vector without a word; a server that answers `stream: true` with one JSON body, which every SDK
reads as a stream without chunks; and our own wish for usage in a stream, of which the client must see nothing.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, TypeVar

import msgspec
import orjson

_encode = msgspec.json.Encoder().encode
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')
_CANDIDATES = 16
"""Each costs a copy of the event, so a hostile one must not hold any number of them."""
_FLOATS = re.compile(rb'"embedding"\s*:\s*\[')
_NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null|"usage"\s*:\s*null\s*,\s*')


class _Usage(msgspec.Struct):
    usage: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_usage = msgspec.json.Decoder(_Usage).decode
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_T = TypeVar("_T")


def lenient(decode: Callable[[bytes], _T], data: bytes) -> _T:
    """`decode(data)`, for a provider's JSON. Raises msgspec.DecodeError.

    Half a surrogate pair, escaped, is within JSON's grammar, and servers that cut a text in the middle of an emoji send
    it; clients read it, msgspec does not. For our own reading a replacement character does as well.
    """
    try:
        return decode(data)
    except msgspec.DecodeError:
        if not _SURROGATE.search(data):
            raise
        return decode(_SURROGATE.sub(rb"\\ufffd", data))


def edited(
    fields: Mapping[str, msgspec.Raw], *, model: str, with_usage: bool, cap: tuple[str, int] | None = None
) -> bytes:
    """The client's body with another `model`, with usage asked for, and with a maximum of output (member, tokens).

    Every other member stays byte for byte."""
    changed = dict(fields)
    changed["model"] = msgspec.Raw(_encode(model))
    if with_usage:
        changed["stream_options"] = _with_usage(fields.get("stream_options"))
    if cap is not None:
        changed[cap[0]] = msgspec.Raw(b"%d" % cap[1])
    return _encode(changed)


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    known = orjson.loads(memoryview(options)) if options is not None else None
    if not known:
        return _INCLUDE_USAGE
    return msgspec.Raw(_encode({**known, "include_usage": True}))


def without_null_usage(payload: bytes) -> bytes:
    """A chunk's JSON without its top-level `"usage":null`, otherwise untouched. It must have one."""
    if payload.endswith(b',"usage":null}'):
        return payload[:-14] + b"}"
    for match in islice(_NULL_USAGE.finditer(payload), _CANDIDATES):
        candidate = payload[: match.start()] + payload[match.end() :]
        if lenient(_usage, candidate).usage is msgspec.UNSET:
            return candidate
    return payload


def floats_to_base64(body: bytes) -> bytes:
    """An embeddings reply with its float lists packed as little-endian float32 in base64, as the client asked.

    Vectors that are no lists of numbers, or hold one beyond float32, stay; so does a body that cannot be read.
    """
    if not _FLOATS.search(body):
        return body
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    data = reply.get("data") if isinstance(reply, dict) else None
    changed = False
    for entry in data if isinstance(data, list) else ():
        vector = entry.get("embedding") if isinstance(entry, dict) else None
        if isinstance(vector, list):
            try:
                packed = struct.pack(f"<{len(vector)}f", *vector)
            except (struct.error, OverflowError):
                continue
            entry["embedding"] = base64.b64encode(packed).decode()
            changed = True
    return orjson.dumps(reply) if changed else body


def chat_to_stream(body: bytes, *, with_usage: bool) -> bytes:
    """A whole chat or legacy completion as the event stream that the client asked for, with its terminator.

    Raises ValueError when the body is no completion.
    """
    reply = orjson.loads(body)
    if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
        raise ValueError("no completion")
    usage = reply.pop("usage", None)
    if reply.get("object") == "chat.completion":
        reply["object"] = "chat.completion.chunk"
    reply["choices"] = [_as_delta(choice) for choice in reply["choices"]]
    lines = [reply]
    if with_usage and usage is not None:
        lines.append({**reply, "choices": [], "usage": usage})
    return b"".join(b"data: " + orjson.dumps(line) + b"\n\n" for line in lines) + b"data: [DONE]\n\n"


def _as_delta(choice: Any) -> Any:
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        return choice
    delta = dict(choice["message"])
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [
            {"index": index, **call} if isinstance(call, dict) else call for index, call in enumerate(calls)
        ]
    return {**{key: value for key, value in choice.items() if key != "message"}, "delta": delta}


def response_to_stream(body: bytes) -> bytes:
    """A whole response as an event stream of its first and its last event. Raises ValueError when it is none."""
    reply = orjson.loads(body)
    status = reply.get("status") if isinstance(reply, dict) else None
    if status not in ("completed", "incomplete", "failed"):
        raise ValueError("no response that is over")
    events = (("response.created", {**reply, "status": "in_progress"}), (f"response.{status}", reply))
    return b"".join(
        b"event: %s\ndata: %s\n\n"
        % (name.encode(), orjson.dumps({"type": name, "sequence_number": number, "response": response}))
        for number, (name, response) in enumerate(events)
    )
