"""The words that every layer shares, and nothing else: values, no behaviour that awaits.

A request's way through the program, in these words::

    Call ──parse──▶ Ask ──route──▶ Target ──open──▶ Reply ──events──▶ Out
    (bytes as        (what is       (provider        (status,          (the way
     they came)       asked for)     and model)       Event, Event…)    back)

`Record` runs beside it: what is known of the request so far. The edge turns it into exactly one
`request.finished` or `request.refused`.

Units: times are seconds as floats (or carry `_ms`), sizes are bytes, header names are lower-case bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

Headers = list[tuple[bytes, bytes]]

Dialect = Literal["chat", "completions", "embeddings", "responses", "models", "passthrough"]
"""Which body grammar a route speaks. A layer that knows the dialect acts, the others let it by."""

OTHER: Final = "other"
"""The label of whatever is not in the configuration: metrics carry closed sets only."""


class Call(msgspec.Struct):
    """One client request as it reached us. Nothing in it is interpreted yet."""

    method: str
    path: str
    """Decoded path, always with the `/v1` prefix, without the query."""
    raw_path: bytes
    """The path as sent (still percent-encoded), with the `/v1` prefix: what a pass-through forwards."""
    query: bytes
    headers: Headers
    body: bytes
    """Empty until it was read: only for those who may ask at all."""
    request_id: str
    traceparent: str
    """Of the span that we opened for this request: forwarded upstream and returned to the client."""
    client: str
    """Peer address, without the port; empty for a unix socket."""
    timeout_ms: bytes | None = None
    """The header `x-breakwater-timeout-ms`, as sent."""
    tags: bytes | None = None
    """The header `x-breakwater-tags`, as sent."""

    def header(self, name: bytes) -> bytes | None:
        """First value of a header (lower-case name), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


@dataclass(frozen=True, slots=True)
class Objects:
    """What a request has to do with objects that a provider keeps: responses and conversations."""

    refers: tuple[tuple[str, str], ...] = ()
    """Those that it names: the member of the body that does (empty: the path does), and the id."""
    makes: bool = False
    """The reply may name new ones."""
    free: bool = False
    """Nothing is generated: it reads, deletes or counts, and costs nothing."""


class Ask(msgspec.Struct):
    """What a call asks for, once its body is known to be well formed.

    `fields` is the canonical top level of a JSON body: each member still the client's own bytes. It is empty for a
    body that travels as it came (a pass-through), whose `model`, if it names one, is for its price alone.
    """

    dialect: Dialect
    route: str
    """The route's template, a closed set: the label of metrics and logs (`/v1/chat/completions`)."""
    call: Call
    model: str = ""
    stream: bool = False
    fields: Mapping[str, msgspec.Raw] = msgspec.field(default_factory=dict)
    wants_usage: bool = False
    """The client itself asked for the usage chunk of a stream (`stream_options.include_usage`)."""
    wants_base64: bool = False
    """Embeddings: the client decodes base64 (both official SDKs ask for it unless told otherwise)."""
    replayable: bool = False
    """Sending it twice has no effect beyond its price."""
    edited: bool = False
    """`fields` is not what the body of the call says: a body is made of it."""
    objects: Objects | None = None
    """None: it neither names nor makes any."""


@dataclass(frozen=True, slots=True)
class Target:
    """One place that can answer: a configured provider and the model name to use there."""

    provider: str
    model: str
    label: str
    """The configured model name or glob that matched, or `other`: the `model` label of metrics."""


Groups = Sequence[Sequence[Target]]
"""Where a model is answered, in order of preference; the targets of one group share."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is, and what it may do. None means no restriction; a pattern's `*` stands for anything."""

    name: str
    models: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    passthrough: Sequence[str] | None = ()
    """Paths (with `/v1`) outside the known routes that this tenant may use. None: all."""
    key: str = ""
    """Which of its keys was presented: the id of one made at run time, of a configured one the first hexadecimal digits
    of its digest; never the key."""
    key_models: Sequence[str] | None = None
    """As `models`, of the key itself: a model must be allowed by both."""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one reply, normalised over providers. All members are counts.

    `input` includes cached reads and cache writes, `output` includes reasoning: the details are subsets, never added.
    """

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    estimated: bool = False
    """Counted by us, because the provider said nothing. `usage: 0` from a provider is not `estimated`."""
    input_audio: int = 0
    output_audio: int = 0
    """Tokens of audio: parts of the input and the output, which some models charge otherwise than text."""

    @property
    def total(self) -> int:
        return self.input + self.output


class Event(msgspec.Struct, gc=False):
    """One push to the client.

    Of a plain reply: its whole body. Of a stream: one or more complete SSE events, as one read brought them.
    Of a pass-through: whatever one read brought.
    """

    data: bytes
    usage: Usage | None = None
    terminator: int = 0
    """Bytes at the end of `data` that are the stream's terminator; 0 while it goes on."""
    last: bool = False
    """Nothing comes after it: there is no need to ask for more."""


class TooLong(NamedTuple):
    """What a provider says of a prompt that does not fit into its window. None: it does not say."""

    window: int | None = None
    """Tokens that its context holds."""
    asked: int | None = None
    """Tokens of the request by its own count."""
    output: int | None = None
    """What of them is output that was asked for."""


class Reply(Protocol):
    """A provider's answer, its head read and its first event at hand. Whoever opened it closes it."""

    status: int
    headers: Headers
    stream: bool
    """The body is an event stream. When False and the ask is not a pass-through, `events` yields exactly one event."""
    length: int | None
    """Bytes of the body, where that is known before the first of them is written."""
    upstream_request_id: str
    failed: bool
    """It has ended as its dialect wants it, but with an event that tells of a fault of the provider's."""

    @property
    def too_long(self) -> TooLong | None:
        """Of a refusal: the prompt does not fit into the provider's window. None: something else, or no refusal."""

    @property
    def events(self) -> AsyncIterator[Event]: ...

    async def aclose(self) -> None:
        """Frees the connection. Idempotent; after an unfinished body it closes the socket."""


class Record(msgspec.Struct):
    """What is known of one request so far. Written by the pipeline as it learns, read once at the end by the edge."""

    route: str = "unmatched"
    tenant: str = OTHER
    model: str = OTHER
    provider: str = ""
    upstream_model: str = ""
    upstream_request_id: str = ""
    upstream_status: int = 0
    attempts: int = 0
    stream: bool = False
    usage: Usage | None = None
    """Of all attempts together that were, or may have been, billed."""
    nano_usd: int | None = None
    """Their cost in nano-dollars; None where nobody knows a price."""
    costs: bool = False
    """`nano_usd` has been decided, even if nobody knows it."""
    unpriced: bool = False
    """Something was used of which nobody knows what it costs, or even how much it was."""
    rate_limits: Headers = msgspec.field(default_factory=list)
    """`x-ratelimit-*`, where the caller is held to a limit."""
    degraded: bool = False
    """The store of budgets was away when the request came, or when it was asked."""
    upstream_started: float = 0.0
    """Readings of a monotonic clock (seconds); 0.0 is `never`."""
    first_event: float = 0.0
    upstream_ended: float = 0.0
    """Both of the last attempt."""
    elsewhere: float = 0.0
    """Seconds of the attempts before it, of waiting between them, and of calls to other models."""
    counted: int = 0
    """Tokens of the prompt that was sent last, by our own count; 0: nobody counted it."""
    context_tokens: str = ""
    context_trimmed: str = ""
    """The headers `x-breakwater-context-*`; empty: not sent."""
    warnings: list[str] = msgspec.field(default_factory=list)


class Out(Protocol):
    """The way back to the client. One writer: the task that runs `Pipeline.handle`."""

    record: Record

    def expect_stream(self) -> None:
        """The client waits for an event stream: from now on silence is filled with keep-alive comments."""

    async def start(self, status: int, headers: Headers, *, stream: bool = False, length: int | None = None) -> None:
        """Status and headers. For a stream that a keep-alive has committed already, only checked."""

    def push(self, event: Event) -> bool:
        """`write`, where nothing stands in the way. False: nothing was written, and `write` is what is left."""

    async def write(self, event: Event) -> None:
        """One event's bytes; waits while the client's buffer is full."""

    def afterwards(self, job: Callable[[], Awaitable[None]]) -> None:
        """`job` is run once the client has its last byte, or can get none: no answer waits for the books."""
