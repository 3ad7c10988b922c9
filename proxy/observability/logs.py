"""The log of the process: the bus's events and everything that comes through the standard library's `logging`.

Both pass the same scrubber and leave through the same writer. `JsonLog` is for machines, `FriendlyLog` for the person
who tries it out. Only named fields are written: never a body, never a header.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO, Any, Final

import msgspec

from proxy.money import usd_text
from proxy.observability import tracebacks
from proxy.observability.context_events import ContextTrimmed
from proxy.observability.events import (
    BudgetRefused,
    ConnectionRefused,
    InternalFault,
    KeysFollowed,
    KeysLost,
    KeysStale,
    LedgerRestored,
    LedgerResumed,
    LedgerStalled,
    Notice,
    OwnershipLost,
    RequestFinished,
    RequestRefused,
    ServerDraining,
    ServerStarted,
    ServerStopped,
    SettlementsLost,
    StoreDegraded,
    StoreMisconfigured,
    StoreRecovered,
    StoreReset,
)
from proxy.observability.lines import LEVELS, MAX_LINE, Lines, printable
from proxy.observability.scrub import Scrubber
from proxy.observability.stdlib import StdlibLog
from proxy.observability.upstream_events import (
    CircuitClosed,
    CircuitHalfOpen,
    CircuitOpened,
    UpstreamFailedOver,
    UpstreamRetried,
)
from proxy.observability.writer import LineWriter

Clock = Callable[[], float]


class JsonLog:
    """A subscriber of the bus: one JSON line per event. `now` is the wall clock; `level` the least to be written."""

    def __init__(self, writer: LineWriter, scrubber: Scrubber, *, level: str = "info", now: Clock = time.time) -> None:
        self._writer = writer
        self._lines = Lines(scrubber, now)
        self._level = LEVELS[level]

    def __call__(self, event: Notice) -> None:
        if type(event) is RequestFinished:
            self._finished(event)
            return
        level = _level(event)
        if LEVELS[level] >= self._level:
            line = {"event": event.event, "ts": self._lines.stamp(), "level": level, **_fields(event)}
            self._writer.write(self._lines.encode(line), urgent=level == "error")

    def _finished(self, event: RequestFinished) -> None:
        """The line of the hot path: one dict, one check over all that came from outside, one encoding."""
        level = "warning" if event.interrupted or event.status >= 500 else "info"
        if LEVELS[level] < self._level:
            return
        lines = self._lines
        fields: dict[str, Any] = {
            "event": "request.finished",
            "ts": lines.stamp(),
            "level": level,
            "request_id": event.request_id,
            "trace_id": event.trace_id,
            "route": event.route,
            "tenant": event.tenant,
            "model": event.model,
            "status": event.status,
            "stream": event.stream,
            "duration_ms": _ms(event.duration),
            "bytes_in": event.bytes_in,
            "bytes_out": event.bytes_out,
            "attempts": event.attempts,
        }
        _add_upstream(fields, event)
        if event.warnings or event.error_code or event.disconnected or event.interrupted:
            _add_trouble(fields, event)
        if event.client:
            fields["client"] = event.client
        names = (event.route, event.tenant, event.model, event.provider, event.upstream_model, *event.warnings)
        ids = f"{event.request_id} {event.trace_id} {event.upstream_request_id} {event.client} {event.error_code}"
        safe = lines.are_safe(names) and lines.is_safe(ids)
        self._writer.write(lines.encode(fields, safe=safe))


def _ms(seconds: float) -> float:
    """Milliseconds, to a tenth."""
    return int(seconds * 10_000 + 0.5) / 10


def _add_upstream(fields: dict[str, Any], event: RequestFinished) -> None:
    if event.provider:
        fields["provider"] = event.provider
    if event.upstream_model:
        fields["upstream_model"] = event.upstream_model
    if event.upstream_request_id:
        fields["upstream_request_id"] = event.upstream_request_id
    if event.overhead is not None:
        fields["overhead_ms"] = _ms(event.overhead)
    if event.upstream_duration is not None:
        fields["upstream_duration_ms"] = _ms(event.upstream_duration)
    if event.time_to_first_token is not None:
        fields["time_to_first_token_ms"] = _ms(event.time_to_first_token)
    usage = event.usage
    if usage is not None:
        fields["input_tokens"] = usage.input
        fields["output_tokens"] = usage.output
        if usage.cache_read:
            fields["cached_tokens"] = usage.cache_read
        if usage.cache_write:
            fields["cache_write_tokens"] = usage.cache_write
        if usage.reasoning:
            fields["reasoning_tokens"] = usage.reasoning
        fields["usage_estimated"] = usage.estimated
        fields["cost_usd"] = None if event.nano_usd is None else usd_text(event.nano_usd)


def _add_trouble(fields: dict[str, Any], event: RequestFinished) -> None:
    if event.error_code:
        fields["error_code"] = event.error_code
    if event.disconnected:
        fields["disconnected"] = True
    if event.interrupted:
        fields["interrupted"] = True
    if event.warnings:
        fields["warnings"] = event.warnings


_WARNINGS: Final = (
    RequestRefused, ConnectionRefused, BudgetRefused, StoreDegraded, StoreReset, StoreMisconfigured, SettlementsLost,
    LedgerStalled, KeysLost, KeysStale, OwnershipLost, CircuitOpened, UpstreamRetried, UpstreamFailedOver,
)  # fmt: skip


def _level(event: Notice) -> str:
    if isinstance(event, InternalFault | SettlementsLost):
        return "error"
    return "warning" if isinstance(event, _WARNINGS) else "info"


def _fields(event: Notice) -> dict[str, Any]:
    """What is written of the rarer events."""
    match event:
        case RequestRefused():
            fields: dict[str, Any] = {
                "request_id": event.request_id,
                "trace_id": event.trace_id,
                "route": event.route,
                "tenant": event.tenant,
                "model": event.model,
                "status": event.status,
                "error_code": event.code,
                "duration_ms": _ms(event.duration),
                "bytes_in": event.bytes_in,
            }
            return {**fields, "client": event.client} if event.client else fields
        case ConnectionRefused():
            return {"status": event.status, "error_code": event.code}
        case ServerStarted():
            return {"version": event.version, "listen": event.listen, "config_hash": event.config_hash}
        case ServerDraining():
            return {"in_flight": event.in_flight}
        case SettlementsLost():
            return {"count": event.count}
        case ServerStopped():
            return {"uptime_ms": _ms(event.uptime), "cut": event.cut}
        case InternalFault():
            ids = {"request_id": event.request_id, "trace_id": event.trace_id} if event.request_id else {}
            return {**ids, "where": event.where, "traceback": tracebacks.render(event.exc)}
        case KeysFollowed():
            return {"stale_ms": _ms(event.stale)}
        case LedgerStalled() | LedgerRestored() | CircuitOpened() | CircuitHalfOpen() | CircuitClosed():
            return msgspec.structs.asdict(event)
        case LedgerResumed():
            return {"file": event.file, "away_ms": _ms(event.away), "gap": event.gap}
        case UpstreamRetried():
            return {**_without(event, "wait"), "wait_ms": _ms(event.wait)}
        case UpstreamFailedOver():
            places = {"from": event.from_provider, "to": event.to_provider}
            return {**_without(event, "from_provider", "to_provider"), **places}
        case RequestFinished():
            raise AssertionError("written by JsonLog itself")
        case _:  # its own members, those that say something
            return {name: value for name, value in msgspec.structs.asdict(event).items() if value not in ("", None)}


def _without(event: Notice, *names: str) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(event).items() if name not in names}


_GREEN: Final = "32"
_YELLOW: Final = "33"
_RED: Final = "31"
_GREY: Final = "90"


class FriendlyLog:
    """A subscriber of the bus for a person at a terminal: a short line per request, refusals in yellow."""

    def __init__(self, writer: LineWriter, scrubber: Scrubber, *, colour: bool, now: Clock = time.time) -> None:
        self._writer = writer
        self._scrubber = scrubber
        self._colour = colour
        self._now = now

    def __call__(self, event: Notice) -> None:
        match event:
            case RequestFinished():
                colour = (
                    _RED if event.status >= 500 or event.interrupted else _YELLOW if event.status >= 400 else _GREEN
                )
                self._print(colour, str(event.status), _summary(event))
            case RequestRefused():
                self._print(_YELLOW, str(event.status), f"{_path(event.route)}  {event.model}  refused: {event.code}")
            case ConnectionRefused():
                self._print(_YELLOW, str(event.status), f"connection refused: {event.code}")
            case InternalFault():
                text = f"internal error in {event.where}"
                self._print(_RED, "error", text, tracebacks.render(event.exc).splitlines())
            case ServerDraining():
                self._print(_GREY, "drain", f"finishing {event.in_flight} requests")
            case BudgetRefused():
                would = "" if event.mode == "enforce" else "would be "
                self._print(_YELLOW, "budget", f"{would}refused: {event.window} of {event.scope} {event.name} is full")
            case StoreDegraded():
                self._print(_RED, "store", f"away ({event.reason}): limits are divided by {event.processes}")
            case StoreRecovered():
                self._print(_GREEN, "store", f"back after {event.away:.1f} s, {event.replayed} settlements caught up")
            case StoreReset():
                self._print(_YELLOW, "store", f"began again, with what is remembered of {event.scopes} scopes")
            case KeysLost():
                self._print(_YELLOW, "keys", f"the store lost them: {event.known} stay valid here until this ends")
            case KeysStale():
                self._print(_RED, "keys", f"changes are not heard of ({event.reason})")
            case KeysFollowed():
                self._print(_GREEN, "keys", f"up to date again after {event.stale:.1f} s")
            case OwnershipLost():
                self._print(_YELLOW, "store", f"whose {event.objects} stored objects are was not kept")
            case StoreMisconfigured():
                text = f"the server will not do for long: version {event.version}, eviction {event.eviction}"
                self._print(_YELLOW, "store", text)
            case SettlementsLost():
                self._print(_RED, "store", f"{event.count} settlements were lost with the process")
            case LedgerStalled():
                self._print(_RED, "ledger", f"cannot be written ({event.reason}): {event.file}")
            case LedgerResumed():
                self._print(_GREEN, "ledger", f"is written again after {event.away:.1f} s: {event.file}")
            case LedgerRestored():
                self._print(_GREY, "ledger", f"{event.records} records of this month were found in {event.file}")
            case _:
                self._of_upstreams(event)

    def _of_upstreams(self, event: Notice) -> None:
        """What is between here and the models. (A command says itself that it started and stopped.)"""
        match event:
            case CircuitOpened():
                text = f"{event.provider}/{event.model} open by {event.scope}: {', '.join(event.why)}"
                self._print(_RED, "circuit", text)
            case CircuitHalfOpen():
                self._print(_YELLOW, "circuit", f"{event.provider}/{event.model} is probed by one request")
            case CircuitClosed():
                text = f"{event.provider}/{event.model} closed after {event.open_seconds:.1f} s"
                self._print(_GREEN, "circuit", text)
            case UpstreamRetried():
                text = f"{event.target} again after {event.wait * 1000:.0f} ms: {event.reason}"
                self._print(_YELLOW, "retry", text)
            case ContextTrimmed():
                would = "" if event.mode == "enforce" else "would be "
                text = (
                    f"{event.dropped} messages {would}removed: {event.before} -> {event.after} of {event.limit} tokens"
                )
                self._print(_GREY, "context", text)
            case UpstreamFailedOver():
                self._print(_YELLOW, "failover", f"{event.source} -> {event.target}: {event.reason}")

    def _print(self, colour: str, mark: str, text: str, more: list[str] | None = None) -> None:
        at = time.strftime("%H:%M:%S", time.localtime(self._now()))
        if self._colour:
            at, mark = f"\x1b[{_GREY}m{at}\x1b[0m", f"\x1b[{colour}m{mark}\x1b[0m"
        rows = "\n    ".join([printable(self._scrubber.scrub_text(row, MAX_LINE)) for row in (text, *(more or ()))])
        self._writer.write(f"{at}  {mark}  {rows}\n".encode("utf-8", "replace"))


def _summary(event: RequestFinished) -> str:
    parts = [_path(event.route), event.model, "stream" if event.stream else "plain"]
    if event.upstream_model and event.upstream_model != event.model:
        parts[1] = f"{event.model} -> {event.provider}/{event.upstream_model}"
    if event.usage is not None:
        parts.append(f"{'~' if event.usage.estimated else ''}{event.usage.input}+{event.usage.output} tokens")
    parts.append(f"{event.duration * 1000:.0f} ms")
    if event.disconnected:
        parts.append("client left")
    if event.error_code:
        parts.append(event.error_code)
    return "  ".join(parts)


def _path(route: str) -> str:
    return route.removeprefix("/v1/")


class Logging:
    """What `setup_logging` put in place. `close` writes what is left (2 s at most) and takes everything down again."""

    def __init__(self, writer: LineWriter, stdlib: StdlibLog) -> None:
        self.writer = writer
        self._stdlib = stdlib

    def close(self) -> bool:
        """False if lines were still waiting: the reader of the log does not read."""
        self._stdlib.uninstall()
        return self.writer.close(2.0)


def setup_logging(
    stream: IO[Any], scrubber: Scrubber, level: str = "info", *, plain: bool = False, now: Clock = time.time
) -> Logging:
    """Sends all logging, warnings and uncaught exceptions of the process to `stream`, scrubbed, never blocking.

    `level`: debug, info, warning, error or critical. `plain`: short lines for a person in place of JSON.
    """
    lines = Lines(scrubber, now)

    def notice(count: int) -> bytes:
        return lines.encode({"event": "log.dropped", "ts": lines.stamp(), "level": "warning", "count": count})

    writer = LineWriter(stream, notice)
    stdlib = StdlibLog(writer, Lines(scrubber, now), plain=plain)
    stdlib.install(LEVELS[level])
    return Logging(writer, stdlib)


def wants_colour(stream: IO[Any], environment: dict[str, str]) -> bool:
    """Whether to colour lines on `stream`: a terminal, and the user did not say NO_COLOR."""
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb" and stream.isatty()
