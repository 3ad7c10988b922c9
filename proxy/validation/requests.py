"""From a call to an ask: which route it is, and whether its body can be served at all. Pure.

The body is decoded once, as `dict[str, msgspec.Raw]`: the top level becomes canonical (one value a key), everything
below stays the client's own bytes, to be forwarded as they came. Only members that we act on are read further, and
those are read strictly; all others travel unread, so that what a provider learns tomorrow passes today.

Two parsers that disagree about one body are a way to smuggle. Hence: the body is valid UTF-8 from end to end, a
top-level key stands once, and what we read is exactly what the provider will read.

No message quotes a path or an unknown key: credentials end up in both, and messages in other people's logs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from proxy.errors import InvalidRequest, MethodNotAllowed, NotFound
from proxy.globs import matches
from proxy.types import Ask, Call, Dialect, Tenant

MAX_MODEL_CHARS = 256
MAX_CHOICES = 128
MAX_TOKENS = 2**31 - 1
MAX_MEMBERS = 1024
"""At the top level of a body. The known ones are some sixty."""
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_JSON_ROUTES: dict[str, Dialect] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
}
_RESPONSES_TOOLS_WITHOUT_EFFECT = ("function", "custom")
_UNSAFE_PATH = re.compile(rb"%(?:2e|2f|5c|00|25|0[ad])|\.\.|//|[\\;\x00-\x20\x7f-\xff]", re.IGNORECASE)

_CROWD = 32_768
_CROWD_BYTES = 131_072
_EMPTY = msgspec.Raw(b"")


class _Large(msgspec.Struct):
    """The members that may hold a great deal."""

    messages: msgspec.Raw = _EMPTY
    input: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    tools: msgspec.Raw = _EMPTY
    functions: msgspec.Raw = _EMPTY
    response_format: msgspec.Raw = _EMPTY
    text: msgspec.Raw = _EMPTY
    documents: msgspec.Raw = _EMPTY


_large = msgspec.json.Decoder(_Large).decode
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_PLAIN_KEY = re.compile(r"[a-z_]{1,32}")
_KEY = re.compile(rb'[\s{,]*"((?:[^"\\]|\\.)*)"\s*:\s*')


def route_of(path: str) -> str:
    """The label of a path, whatever becomes of the request; `unmatched` for all that is not a route of our own."""
    if path in _JSON_ROUTES or path == "/v1/models":
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "unmatched"


def parse(call: Call, tenant: Tenant, *, tenants_configured: bool) -> Ask:
    """What `call` asks for. Raises InvalidRequest, NotFound, MethodNotAllowed."""
    path = call.path
    dialect = _JSON_ROUTES.get(path)
    if dialect is not None:
        if call.method != "POST":
            raise _method_not_allowed(b"POST")
        ask = Ask(dialect, path, call)
        _read_body(ask, call.body)
        if dialect == "responses":
            _read_responses(ask, stored_allowed=not tenants_configured)
        return ask
    if path == "/v1/models" or path.startswith("/v1/models/"):
        if call.method not in ("GET", "HEAD"):
            raise _method_not_allowed(b"GET, HEAD")
        return Ask("models", route_of(path), call, model=path[len("/v1/models/") :])
    if path.startswith("/v1/responses/") and tenants_configured:
        # The provider keeps these objects by account, not by tenant: nobody remembers yet whose they are.
        raise NotFound("There is no such stored response.", code="unsupported_route")
    return _passthrough(call, tenant)


def _passthrough(call: Call, tenant: Tenant) -> Ask:
    raw = call.raw_path
    # The second clause says it once more, for everything hangs on it: what is forwarded is what was allowed.
    if _UNSAFE_PATH.search(raw) or unquote_to_bytes(raw).rstrip(b"/") != call.path.encode():
        raise InvalidRequest("The path holds an encoded or doubled separator, a dot segment or a control character.")
    if tenant.passthrough is not None and not any(matches(pattern, call.path) for pattern in tenant.passthrough):
        raise NotFound(
            "This path is not a route of this gateway. Paths beyond its own are forwarded only where "
            "tenants[].passthrough allows them.",
            code="unsupported_route",
        )
    if call.method not in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        raise _method_not_allowed(b"GET, HEAD, POST, PUT, PATCH, DELETE")
    return Ask("passthrough", "passthrough", call, replayable=call.method in ("GET", "HEAD"))


def _method_not_allowed(allow: bytes) -> MethodNotAllowed:
    return MethodNotAllowed(f"This path takes {allow.decode()}.", headers=[(b"allow", allow)])


# --- bodies ---------------------------------------------------------------------------------------------------------


def _read_body(ask: Ask, body: bytes) -> None:
    if not body:
        raise InvalidRequest("The request has no body. Send a JSON object.", code="invalid_json")
    encoding = ask.call.header(b"content-encoding")
    if encoding is not None and encoding.strip().lower() != b"identity":
        raise InvalidRequest("Compressed request bodies are not accepted; send it without Content-Encoding.")
    ask.fields = fields = decode(body)
    ask.model = _model(fields)
    ask.stream = _boolean(fields, "stream")
    for name in _TOKEN_LIMITS:
        if name in fields:
            _integer(fields, name, 1, MAX_TOKENS)
    if "n" in fields:
        _integer(fields, "n", 1, MAX_CHOICES)
    ask.replayable = True
    if ask.dialect == "chat":
        messages = fields.get("messages")
        if messages is None or bytes(memoryview(messages)[:1]) != b"[":
            raise InvalidRequest("'messages' must be an array of messages.", param="messages")
        ask.replayable = not _boolean(fields, "store")
    elif ask.dialect == "embeddings":
        if ask.stream:
            raise InvalidRequest("Embeddings do not stream.", param="stream")
        wanted = _member(fields, "encoding_format")
        ask.wants_base64 = wanted == "base64"
    if ask.stream and ask.dialect in ("chat", "completions"):
        options = _member(fields, "stream_options")
        if options is not None and not isinstance(options, dict):
            raise InvalidRequest("'stream_options' must be an object.", param="stream_options")
        # vLLM reads an empty object as a wish for usage, OpenAI does not: only the member itself counts as asked for.
        ask.wants_usage = bool(options and options.get("include_usage"))


def decode(body: bytes) -> dict[str, msgspec.Raw]:
    """The top level of a JSON object, its members still bytes. Raises InvalidRequest with code `invalid_json`."""
    try:
        if not body.isascii():
            body.decode("utf-8")
        if len(body) > _CROWD_BYTES and _is_crowded(body):
            raise InvalidRequest(f"The body has more than {MAX_MEMBERS} members.")
        fields = _top_level(body)
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON{_position(error)}.", code="invalid_json") from None
    if len(fields) > MAX_MEMBERS:
        raise InvalidRequest(f"The body has more than {MAX_MEMBERS} members.")
    _refuse_duplicates(body, fields)
    return fields


def _is_crowded(body: bytes) -> bool:
    """Whether too many colons stand outside of the members where many may: a million keys would take the loop half a
    second to decode, while to skip over them takes 15 ms. Raises what the decoder raises."""
    colons = body.count(b":")
    if colons > _CROWD:
        large = _large(body)
        colons -= sum(bytes(getattr(large, name)).count(b":") for name in _Large.__struct_fields__)
    return colons > _CROWD


def _position(error: msgspec.DecodeError) -> str:
    """Where the parser stopped. Only its number is taken: the rest of its text could quote the body."""
    match = re.search(r"\(byte (\d+)\)", error.args[0] if error.args else "")
    return f" (at byte {match[1]})" if match else " (it ends too early)"


def _refuse_duplicates(body: bytes, fields: Mapping[str, msgspec.Raw]) -> None:
    """Raises InvalidRequest when a top-level key stands twice: two readers could take two values.

    A compact body (as every SDK sends it) is exactly as long as its members; a second key would make it longer. Only a
    body with blanks is walked key by key, its values skipped by their known bytes.
    """
    length = 1 + 4 * len(fields) if fields else 2
    for key, value in fields.items():
        length += len(key) + len(memoryview(value))
    if length == len(body):
        return
    seen: set[str] = set()
    position = body.index(b"{") + 1
    while match := _KEY.match(body, position):
        written = match[1]
        name: str = orjson.loads(b'"' + written + b'"') if b"\\" in written else written.decode()
        known = memoryview(fields[name])
        position = match.end()
        if name in seen or body[position : position + len(known)] != known:
            which = f"key '{name}'" if _PLAIN_KEY.fullmatch(name) else "same key"
            raise InvalidRequest(f"The {which} stands twice in the body.", code="invalid_json")
        seen.add(name)
        position += len(known)


def _member(fields: Mapping[str, msgspec.Raw], name: str) -> Any:
    """One top-level member, parsed strictly. None when absent or null. Raises InvalidRequest naming it."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return orjson.loads(memoryview(raw))
    except orjson.JSONDecodeError:
        raise InvalidRequest(f"'{name}' holds a value that JSON does not allow.", param=name) from None


def _model(fields: Mapping[str, msgspec.Raw]) -> str:
    model = _member(fields, "model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("'model' must be the name of a model.", param="model")
    if len(model) > MAX_MODEL_CHARS or not model.isprintable():
        raise InvalidRequest(f"'model' is longer than {MAX_MODEL_CHARS} characters or not printable.", param="model")
    return model


def _boolean(fields: Mapping[str, msgspec.Raw], name: str) -> bool:
    value = _member(fields, name)
    if value is None or value is False:
        return False
    if value is not True:
        raise InvalidRequest(f"'{name}' must be true or false.", param=name)
    return True


def _integer(fields: Mapping[str, msgspec.Raw], name: str, least: int, most: int) -> None:
    value = _member(fields, name)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"'{name}' must be a whole number from {least} to {most}.", param=name)


# --- responses ------------------------------------------------------------------------------------------------------


def _read_responses(ask: Ask, *, stored_allowed: bool) -> None:
    """What a response refers to decides who may send it, and whether it may be sent twice."""
    fields = ask.fields
    stores = _member(fields, "store") is not False  # its default is true
    refers = [name for name in ("previous_response_id", "conversation") if _member(fields, name) is not None]
    if not stored_allowed:
        if not refers and _refers_to_items(fields):
            refers = ["input"]
        if refers:
            raise NotFound(
                f"'{refers[0]}' names an object that this gateway does not know to be yours.",
                code="unsupported_route",
                param=refers[0],
            )
    tools = _member(fields, "tools") or []
    hosted = not isinstance(tools, list) or any(
        not isinstance(tool, dict) or tool.get("type") not in _RESPONSES_TOOLS_WITHOUT_EFFECT for tool in tools
    )
    ask.replayable = not (stores or refers or hosted or _member(fields, "background"))


def _refers_to_items(fields: Mapping[str, msgspec.Raw]) -> bool:
    raw = fields.get("input")
    if raw is None or bytes(memoryview(raw)[:1]) != b"[":
        return False
    items = _member(fields, "input")
    return any(isinstance(item, dict) and item.get("type") == "item_reference" for item in items)
