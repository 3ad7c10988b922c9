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
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from proxy.errors import InvalidRequest, MethodNotAllowed, NotFound
from proxy.globs import matches
from proxy.types import Ask, Call, Dialect, Objects, Tenant
from proxy.validation import stored
from proxy.validation.stored import member as _member

MAX_MODEL_CHARS = 256
MAX_CHOICES = 128
MAX_TOKENS = 2**31 - 1
MAX_MEMBERS = 1024
"""At the top level of a body. The known ones are some sixty."""
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_COUNTS = ("n", "best_of")
_JSON_ROUTES: dict[str, Dialect] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
}
_COUNT = "/v1/responses/input_tokens"
_COMPACT = "/v1/responses/compact"
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


class _Named(msgspec.Struct):
    model: str = ""


_named = msgspec.json.Decoder(_Named).decode
_large = msgspec.json.Decoder(_Large).decode
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_PLAIN_KEY = re.compile(r"[a-z_]{1,32}")
_KEY = re.compile(rb'[\s{,]*"((?:[^"\\]|\\.)*)"\s*:\s*')


def route_of(path: str) -> str:
    """The label of a path, whatever becomes of the request; `unmatched` for all that is not a route of our own."""
    if path in _JSON_ROUTES or path in ("/v1/models", _COUNT, _COMPACT):
        return path
    if path.startswith(stored.RESPONSES):
        return "/v1/responses/{id}"
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "unmatched"


def parse(call: Call, tenant: Tenant, *, tenants_configured: bool) -> Ask:
    """What `call` asks for. Raises InvalidRequest, NotFound, MethodNotAllowed."""
    path = call.path
    dialect = _JSON_ROUTES.get(path)
    if dialect is not None:
        if call.method != "POST":
            raise _method_not_allowed(b"POST")
        ask = Ask(dialect, path, call)
        _read_body(ask)
        if dialect == "responses":
            _read_responses(ask, strict=tenants_configured)
        return ask
    if path.startswith(stored.RESPONSES):
        return _below_responses(call, tenant, strict=tenants_configured)
    if path == "/v1/models" or path.startswith("/v1/models/"):
        if call.method not in ("GET", "HEAD"):
            raise _method_not_allowed(b"GET, HEAD")
        return Ask("models", route_of(path), call, model=path[len("/v1/models/") :])
    return _passthrough(call, tenant, strict=tenants_configured)


def _below_responses(call: Call, tenant: Tenant, *, strict: bool) -> Ask:
    """Counting and compacting, which keep nothing; else a stored response."""
    if call.path == _COUNT and call.method == "POST":
        fields = _object(call)
        ask = Ask("passthrough", _COUNT, call, fields=fields, replayable=True)
        if _member(fields, "model") is not None:
            ask.model = _model(fields)
        ask.objects = Objects(_references(fields, strict=strict), free=True)
        return ask
    if call.path == _COMPACT and call.method == "POST":
        ask = Ask("responses", _COMPACT, call)
        _read_body(ask)
        if ask.stream:
            raise InvalidRequest("A compaction does not stream.", param="stream")
        refers = _references(ask.fields, strict=strict)
        ask.objects = Objects(refers) if refers else None
        return ask
    objects = stored.of_response(call.method, call.path)
    if objects is None:
        if strict:  # whatever it is, nobody can tell whose
            raise stored.unknown("")
        return _passthrough(call, tenant, strict=False)
    _check_path(call)
    replayable = call.method in ("GET", "HEAD")
    return Ask("passthrough", "/v1/responses/{id}", call, replayable=replayable, objects=objects)


def _check_path(call: Call) -> None:
    raw = call.raw_path
    # The second clause says it once more, for everything hangs on it: what is forwarded is what was allowed.
    if _UNSAFE_PATH.search(raw) or unquote_to_bytes(raw).rstrip(b"/") != call.path.encode():
        raise InvalidRequest("The path holds an encoded or doubled separator, a dot segment or a control character.")


def _passthrough(call: Call, tenant: Tenant, *, strict: bool) -> Ask:
    _check_path(call)
    if tenant.passthrough is not None and not any(matches(pattern, call.path) for pattern in tenant.passthrough):
        raise NotFound(
            "This path is not a route of this gateway. Paths beyond its own are forwarded only where "
            "tenants[].passthrough allows them.",
            code="unsupported_route",
        )
    if call.method not in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        raise _method_not_allowed(b"GET, HEAD, POST, PUT, PATCH, DELETE")
    ask = Ask("passthrough", "passthrough", call, replayable=call.method in ("GET", "HEAD"))
    ask.objects = stored.of_conversation(call.method, call.path)
    if strict and ask.objects is not None and call.body and stored.refers_to_items(_object(call), "items"):
        raise stored.unknown("items")
    if strict and ask.objects is None and call.path == stored.CONVERSATIONS:
        raise stored.unknown("")  # all of the account's
    if call.method == "POST" and ask.objects is None:
        ask.model = _named_model(call)
    return ask


def _named_model(call: Call) -> str:
    """The model that a JSON body names, for its price: whatever is wrong with the body is the provider's to say."""
    kind = call.header(b"content-type") or b""
    if b"json" not in kind.lower() or len(call.body) > _CROWD_BYTES:
        return ""
    try:
        model = _named(call.body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return model if len(model) <= MAX_MODEL_CHARS and model.isprintable() else ""


def _method_not_allowed(allow: bytes) -> MethodNotAllowed:
    return MethodNotAllowed(f"This path takes {allow.decode()}.", headers=[(b"allow", allow)])


# --- bodies ---------------------------------------------------------------------------------------------------------


def _object(call: Call) -> dict[str, msgspec.Raw]:
    """The body's top level. Raises InvalidRequest."""
    if not call.body:
        raise InvalidRequest("The request has no body. Send a JSON object.", code="invalid_json")
    encoding = call.header(b"content-encoding")
    if encoding is not None and encoding.strip().lower() != b"identity":
        raise InvalidRequest("Compressed request bodies are not accepted; send it without Content-Encoding.")
    return decode(call.body)


def _read_body(ask: Ask) -> None:
    ask.fields = fields = _object(ask.call)
    ask.model = _model(fields)
    ask.stream = "stream" in fields and _boolean(fields, "stream")
    for name in _TOKEN_LIMITS:
        if name in fields:
            _integer(fields, name, 1, MAX_TOKENS)
    for name in _COUNTS:
        if name in fields:
            _integer(fields, name, 1, MAX_CHOICES)
    ask.replayable = True
    if ask.dialect == "chat":
        messages = fields.get("messages")
        if messages is None or bytes(memoryview(messages)[:1]) != b"[":
            raise InvalidRequest("'messages' must be an array of messages.", param="messages")
        ask.replayable = not ("store" in fields and _boolean(fields, "store"))
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
        length += len(key) + len(value)
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


def _read_responses(ask: Ask, *, strict: bool) -> None:
    """What a response refers to decides who may send it, and whether it may be sent twice."""
    fields = ask.fields
    stores = _member(fields, "store") is not False  # its default is true
    refers = _references(fields, strict=strict)
    if stores or refers:
        ask.objects = Objects(refers, makes=stores)
    tools = _member(fields, "tools") or []
    hosted = not isinstance(tools, list) or any(
        not isinstance(tool, dict) or tool.get("type") not in _RESPONSES_TOOLS_WITHOUT_EFFECT for tool in tools
    )
    ask.replayable = not (stores or refers or hosted or _member(fields, "background"))


def _references(fields: Mapping[str, msgspec.Raw], *, strict: bool) -> stored.References:
    """Objects whose owner is known to somebody. Raises NotFound for items, of which it never is, where `strict`."""
    if strict and stored.refers_to_items(fields, "input"):
        raise stored.unknown("input")
    return stored.references(fields)
