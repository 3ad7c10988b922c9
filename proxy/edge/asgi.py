"""The ASGI application: which of a few doors a request goes through.

`/v1/*` and the same paths without `/v1` become an `Exchange` before anything else looks at them. Health and metrics are
answered here. Everything else belongs to the administration's application, which is loaded when it is first asked for,
and does not exist without admin keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final, Literal

from proxy.edge.auth import AdminKeys, refuse_pages
from proxy.edge.exchange import Exchange, Service
from proxy.edge.headers import request_id, traceparent
from proxy.errors import InvalidKey, MethodNotAllowed, NotFound, ProxyError, envelope
from proxy.observability.events import Bus, ServerDraining
from proxy.pipeline import Pipeline
from proxy.types import Headers

App = Callable[[Any, Any, Any], Awaitable[None]]
_random: Final = Random().randbytes  # noqa: S311 - names, not secrets; the system's source costs a call each time
Readiness = Literal["ok", "starting", "draining"]
READY: Final = ("ok", "degraded")
"""States in which requests are served: all of them, or those that a store's absence lets through."""

SILENCE_SECONDS: Final = 10.0
"""See `Service.silence`."""
_WITHOUT_PREFIX: Final = frozenset(
    {"chat", "completions", "embeddings", "models", "responses", "moderations", "images", "audio", "files", "uploads"}
    | {"batches", "fine_tuning", "vector_stores", "assistants", "threads", "conversations", "videos", "containers"}
)
"""First segments that clients whose base URL lacks `/v1` use."""


def v1_path(path: str) -> str | None:
    """The path with its `/v1` prefix and without a trailing slash, or None when it is none of the API's."""
    if path.startswith("/v1/"):
        return path.rstrip("/") if path.endswith("/") and len(path) > 4 else path
    if path[1:].partition("/")[0] in _WITHOUT_PREFIX:
        return "/v1" + path.rstrip("/")
    return None


class Gateway:
    """The application. One per process; `random(n)` gives n random bytes, `clock` is monotonic."""

    def __init__(
        self,
        pipeline: Pipeline,
        bus: Bus,
        side: Side,
        *,
        max_in_flight: int,
        max_body_bytes: int,
        own_port: bool,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = _random,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        """`own_port`: metrics and administration are served elsewhere; here only the health of the process."""
        self.side = side
        self.service = Service(pipeline, bus, max_in_flight, max_body_bytes, clock, random, silence)
        self._live = self.service.live
        self.interrupted = 0
        """Requests that a shutdown ended before they were done."""
        self._own_port = own_port

    @property
    def in_flight(self) -> int:
        return len(self._live)

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        path = v1_path(scope["path"])
        if path is None:
            return self.side(scope, receive, send, health_only=self._own_port)
        return Exchange(self.service, path, scope, receive, send).run()

    def begin_drain(self) -> None:
        """From now on not ready: new requests are still served, but nobody should send more."""
        self.side.readiness = "draining"
        self.service.bus.emit(ServerDraining(in_flight=self.in_flight))

    async def interrupt_all(self) -> None:
        """Ends what still runs: streams with an error event, the rest with 503. Returns when all have ended."""
        running = list(self._live)
        self.interrupted += len(running)
        if running:
            await asyncio.gather(*[exchange.interrupt_and_wait() for exchange in running])


class Side:
    """Health, metrics, administration: what is not the API."""

    def __init__(
        self,
        metrics: Callable[[], Awaitable[bytes]],
        metrics_type: str,
        admin_keys: AdminKeys,
        *,
        metrics_open: bool,
        any_host: bool,
        admin: Callable[[], App],
        store: Callable[[], str] = lambda: "ok",
    ) -> None:
        """`metrics` renders the page, of the content type `metrics_type`.

        `metrics_open`: no key needed (on loopback, then with the checks of keyless mode unless `any_host`).
        `admin` builds the administration's application at its first request. `store` says what the store has to say
        about being ready, in one word: one of READY, or why not."""
        self.readiness: Readiness = "starting"
        self._metrics = metrics
        self._metrics_type = metrics_type.encode()
        self._admin_keys = admin_keys
        self._metrics_open = metrics_open
        self._any_host = any_host
        self._build_admin = admin
        self._store = store
        self._admin: App | None = None
        self._building = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any, *, health_only: bool = False) -> None:
        path = scope["path"]
        try:
            if path in ("/livez", "/readyz", "/metrics") and scope["method"] not in ("GET", "HEAD"):
                raise MethodNotAllowed(f"{path} takes GET.", headers=[(b"allow", b"GET, HEAD")])
            if path == "/livez":
                await _answer(scope, send, 200, b"ok", b"text/plain; charset=utf-8")
            elif path == "/readyz":
                state = self._store() if self.readiness == "ok" else self.readiness
                status = 200 if state in READY else 503
                await _answer(scope, send, status, state.encode(), b"text/plain; charset=utf-8")
            elif path == "/metrics" and not health_only:
                self._authorise_metrics(scope["headers"])
                await _answer(scope, send, 200, await self._metrics(), self._metrics_type)
            elif (path == "/admin" or path.startswith("/admin/")) and self._admin_keys and not health_only:
                if not self._admin_keys.accept(scope["headers"]):
                    raise InvalidKey
                admin = self._admin or await self._built()
                await admin(scope, receive, _with_ids(scope, send))
            else:
                raise NotFound("There is nothing here. The API is under /v1.")
        except ProxyError as error:
            await _answer(scope, send, error.status, envelope(error), b"application/json", error.headers)

    async def _built(self) -> App:
        async with self._building:  # once: what builds it is not made for several threads
            if self._admin is None:
                # A third of a second of imports, which must not stand in the way of everybody's streams.
                self._admin = await asyncio.to_thread(self._build_admin)
            return self._admin

    def _authorise_metrics(self, headers: Headers) -> None:
        if self._metrics_open:
            refuse_pages(headers, any_host=self._any_host)
        elif not self._admin_keys.accept(headers):
            raise InvalidKey


def _ids(scope: Any) -> Headers:
    """What every answer carries."""
    sent = dict(scope["headers"])
    return [
        (b"x-request-id", request_id(sent.get(b"x-request-id"), _random).encode()),
        (b"traceparent", traceparent(sent.get(b"traceparent"), _random).encode()),
    ]


def _with_ids(scope: Any, send: Any) -> Any:
    """`send` for an application that knows nothing of ids."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_ids(scope)]}
        await send(message)

    return sending


async def _answer(
    scope: Any, send: Any, status: int, body: bytes, content_type: bytes, extra: Headers | None = None
) -> None:
    headers: Headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        *_ids(scope),
        *(extra or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
