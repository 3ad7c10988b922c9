"""Objects that providers keep, as requests name them: by the path, by members of the body, by items of the input. Pure.

Ids are told apart by nothing: what a client calls a response and what it calls a conversation is looked up in the same
way, for what counts is whose it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import orjson

from proxy.errors import InvalidRequest, NotFound
from proxy.types import Objects

References = tuple[tuple[str, str], ...]
"""As `Objects.refers`."""

RESPONSES: Final = "/v1/responses/"
CONVERSATIONS: Final = "/v1/conversations"
_PARTS: Final = {"": ("GET", "HEAD", "DELETE"), "cancel": ("POST",), "input_items": ("GET", "HEAD")}
"""Of a stored response: what can be asked of it, and how."""
_CONVERSATION_BYTES: Final = 4096


def unknown(param: str) -> NotFound:
    """One answer for an object that does not exist, for another tenant's, and for one of before our time."""
    if not param:
        return NotFound("There is no such stored object.", code="unsupported_route")
    return NotFound(
        f"'{param}' names an object that this gateway does not know to be yours.", code="unsupported_route", param=param
    )


def of_response(method: str, path: str) -> Objects | None:
    """What a request below `/v1/responses/` refers to; None where it is nothing that stored responses have."""
    object_id, _, part = path[len(RESPONSES) :].partition("/")
    if not object_id or method not in _PARTS.get(part, ()):
        return None
    return Objects((("", object_id),), free=True)


def of_conversation(method: str, path: str) -> Objects | None:
    """The same for `/v1/conversations` and what is below; None for any other path."""
    if path == CONVERSATIONS:
        return Objects(makes=True, free=True) if method == "POST" else None
    if not path.startswith(CONVERSATIONS + "/"):
        return None
    return Objects((("", path[len(CONVERSATIONS) + 1 :].partition("/")[0]),), free=True)


def references(fields: Mapping[str, msgspec.Raw]) -> References:
    """The objects that the members `previous_response_id` and `conversation` name. Raises InvalidRequest."""
    found = []
    if "previous_response_id" in fields:
        previous = member(fields, "previous_response_id")
        if previous is not None:
            found.append(("previous_response_id", _text(previous, "previous_response_id")))
    if "conversation" in fields:
        conversation = member(fields, "conversation")
        if isinstance(conversation, dict):
            conversation = _id_in(fields["conversation"])
        if conversation is not None:
            found.append(("conversation", _text(conversation, "conversation")))
    return tuple(found)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"'{name}' must be an id.", param=name)
    return value


def _id_in(raw: msgspec.Raw) -> Any:
    """The `id` of an object that travels as it was written: twice in it, it could be read as either."""
    text = bytes(raw)
    pairs = json.loads(text, object_pairs_hook=list) if len(text) <= _CONVERSATION_BYTES else []
    ids = [value for name, value in pairs if name == "id"]
    if len(ids) != 1:
        raise InvalidRequest("'conversation' must be an id, or an object with one 'id'.", param="conversation")
    return ids[0]


def refers_to_items(fields: Mapping[str, msgspec.Raw], name: str) -> bool:
    """Whether a list of items holds a reference to a stored one, whose owner nobody knows."""
    raw = fields.get(name)
    if raw is None or bytes(memoryview(raw)[:1]) != b"[":
        return False
    return any(isinstance(item, dict) and _is_reference(item) for item in member(fields, name))


def _is_reference(item: dict[str, Any]) -> bool:
    kind = item.get("type")
    # A reference may leave out its type. So may a message, which has content.
    return kind == "item_reference" or (kind is None and "id" in item and "content" not in item)


def member(fields: Mapping[str, msgspec.Raw], name: str) -> Any:
    """One top-level member, parsed strictly. None when absent or null. Raises InvalidRequest naming it."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return orjson.loads(memoryview(raw))
    except orjson.JSONDecodeError:
        raise InvalidRequest(f"'{name}' holds a value that JSON does not allow.", param=name) from None
