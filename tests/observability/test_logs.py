"""What leaves as a log line: whole JSON, no secret, nothing a terminal would obey, whoever wrote it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from canaries import ALL, ENCODINGS, Canary, base64s, leaks

from proxy.errors import UpstreamBroken
from proxy.observability.events import (
    Bus,
    ConnectionRefused,
    InternalFault,
    RequestFinished,
    RequestRefused,
    ServerDraining,
    ServerStarted,
    ServerStopped,
)
from proxy.observability.lines import MAX_LINE
from proxy.observability.logs import FriendlyLog, JsonLog, Logging, setup_logging, wants_colour
from proxy.observability.scrub import Scrubber
from proxy.observability.stdlib import log_loop_error
from proxy.observability.upstream_events import (
    CircuitClosed,
    CircuitHalfOpen,
    CircuitOpened,
    UpstreamFailedOver,
    UpstreamRetried,
)
from proxy.types import Usage

NOW = 1767225600.0 + 0.123456
KNOWING = Scrubber([canary.secret for canary in ALL])


class Sink:
    """A log file with everything installed; `read` is what has been written so far."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._path = path
        self._stream = path.open("w")
        scrubber = options.pop("scrubber", KNOWING)
        self.logging: Logging = setup_logging(self._stream, scrubber, now=lambda: NOW, **options)
        self.json = JsonLog(self.logging.writer, scrubber, level=options.get("level", "info"), now=lambda: NOW)
        self.friendly = FriendlyLog(self.logging.writer, scrubber, colour=False, now=lambda: NOW)

    def read(self) -> str:
        assert self.logging.writer.flush(10)
        return self._path.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.read().splitlines()]

    def close(self) -> None:
        assert self.logging.close()
        self._stream.close()


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    sink = Sink(tmp_path / "log")
    yield sink
    sink.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Sink]:
    sink = Sink(tmp_path / "plain", plain=True)
    yield sink
    sink.close()


def finished(**fields: Any) -> RequestFinished:
    return RequestFinished(
        **{
            "request_id": "req_1",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
            "route": "/v1/chat/completions",
            "tenant": "acme",
            "model": "gpt-4o*",
            "provider": "openai",
            "upstream_model": "gpt-4o-mini",
            "upstream_request_id": "req_2",
            "status": 200,
            "stream": True,
            "duration": 0.81234,
            "overhead": 0.00044,
            "upstream_duration": 0.8119,
            "time_to_first_token": 0.2,
            "usage": Usage(1200, 340, cache_read=1000, reasoning=12),
            "bytes_in": 1532,
            "bytes_out": 20231,
            "attempts": 1,
            "client": "10.2.3.4",
        }
        | fields
    )


def bare(**fields: Any) -> RequestFinished:
    return RequestFinished(
        request_id="r",
        trace_id="t",
        route="unmatched",
        tenant="other",
        model="other",
        status=200,
        duration=0.5,
        **fields,
    )


def test_the_line_of_a_finished_request(sink: Sink) -> None:
    sink.json(finished())
    assert sink.lines() == [
        {
            "event": "request.finished",
            "ts": "2026-01-01T00:00:00.123Z",
            "level": "info",
            "request_id": "req_1",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
            "route": "/v1/chat/completions",
            "tenant": "acme",
            "model": "gpt-4o*",
            "provider": "openai",
            "upstream_model": "gpt-4o-mini",
            "upstream_request_id": "req_2",
            "status": 200,
            "stream": True,
            "duration_ms": 812.3,
            "overhead_ms": 0.4,
            "upstream_duration_ms": 811.9,
            "time_to_first_token_ms": 200.0,
            "input_tokens": 1200,
            "output_tokens": 340,
            "cached_tokens": 1000,
            "reasoning_tokens": 12,
            "usage_estimated": False,
            "cost_usd": None,
            "bytes_in": 1532,
            "bytes_out": 20231,
            "attempts": 1,
            "client": "10.2.3.4",
        }
    ]


def test_what_does_not_apply_is_absent(sink: Sink) -> None:
    sink.json(bare())
    (line,) = sink.lines()
    assert None not in line.values()
    assert set(line) == {
        "event", "ts", "level", "request_id", "trace_id", "route", "tenant", "model", "status", "stream",
        "duration_ms", "bytes_in", "bytes_out", "attempts",
    }  # fmt: skip


def test_trouble_is_named_and_raises_the_level(sink: Sink) -> None:
    sink.json(finished(status=499, disconnected=True, error_code="client_disconnected"))
    sink.json(finished(interrupted=True, error_code="stream_interrupted", warnings=("no price",)))
    sink.json(finished(status=503))
    left, cut, failed = sink.lines()
    assert (left["level"], left["disconnected"], left["error_code"]) == ("info", True, "client_disconnected")
    assert (cut["level"], cut["interrupted"], cut["warnings"]) == ("warning", True, ["no price"])
    assert failed["level"] == "warning"


def test_the_rarer_events(sink: Sink) -> None:
    for event in (
        RequestRefused(
            request_id="r", trace_id="t", route="/v1/models", tenant="other", model="other", status=401,
            code="invalid_api_key", duration=0.0001, client="::1",
        ),
        ConnectionRefused(status=431, code="header_too_large"),
        ServerStarted(version="1.2.3", listen="127.0.0.1:8080", config_hash="abc"),
        ServerDraining(in_flight=3),
        ServerStopped(uptime=12.34, cut=1),
    ):  # fmt: skip
        sink.json(event)
    ts = {"ts": "2026-01-01T00:00:00.123Z"}
    assert sink.lines() == [
        {
            "event": "request.refused", "level": "warning", "request_id": "r", "trace_id": "t", "route": "/v1/models",
            "tenant": "other", "model": "other", "status": 401, "error_code": "invalid_api_key", "duration_ms": 0.1,
            "bytes_in": 0, "client": "::1", **ts,
        },
        {"event": "connection.refused", "level": "warning", "status": 431, "error_code": "header_too_large", **ts},
        {"event": "server.started", "level": "info", "version": "1.2.3", "listen": "127.0.0.1:8080",
         "config_hash": "abc", **ts},
        {"event": "server.draining", "level": "info", "in_flight": 3, **ts},
        {"event": "server.stopped", "level": "info", "uptime_ms": 12340.0, "cut": 1, **ts},
    ]  # fmt: skip


def test_circuits(sink: Sink) -> None:
    place = {"provider": "openai", "model": "gpt-4o", "mode": "enforce"}
    opened = CircuitOpened(was="closed", scope="fleet", why=("a:1: upstream_timeout",), open_ms=61_000, **place)
    for event in (
        opened,
        CircuitHalfOpen(was="open", **place),
        CircuitClosed(was="half_open", cause="success", open_seconds=61.5, **place),
    ):
        sink.json(event)
    first, second, third = sink.lines()
    assert (first["event"], first["level"], first["scope"]) == ("circuit.opened", "warning", "fleet")
    assert (first["why"], first["open_ms"], first["provider"]) == (["a:1: upstream_timeout"], 61_000, "openai")
    assert (second["event"], second["level"], second["was"]) == ("circuit.half_open", "info", "open")
    assert (third["event"], third["cause"], third["open_seconds"]) == ("circuit.closed", "success", 61.5)


def raised(exc: BaseException) -> BaseException:
    """The same exception with a traceback, two causes deep."""
    try:
        try:
            raise KeyError(*exc.args)
        except KeyError as cause:
            raise exc from cause
    except BaseException as caught:  # whatever it is: it is what was asked for
        return caught


def test_a_fault_is_logged_by_type_and_place_and_not_by_its_text(sink: Sink) -> None:
    sink.json(InternalFault(request_id="r", trace_id="t", where="the edge", exc=raised(ValueError("whatever"))))
    (line,) = sink.lines()
    assert (line["event"], line["level"], line["request_id"], line["where"]) == (
        "internal.error",
        "error",
        "r",
        "the edge",
    )
    first, frame, cause, *_ = line["traceback"].splitlines()
    assert first == "ValueError"
    assert frame.startswith("  ")
    assert "test_logs.py:" in frame
    assert frame.endswith(" in raised")
    assert cause == "caused by: KeyError"
    assert "whatever" not in sink.read()
    assert str(Path.cwd()) not in sink.read()


def test_safe_texts_stay_in_a_traceback(sink: Sink) -> None:
    group = ExceptionGroup("secret", [UpstreamBroken("the upstream closed", reason="closed"), OSError(24, "secret")])
    sink.json(InternalFault(where="x", exc=group))
    text = sink.lines()[0]["traceback"]
    assert "proxy.errors.UpstreamBroken: the upstream closed" in text
    assert "OSError: [EMFILE] Too many open files" in text
    assert "secret" not in text


def test_a_traceback_has_an_end(sink: Sink) -> None:
    def deeper(n: int) -> None:
        if n == 0:
            raise ValueError
        deeper(n - 1)

    with pytest.raises(ValueError) as caught:
        deeper(500)
    circle = caught.value
    circle.__cause__ = KeyError()
    circle.__cause__.__cause__ = circle
    sink.json(InternalFault(where="x", exc=circle))
    text = sink.lines()[0]["traceback"]
    assert "outer frames)" in text
    assert len(text.splitlines()) < 24


# -- secrets, by every way in ----------------------------------------------------------------------------------------


def by_event(sink: Sink, text: str) -> None:
    for field in ("request_id", "upstream_request_id", "upstream_model", "client", "error_code"):
        sink.json(finished(**{field: text}))
    sink.json(finished(warnings=("fine", text)))
    sink.friendly(finished(model=text, error_code=text))


def by_refusal(sink: Sink, text: str) -> None:
    event = RequestRefused(
        request_id=text,
        trace_id=text,
        route=text,
        tenant=text,
        model=text,
        status=400,
        code=text,
        duration=0,
        client=text,
    )
    sink.json(event)
    sink.friendly(event)


def by_message(sink: Sink, text: str) -> None:
    logging.getLogger("some.library").warning("saw %s", text)
    logging.getLogger("some.library").warning("saw %(it)s", {"it": text})
    logging.getLogger(text).warning("x")


def by_exception(sink: Sink, text: str) -> None:
    exc = raised(RuntimeError(text, {"headers": text}))
    exc.add_note(text)
    logging.getLogger("some.library").error("failed", exc_info=exc)
    logging.getLogger("some.library").error("failed: %s", exc)
    logging.getLogger("some.library").error(exc)
    fault = InternalFault(where="x", exc=exc)
    sink.json(fault)
    sink.friendly(fault)


def by_uvicorn(sink: Sink, text: str) -> None:
    logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=raised(OSError(5, text)))
    logging.getLogger("uvicorn.access").warning('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", f"/x?{text}", "1.1", 200)
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: %r", text)


def by_warning(sink: Sink, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn(f"do not use {text}", stacklevel=1)


def by_loop(sink: Sink, text: str) -> None:
    loop = asyncio.new_event_loop()
    log_loop_error(loop, {"message": "Task exception was never retrieved", "exception": raised(ValueError(text))})
    loop.close()


WAYS: list[Callable[[Sink, str], None]] = [
    by_event, by_refusal, by_message, by_exception, by_uvicorn, by_warning, by_loop,
]  # fmt: skip


@pytest.mark.parametrize("canary", ALL, ids=lambda canary: canary.name)
def test_no_way_in_leads_a_secret_out(canary: Canary, sink: Sink) -> None:
    forms = dict(base64s(canary.secret))
    for text in [encode(canary.text) for encode in ENCODINGS.values()] + [
        f"it was {form} then" for form in forms.values()
    ]:
        for way in WAYS:
            way(sink, text)
    written = sink.read()
    assert written.count("[redacted]") > 300
    assert not leaks(canary.secret, written)
    for form in forms.values():
        assert form[7:-7] not in written


def test_without_knowing_them_names_and_shapes_suffice(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "log", scrubber=Scrubber())
    for canary in ALL[:-6]:
        for way in WAYS:
            way(sink, canary.text)
    written = sink.read()
    sink.close()
    for canary in ALL[:-6]:
        assert canary.secret not in written, canary.name
        assert canary.secret[:12] not in written, canary.name


# -- forging, terminals, sizes ---------------------------------------------------------------------------------------

FORGED = 'x\n{"level":"info","event":"request.finished"}\r\n\x1b[31mred\x1b[0m \x9b2J \x7f \u2028 \u202e \ud800 \x00'


def test_no_text_makes_a_second_line_or_moves_a_cursor(sink: Sink, plain: Sink) -> None:
    by_event(sink, FORGED)
    by_refusal(plain, FORGED)
    logging.getLogger("x").warning("saw %s", FORGED)  # `plain` was installed last and has the root
    for row in sink.read().splitlines()[:-1]:
        assert json.loads(row)["event"] == "request.finished"
    for output in (sink.read(), plain.read()):
        assert "\x1b" not in output
        assert not set("\x9b\x7f\u2028\u202e\x00") & set(output)
    rows = plain.read().splitlines()
    assert [row[2] for row in rows if not row.startswith("{")] == [":", ":"]
    assert len(rows) == 3


def test_a_line_is_never_longer_than_8_kilobytes(sink: Sink) -> None:
    for text in ("a " * 100_000, "\x01" * 20_000, "🎉" * 10_000, '"\\' * 9000):
        sink.json(finished(upstream_request_id=text, warnings=(text,) * 40, client=text))
        logging.getLogger("x").error("%s", text, exc_info=raised(ValueError(text)))
    raw = sink.read().encode().splitlines(keepends=True)
    assert len(raw) == 8
    for line in raw:
        assert len(line) <= MAX_LINE
        assert json.loads(line)["level"] in ("info", "error")


def test_below_the_level_nothing_is_written(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "log", level="warning")
    sink.json(finished())
    sink.json(ServerDraining(in_flight=1))
    logging.getLogger("x").info("no")
    sink.json(finished(status=500))
    assert [line["status"] for line in sink.lines()] == [500]
    sink.close()


# -- the standard library --------------------------------------------------------------------------------------------


def test_a_record_of_the_standard_library_is_one_line(sink: Sink) -> None:
    logging.getLogger("some.library").info("hello %s, %d", "you", 3)
    assert sink.lines() == [
        {
            "event": "log", "ts": "2026-01-01T00:00:00.123Z", "level": "info", "logger": "some.library",
            "message": "hello you, 3",
        }
    ]  # fmt: skip


def test_a_record_that_cannot_be_formatted_neither_raises_nor_prints(tmp_path: Path, capfd: Any) -> None:
    sink = Sink(tmp_path / "log")
    logging.getLogger("x").warning("%d", ALL[0].secret)
    (line,) = sink.lines()
    assert line["message"] == "unprintable log record: TypeError"
    assert capfd.readouterr() == ("", "")
    sink.close()


def test_handlers_that_libraries_brought_are_silenced_and_given_back(tmp_path: Path, capfd: Any) -> None:
    noisy = logging.getLogger("uvicorn.error")
    handler = logging.StreamHandler(sys.stderr)
    noisy.addHandler(handler)
    noisy.propagate = False
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, logging.getLogger().handlers[:])
    sink = Sink(tmp_path / "log")
    noisy.error("once")
    assert [line["message"] for line in sink.lines()] == ["once"]
    assert capfd.readouterr().err == ""
    sink.close()
    assert noisy.handlers == [handler]
    assert noisy.propagate is False
    assert (sys.excepthook, threading.excepthook, sys.unraisablehook, logging.getLogger().handlers[:]) == hooks
    noisy.removeHandler(handler)
    noisy.propagate = True


def test_libraries_that_log_headers_are_kept_to_warnings(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "log", level="debug")
    logging.getLogger("hpack.hpack").debug("Decoded 62, authorization")
    logging.getLogger("httpx2").info("HTTP Request: POST https://x.example")
    logging.getLogger("some.library").debug("yes")
    assert [line["message"] for line in sink.lines()] == ["yes"]
    sink.close()


def test_an_exception_that_nobody_caught_in_a_thread_or_destructor_is_a_line(sink: Sink) -> None:
    class Grumpy:
        def __del__(self) -> None:
            raise ValueError(ALL[0].secret)

    def fail() -> None:
        raise ValueError(ALL[0].secret)

    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    grumpy = Grumpy()
    del grumpy
    in_thread, in_destructor = sink.lines()
    assert in_thread["message"] == "uncaught exception in thread worker"
    assert "ValueError" in in_thread["traceback"]
    assert "destructor" in in_destructor["message"]
    assert ALL[0].secret not in sink.read()


DYING = """
import sys
from proxy.observability.logs import setup_logging
from proxy.observability.scrub import Scrubber
setup_logging(sys.stderr, Scrubber())
def work():
    raise RuntimeError("hunter2 is my password")
work()
"""


def test_a_process_that_dies_says_so_in_the_log_and_does_not_quote() -> None:
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, timeout=60)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert done.returncode == 1
    assert (line["level"], line["message"]) == ("critical", "uncaught exception")
    assert "hunter2" not in done.stderr


async def fail_unseen() -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    loop.call_soon(lambda: (_ for _ in ()).throw(ValueError(ALL[0].secret)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def test_what_the_event_loop_has_to_complain_about_is_a_line(sink: Sink) -> None:
    asyncio.run(fail_unseen())
    (line,) = sink.lines()
    assert line["message"].startswith("event loop: Exception in callback")
    assert "ValueError" in line["traceback"]
    assert ALL[0].secret not in sink.read()


# -- for a person ----------------------------------------------------------------------------------------------------


def test_the_friendly_lines(plain: Sink) -> None:
    plain.friendly(finished())
    plain.friendly(finished(stream=False, upstream_model="", usage=Usage(3, 4, estimated=True), model="mock/echo"))
    plain.friendly(finished(status=499, disconnected=True, error_code="client_disconnected"))
    plain.friendly(
        RequestRefused(
            request_id="r", trace_id="t", route="/v1/models", tenant="o", model="other", status=401,
            code="invalid_api_key", duration=0,
        )
    )  # fmt: skip
    plain.friendly(ConnectionRefused(status=408, code="request_timeout"))
    plain.friendly(ServerDraining(in_flight=2))
    plain.friendly(ServerStarted(version="1", listen="x", config_hash="y"))
    texts = [line.split("  ", 1)[1] for line in plain.read().splitlines()]
    assert texts == [
        "200  chat/completions  gpt-4o* -> openai/gpt-4o-mini  stream  1200+340 tokens  812 ms",
        "200  chat/completions  mock/echo  plain  ~3+4 tokens  812 ms",
        "499  chat/completions  gpt-4o* -> openai/gpt-4o-mini  stream  1200+340 tokens  812 ms  client left"
        "  client_disconnected",
        "401  models  other  refused: invalid_api_key",
        "408  connection refused: request_timeout",
        "drain  finishing 2 requests",
    ]


def test_colour_only_where_somebody_sees_it(tmp_path: Path, plain: Sink) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, (tmp_path / "file").open("w") as file:
        assert wants_colour(terminal, {})
        assert wants_colour(terminal, {"NO_COLOR": ""})
        assert not wants_colour(terminal, {"NO_COLOR": "1"})
        assert not wants_colour(terminal, {"TERM": "dumb"})
        assert not wants_colour(file, {})
    os.close(ours)
    coloured = FriendlyLog(plain.logging.writer, KNOWING, colour=True, now=lambda: NOW)
    coloured(ConnectionRefused(status=408, code="request_timeout"))
    assert "\x1b[33m408\x1b[0m" in plain.read()


# -- the bus ---------------------------------------------------------------------------------------------------------


def test_everyone_is_told_in_order_whoever_fails(sink: Sink) -> None:
    seen: list[str] = []
    bus = Bus()

    def failing(event: object) -> None:
        seen.append("failing")
        raise ValueError(ALL[0].secret)

    bus.subscribe(lambda event: seen.append("first"))
    bus.subscribe(failing)
    bus.subscribe(lambda event: seen.append("last"))
    for _ in range(3):
        bus.emit(ServerDraining(in_flight=0))
    assert seen == ["first", "failing", "last"] * 3
    (line,) = sink.lines()  # said once, not three times
    assert line["level"] == "error"
    assert "failing failed on server.draining: ValueError" in line["message"]
    assert ALL[0].secret not in sink.read()


def test_a_cancellation_is_not_swallowed() -> None:
    bus = Bus()

    def cancelled(event: object) -> None:
        raise asyncio.CancelledError

    bus.subscribe(cancelled)
    with pytest.raises(asyncio.CancelledError):
        bus.emit(ServerDraining(in_flight=0))


ABOUT: dict[str, Any] = {"request_id": "r", "trace_id": "t", "tenant": "acme", "model": "gpt-4o*", "attempt": 2}


def test_what_was_tried_again_and_what_went_on_elsewhere(sink: Sink, plain: Sink) -> None:
    again = UpstreamRetried(**ABOUT, provider="a", target="a/m", reason="server_error", wait=0.25)
    over = UpstreamFailedOver(
        **ABOUT, from_provider="a", to_provider="b", source="a/m", target="b/m", reason="circuit_open"
    )
    for event in (again, over):
        sink.json(event)
        plain.friendly(event)
    common = {"level": "warning", "ts": "2026-01-01T00:00:00.123Z", **ABOUT}
    assert sink.lines() == [
        {**common, "event": "upstream.retried", "provider": "a", "target": "a/m", "reason": "server_error",
         "wait_ms": 250.0},
        {**common, "event": "upstream.failed_over", "from": "a", "to": "b", "source": "a/m", "target": "b/m",
         "reason": "circuit_open"},
    ]  # fmt: skip
    assert [line.split("  ", 1)[1] for line in plain.read().splitlines()] == [
        "retry  a/m again after 250 ms: server_error",
        "failover  a/m -> b/m: circuit_open",
    ]
