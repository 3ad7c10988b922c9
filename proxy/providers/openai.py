"""Any server that speaks OpenAI's wire format: OpenAI itself, vLLM, Ollama, Groq, the mock, and many more.

One request up, one reply down. What a status means is decided here, once::

    2xx             the reply, in the shape that the client asked for
    401 402 403     our credential's fault, not the client's: UpstreamUnavailable (with the caller's own key: passed)
    429             UpstreamRateLimited with the provider's Retry-After; of a spent account, as 402
    other 4xx       the client's fault: status and body passed unchanged, known secrets replaced
    3xx 5xx         UpstreamUnavailable; redirects are never followed

A credential that was refused rests; which one a request gets is in `keys`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from random import random
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import orjson

from proxy import __version__
from proxy.errors import (
    ConnectFailed,
    StreamInterrupted,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.fault_tolerance.backoff import asked
from proxy.fault_tolerance.sharing import together
from proxy.providers.base import Resting
from proxy.providers.bodies import as_stream, usage_in, usage_told
from proxy.providers.headers import by_name, caller_key, request_id, to_client, to_provider, when_to_come_back
from proxy.providers.keys import Keys
from proxy.providers.opening import Promises, all_bring, chunk_promises, response_promises
from proxy.providers.refusals import error_object, fault_in, meaning_in, meaning_of, quota_spent
from proxy.providers.replies import PlainReply, RawReply, content_coding, first_piece, read_whole
from proxy.providers.reshape import edited, floats_to_base64
from proxy.providers.streams import (
    StreamReply,
    Verdict,
    judge_chunk,
    judge_response_event,
    pass_ordinary,
)
from proxy.transport.base import Origin, Request, Response, Transport
from proxy.types import Ask, Headers, Reply

_ABSENT: Final = msgspec.Raw(b"")
_ERROR_BYTES: Final = 4 * 1024 * 1024
_ERROR_SECONDS: Final = 1.0
_REMEMBERED: Final = 1024
_USAGE_OPTION: Final = ("chat", "completions")
"""The dialects that know `stream_options.include_usage`."""
_MAXIMUM: Final = {
    "chat": "max_completion_tokens",
    "completions": "max_tokens",
    "responses": "max_output_tokens",
}
"""What each dialect calls the most that a reply may have."""
_AGENT: Final = (b"user-agent", b"breakwater/" + __version__.encode())
_IDENTITY: Final = (b"accept-encoding", b"identity")
_JSON: Final = (b"content-type", b"application/json")
_ACCEPT_JSON: Final = (b"accept", b"application/json")
_ACCEPT_STREAM: Final = (b"accept", b"text/event-stream")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `first_event` and `idle` hold for streams, `total` for plain replies: those have no first byte before
    they are complete."""

    first_event: float
    idle: float
    total: float


class OpenAIProvider:
    """One configured provider. Constructed once; `open` runs concurrently."""

    def __init__(
        self,
        name: str,
        base_url: str,
        transport: Transport,
        timeouts: Timeouts,
        *,
        api_keys: Sequence[str] = (),
        callers_key: bool = False,
        extra_headers: Headers | None = None,
        scrub: Callable[[bytes], bytes] = bytes,
        random: Callable[[], float] = random,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`api_keys`: none for a server without keys. `callers_key` passes the caller's own bearer on instead; `scrub`
        takes known secrets out of a body that is passed to the client. `random` is uniform in [0, 1), `wall` seconds
        since 1970."""
        self.name = name
        self.timeouts = timeouts
        self._transport = transport
        url = urlsplit(base_url)
        self._origin = Origin(url.scheme, url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        self._prefix = url.path.rstrip("/").encode()
        self._callers_key = callers_key
        self._fixed: Headers = [_AGENT, _IDENTITY, *(extra_headers or [])]
        self._scrub = scrub
        self._wall = wall
        self._now = asyncio.get_running_loop().time
        bearers: list[Headers] = [[(b"authorization", b"Bearer " + key.encode())] for key in api_keys]
        self._keys = Keys(bearers or [[]], now=self._now, random=random)
        self._several = len(bearers) > 1
        if len(bearers) == 1:
            self._fixed += bearers[0]
        self._refuses_usage: set[str] = set()
        """Models whose server refused a stream with our own wish for usage, and served it without."""

    async def aclose(self) -> None:
        await self._transport.aclose()

    def resting(self, model: str) -> Resting | None:
        """See `Provider.resting`."""
        return self._keys.resting(model) if self._keys.rests else None

    def open(
        self, ask: Ask, model: str, *, output_cap: int | None = None, deadline: float | None = None
    ) -> Coroutine[Any, Any, Reply]:
        """See `Provider.open`."""
        now = self._now()
        if deadline is not None and deadline <= now:
            raise ConnectFailed("The deadline of the request passed before it was sent.", reason="timeout")
        own = now + (self.timeouts.first_event if ask.stream else self.timeouts.total)
        deadline = own if deadline is None or own < deadline else deadline
        if not ask.stream or ask.wants_usage or ask.dialect not in _USAGE_OPTION or model in self._refuses_usage:
            return self._try(ask, model, deadline, output_cap, asked_usage=False)
        return self._try_with_usage(ask, model, deadline, output_cap)

    async def _try_with_usage(self, ask: Ask, model: str, deadline: float, output_cap: int | None) -> Reply:
        """With a wish for usage that the client does not have; without it, where that is why a server refuses."""
        reply = await self._try(ask, model, deadline, output_cap, asked_usage=True)
        if not _names_usage_option(reply):
            return reply
        reply = await self._try(ask, model, deadline, output_cap, asked_usage=False)
        if reply.status < 400:  # else it was not our option: a client's own odd member can be named like it
            if len(self._refuses_usage) >= _REMEMBERED:
                self._refuses_usage.clear()
            self._refuses_usage.add(model)
        return reply

    async def _try(self, ask: Ask, model: str, deadline: float, output_cap: int | None, *, asked_usage: bool) -> Reply:
        keys, key = self._keys, 0
        request = self._request(ask, model, asked_usage, output_cap)
        if self._several:
            key = keys.pick(model, together(ask))
            request.headers += keys.headers(key)
        response = await self._transport.send(request, deadline)
        try:
            reply = await self._reply(ask, response, deadline, asked_usage)
        except BaseException as error:
            await response.aclose()
            if isinstance(error, UpstreamError) and error.cools is not None and not self._callers_key:
                error.other_key = keys.refused(key, model, error.cools, error.asked) and self._several
            raise
        if keys.rests:
            keys.accepted(key, model)
        if isinstance(reply, PlainReply):
            await response.aclose()
        return reply

    # --- up ---------------------------------------------------------------------------------------------------------

    def _request(self, ask: Ask, model: str, asked_usage: bool, output_cap: int | None) -> Request:
        call = ask.call
        passthrough = ask.dialect == "passthrough"
        headers = to_provider(call.headers, passthrough=passthrough, own_key=self._callers_key)
        headers += self._fixed
        headers.append((b"traceparent", call.traceparent.encode()))
        if self._callers_key and (key := caller_key(call.headers)):
            headers.append((b"authorization", b"Bearer " + key))
        if passthrough:
            body, path, method = call.body, call.raw_path[3:], call.method.encode()
            if ask.fields and model != ask.model:
                body = edited(ask.fields, model=model, with_usage=False)
        elif ask.dialect == "models":
            body, path, method = b"", b"/models", b"GET"
            headers.append(_ACCEPT_JSON)
        else:
            body, path, method = call.body, call.path[3:].encode(), b"POST"
            if model != ask.model or asked_usage or output_cap is not None or ask.edited:
                cap = None
                if output_cap is not None and not call.path.endswith("/compact"):  # a compaction knows no maximum
                    cap = (_MAXIMUM[ask.dialect], output_cap)
                body = edited(ask.fields, model=model, with_usage=asked_usage, cap=cap)
            headers.append(_JSON)
            headers.append(_ACCEPT_STREAM if ask.stream else _ACCEPT_JSON)
        target = self._prefix + path
        if call.query and ask.dialect != "models":
            target += b"?" + call.query
        return Request(self._origin, method, target, headers, body, ask.replayable)

    # --- down -------------------------------------------------------------------------------------------------------

    async def _reply(self, ask: Ask, response: Response, deadline: float, asked_usage: bool) -> Reply:
        status = response.status
        passthrough = ask.dialect == "passthrough"
        if not 200 <= status < 300 and not (passthrough and status == 304):
            return await self._refusal(response, deadline)
        raw = passthrough and not (ask.objects is not None and ask.objects.makes)
        headers = to_client(response.headers, passthrough=raw)
        named = by_name(response.headers)
        kind = named.get(b"content-type", b"").lower()
        start = b""
        if (ask.stream or passthrough) and not content_coding(named):
            if kind.startswith(b"text/event-stream"):
                return await self._stream(ask, response, headers, deadline, asked_usage)
            if not passthrough and b"json" not in kind:
                # SDKs never look at the type of a stream, so servers get away with another one, or with none.
                start = await first_piece(response, deadline)
                if start.lstrip()[:1] not in (b"{", b"["):
                    return await self._stream(ask, response, headers, deadline, asked_usage, start)
        upstream_id = request_id(named)
        if raw:
            told = usage_told if b"json" in kind and _generates(ask) and not content_coding(named) else None
            return RawReply(response, headers, idle=self.timeouts.idle, upstream_request_id=upstream_id, usage_in=told)
        body = await read_whole(response, deadline, start=start)
        usage = usage_in(body)
        terminator = 0
        if ask.stream:
            body, headers = as_stream(ask, body), _typed(headers, b"text/event-stream; charset=utf-8")
            terminator = len(body) - body.rindex(b"\n\n", 0, -2) - 2
        elif ask.wants_base64:
            body = floats_to_base64(body)
        if not terminator and b"json" not in kind:
            headers = _typed(headers, b"application/json")  # the official client reads anything else as a text
        return PlainReply(status, headers, body, usage=usage, upstream_request_id=upstream_id, terminator=terminator)

    async def _stream(
        self,
        ask: Ask,
        response: Response,
        headers: Headers,
        deadline: float,
        asked_usage: bool,
        start: bytes = b"",
    ) -> Reply:
        judge: Callable[[bytes, bytes], Verdict | None]
        ordinary: Callable[[bytes], bytes | None] | None = None
        promises: Promises = chunk_promises
        if ask.dialect == "responses":
            judge, promises = judge_response_event, response_promises
        elif ask.dialect == "passthrough":
            judge, promises = (_pass_and_count if _generates(ask) else _pass_any), all_bring
        else:
            judge = partial(judge_chunk, asked_usage)
            ordinary = partial(pass_ordinary, asked_usage)
        reply = StreamReply(
            response,
            headers,
            judge=judge,
            ordinary=ordinary,
            promises=promises,
            idle=self.timeouts.idle,
            terminated=ask.dialect != "passthrough",
            upstream_request_id=request_id(by_name(response.headers)),
            scrub=self._scrub,
        )
        try:
            await reply.first(deadline, start)
        except StreamInterrupted as error:
            return self._error_first(error, headers)
        return reply

    def _error_first(self, error: StreamInterrupted, headers: Headers) -> Reply:
        """200 and then an error: nothing was forwarded yet, so it can still be the status answer that it should be."""
        details = error_object(error.event)
        meaning = meaning_of(details)
        if meaning in ("request", "context_length", "content_policy"):
            body = orjson.dumps({"error": details})
            return PlainReply(400, _typed(headers, b"application/json"), body, meaning=meaning)
        raise fault_in("The provider answered with an error event.", details) from error

    async def _refusal(self, response: Response, deadline: float) -> Reply:
        status = response.status
        upstream_id = request_id(by_name(response.headers))
        own_fault = status in (401, 402, 403) and not self._callers_key
        if not (own_fault or status == 429 or status >= 500 or status < 400):
            return await self._passed_refusal(response, deadline)
        body = await self._error_body(response, deadline)
        facts: dict[str, Any] = {"upstream_status": status, "upstream_request_id": upstream_id}
        if own_fault and status == 402:
            raise quota_spent(**facts)
        if status == 429 and meaning_in(body) == "quota":
            if not self._callers_key:
                raise quota_spent(**facts)
            headers = [*to_client(response.headers, passthrough=False), (b"x-should-retry", b"false")]
            return PlainReply(status, headers, self._scrub(body), upstream_request_id=upstream_id, meaning="quota")
        if own_fault:
            refused = UpstreamUnavailable("The provider did not accept this gateway's credential.", **facts)
            cools = "forbidden" if status == 403 else "credential"
            raise refused.but(reason="credential", retryable=False, trips_breaker=False, cools=cools)
        wait = when_to_come_back(response.headers)
        seconds = asked(response.headers, self._wall())
        if status == 429:
            limited = UpstreamRateLimited("The provider's rate limit is reached.", headers=wait, **facts)
            raise limited.but(reason="rate_limited", asked=seconds)
        if status < 400:
            moved = UpstreamUnavailable(f"The provider answered {status}.", **facts)
            raise moved.but(reason="redirect", retryable=False)
        if status == 504:
            late = UpstreamTimeout("The provider answered 504: it timed out itself.", headers=wait, **facts)
            raise late.but(reason="server_error", retryable=True, timed_out=False, asked=seconds)
        reason = "overloaded" if status in (503, 529) else "server_error"
        down = UpstreamUnavailable(f"The provider answered {status}.", headers=wait, **facts)
        raise down.but(reason=reason, asked=seconds)

    async def _passed_refusal(self, response: Response, deadline: float) -> Reply:
        """The client's own fault, in the provider's own words."""
        body = self._scrub(await read_whole(response, deadline, _ERROR_BYTES))
        headers = to_client(response.headers, passthrough=False)
        meaning = meaning_in(body) if response.status in (400, 413, 422) else "request"
        upstream_id = request_id(by_name(response.headers))
        return PlainReply(response.status, headers, body, upstream_request_id=upstream_id, meaning=meaning)

    async def _error_body(self, response: Response, deadline: float) -> bytes:
        """Of an answer that we only report: for its code, and so that its connection can serve again."""
        try:
            return await read_whole(response, min(deadline, self._now() + _ERROR_SECONDS), _ERROR_BYTES)
        except UpstreamError:
            return b""


def _pass_any(raw: bytes, data: bytes) -> Verdict | None:
    """A pass-through stream has no dialect: any event is good."""
    return None


def _pass_and_count(raw: bytes, data: bytes) -> Verdict | None:
    """The same, of a request that may have to be paid for: speech and images tell their usage in their last event."""
    usage = usage_told(data) if b'"usage"' in data else None
    return None if usage is None else Verdict(raw, usage)


def _generates(ask: Ask) -> bool:
    """Whether the usage in a passed reply is this request's: what is only read was paid for when it was made."""
    return ask.call.method == "POST" and not (ask.objects is not None and ask.objects.free)


def _typed(headers: Headers, content_type: bytes) -> Headers:
    return [header for header in headers if header[0] != b"content-type"] + [(b"content-type", content_type)]


def _names_usage_option(reply: Reply) -> bool:
    """A refusal that has to do with the option. Servers that check bodies against a schema say 422."""
    if not isinstance(reply, PlainReply) or reply.status not in (400, 422):
        return False
    return b"stream_options" in reply.body or b"include_usage" in reply.body
