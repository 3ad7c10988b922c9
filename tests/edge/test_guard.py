"""The guarded protocol, through real sockets: what it refuses and how, what it lets by, and what a running request
hears when its client is lost."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.edge.connection import Connection
from proxy.edge.guard import GuardedProtocol
from proxy.edge.head import Limits

from .raw import PATIENCE, Answer, Site, Wire, eventually, serving

pytestmark = pytest.mark.slow

SMALL = Limits(head_bytes=4096, header_count=20, url_bytes=1024, body_bytes=100_000)
HASTY = Limits(head_seconds=0.8, body_seconds=0.8)
HOST = b"Host: a\r\n"
GOOD = b"GET /control HTTP/1.1\r\n" + HOST + b"\r\n"


async def read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def reply(send: Any, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def app(site: Site, scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Says what it heard. `/hold` waits to be told that its client is lost, `/early` answers before the body."""
    connection: Connection = scope["extensions"]["breakwater"]
    path = scope["path"]
    if path == "/early":
        await reply(send, b"early", 401)
    elif path == "/gate":
        await asyncio.to_thread(site.gate.wait, PATIENCE)
        await reply(send, b"open")
    elif path.startswith("/hold"):
        lost = asyncio.Event()

        def tell(reason: str) -> None:
            site.lost.append(reason)
            lost.set()

        connection.on_lost(tell)
        if path == "/hold-with-body":
            await read(receive)
        if path == "/hold-streaming":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await lost.wait()
        connection.off_lost(tell)
        connection.off_lost(tell)
    else:
        body = await read(receive)
        told = {"path": path, "raw": scope["raw_path"].decode(), "length": len(body)}
        told["names"] = [name.decode() for name, _ in scope["headers"]]
        await reply(send, json.dumps(told).encode())


@pytest.fixture(scope="module")
def roomy() -> Iterator[Site]:
    with serving(app, Limits()) as site:
        yield site


@pytest.fixture(scope="module")
def tight() -> Iterator[Site]:
    with serving(app, SMALL) as site:
        yield site


@pytest.fixture(scope="module")
def hasty() -> Iterator[Site]:
    with serving(app, HASTY) as site:
        yield site


def assert_refusal(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status, answer
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert (answer.error["type"], answer.error["code"]) == ("invalid_request_error", code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"]
    assert "server" not in answer.headers


def assert_works(site: Site) -> None:
    assert site.ask(GOOD).status == 200


def assert_refused_unheard(site: Site, data: bytes, status: int = 400, code: str = "invalid_request") -> None:
    """The whole contract of a refusal: the answer, then the end; nothing for the application; no harm to others."""
    site.clear()
    with site.wire() as wire:
        wire.offer(data)
        assert_refusal(wire.answer(), status, code)
        assert wire.rest() == b""
    assert site.heard == []
    assert site.refused == [(status, code)]
    assert_works(site)


def post(*fields: bytes, body: bytes = b"", target: bytes = b"/x", version: bytes = b"HTTP/1.1") -> bytes:
    return b"POST " + target + b" " + version + b"\r\n" + HOST + b"".join(f + b"\r\n" for f in fields) + b"\r\n" + body


def get(target: bytes, *fields: bytes) -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


CHUNKED = b"Transfer-Encoding: chunked"
ABC = b"3\r\nabc\r\n0\r\n\r\n"

FRAMING = {
    "01 length, then coding": post(b"Content-Length: 3", CHUNKED, body=ABC),
    "02 coding, then length": post(CHUNKED, b"Content-Length: 3", body=ABC),
    "03 two lengths, different": post(b"Content-Length: 3", b"Content-Length: 4", body=b"abcd"),
    "04 two lengths, equal": post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc"),
    "05 a list of lengths": post(b"Content-Length: 3, 3", body=b"abc"),
    "06 signed length": post(b"Content-Length: +3", body=b"abc"),
    "07 negative length": post(b"Content-Length: -1", body=b"abc"),
    "08 hex length": post(b"Content-Length: 0x3", body=b"abc"),
    "09 length with a blank": post(b"Content-Length: 3 3", body=b"abc"),
    "10 length of 20 digits": post(b"Content-Length: 99999999999999999999", body=b"abc"),
    "11 blank before the colon": post(b"Content-Length : 3", body=b"abc"),
    "12 unknown coding": post(b"Transfer-Encoding: xchunked", body=ABC),
    "13 chunked is not last": post(b"Transfer-Encoding: chunked, identity", body=ABC),
    "14 identity": post(b"Transfer-Encoding: identity", body=b"abc"),
    "15 control character before chunked": post(b"Transfer-Encoding: \x0bchunked", body=ABC),
    "16 two codings": post(CHUNKED, CHUNKED, body=ABC),
    "16a coded, then chunked": post(b"Transfer-Encoding: gzip, chunked", body=ABC),
    "17 coding in HTTP/1.0": post(CHUNKED, body=ABC, version=b"HTTP/1.0"),
    "18 chunk extension of 20 KB": post(CHUNKED, body=b"3;e=" + b"x" * 20_000 + b"\r\nabc\r\n0\r\n\r\n"),
    "18a trailers of 20 KB": post(CHUNKED, body=b"3\r\nabc\r\n0\r\nx-t: " + b"x" * 20_000 + b"\r\n\r\n"),
    "19 wrong chunk end": post(CHUNKED, body=b"3\r\nabcXX0\r\n\r\n"),
    "20 chunks with bare LF": post(CHUNKED, body=b"3\nabc\n0\n\n"),
    "21 chunk size with 0x": post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
    "22 chunk size of 17 digits": post(CHUNKED, body=b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
    "23 a length as trailer": post(CHUNKED, body=b"3\r\nabc\r\n0\r\nContent-Length: 9\r\n\r\n"),
    "24 folded header": get(b"/x", b"a: b\r\n c"),
    "25 head with bare LF": b"GET /x HTTP/1.1\nHost: a\n\n",
    "26 bare CR": get(b"/x", b"a: b\rc: d"),
    "27 NUL in a value": get(b"/x", b"a: b\x00c"),
    "28 no Host": b"GET /x HTTP/1.1\r\n\r\n",
    "29 two Hosts": get(b"/x", b"Host: a"),
    "30 HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "31 upgrade to h2c": get(b"/x", b"Connection: upgrade", b"Upgrade: h2c"),
    "31a upgrade to websocket": get(b"/x", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
    "31b upgrade, unannounced": get(b"/x", b"Upgrade: h2c"),
    "31c tunnel": b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
    "31d tunnel to a path": b"CONNECT /x HTTP/1.1\r\n" + HOST + b"\r\n",
    "no version": b"GET /x\r\n\r\n",
    "HTTP/0.9": b"GET /x HTTP/0.9\r\n" + HOST + b"\r\n",
    "HTTP/2.0 in words": b"GET /x HTTP/2.0\r\n" + HOST + b"\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
}

PLACES = {
    "34 path in Host": b"GET /x HTTP/1.1\r\nHost: a/health?\r\n\r\n",
    "35 fragment in Host": b"GET /x HTTP/1.1\r\nHost: a#\r\n\r\n",
    "35a user in Host": b"GET /x HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "35b empty Host": b"GET /x HTTP/1.1\r\nHost:\r\n\r\n",
    "35c list in Host": b"GET /x HTTP/1.1\r\nHost: a b\r\n\r\n",
    "35d Host of 300 bytes": b"GET /x HTTP/1.1\r\nHost: " + b"a" * 300 + b"\r\n\r\n",
    "36 absolute form": get(b"http://evil/x"),
    "36a asterisk": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "36b fragment": get(b"/x#y"),
    "37 authority in the path": get(b"//evil/x"),
    "38 encoded dots": get(b"/v1/%2e%2e/admin"),
    "38a plain dots": get(b"/v1/../admin"),
    "38b one dot": get(b"/v1/./chat"),
    "38c dots at the end": get(b"/v1/.."),
    "39 dots with a parameter": get(b"/v1/..;/admin"),
    "40 encoded NUL": get(b"/v1/%00"),
    "40a encoded line end": get(b"/v1/%0d%0ax"),
    "40b raw NUL": get(b"/v1/\x00"),
    "40c raw Latin-1": get(b"/v1/\xe9"),
    "40d encoded bytes that are not UTF-8": get(b"/v1/%ff"),
    "40e half an escape": get(b"/v1/%2"),
    "41 encoded slashes around dots": get(b"/v1/models/..%2f..%2fadmin"),
    "41a encoded twice": get(b"/v1/%252e%252e/admin"),
    "41b backslash": get(b"/v1\\..\\admin"),
    "41c encoded backslash": get(b"/v1/%5c"),
    "42 URL over its limit": get(b"/" + b"u" * 9000),
    "42a URL of 100 KB": get(b"/" + b"u" * 100_000),
    "43 header of 70 KB": get(b"/x", b"a: " + b"b" * 70_000),
    "43a header of 1 MB": get(b"/x", b"a: " + b"b" * 1_000_000),
    "44 101 headers": get(b"/x", *[b"a: b"] * 100),
    "44a 20,000 headers": get(b"/x", *[b"a%d: b" % n for n in range(20_000)]),
    "46 id with a line end": get(b"/x", b"X-Request-Id: a\x0d\x0bb"),
    "47 content_length": post(b"content_length: 3", body=b""),
    "47a Transfer_Encoding": post(b"Transfer_Encoding: chunked", body=b""),
    "47b x_api_key": post(b"X_Api_Key: k", body=b""),
}


@pytest.mark.parametrize("data", FRAMING.values(), ids=FRAMING)
def test_refuses_ambiguous_framing(roomy: Site, data: bytes) -> None:
    assert_refused_unheard(roomy, data)


@pytest.mark.parametrize("data", PLACES.values(), ids=PLACES)
def test_refuses_ambiguous_paths_and_headers(roomy: Site, data: bytes) -> None:
    assert_refused_unheard(roomy, data)


SHORT_ONES = {name: data for name, data in (FRAMING | PLACES).items() if len(data) < 500}


@pytest.mark.parametrize("data", SHORT_ONES.values(), ids=SHORT_ONES)
def test_refuses_the_same_on_a_used_connection_and_byte_by_byte(roomy: Site, data: bytes) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(GOOD)
        assert wire.answer().status == 200
        for position in range(len(data)):
            if not wire.offer(data[position : position + 1]):
                break
        assert_refusal(wire.answer(), 400, "invalid_request")
        wire.rest()
    # Its head may have been good, and its body refused: then the application was told.
    assert len(roomy.heard) in (1, 2)
    assert_works(roomy)


GOOD_ONES = {
    "a length": (post(b"Content-Length: 3", body=b"abc"), {"length": 3}),
    "chunked": (post(CHUNKED, body=ABC), {"length": 3}),
    "chunked, in capitals and blanks": (post(b"Transfer-Encoding:  Chunked ", body=ABC), {"length": 3}),
    "chunks of one byte": (post(CHUNKED, body=b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n"), {"length": 5000}),
    "a short extension": (post(CHUNKED, body=b"3;a=b\r\nabc\r\n0\r\n\r\n"), {"length": 3}),
    "no body": (post(), {"length": 0}),
    "45 Connection names our headers": (
        get(b"/x", b"Connection: Authorization, X-Api-Key", b"Authorization: Bearer k"),
        {"names": ["host", "connection", "authorization"]},
    ),
    "46 forwarding headers are only headers": (
        get(
            b"/x",
            b"X-Forwarded-For: 1.2.3.4",
            b"Forwarded: for=1.2.3.4",
            b"X-Tenant: t",
            b"X-Request-Id: " + b"i" * 10_000,
        ),
        {"names": ["host", "x-forwarded-for", "forwarded", "x-tenant", "x-request-id"]},
    ),
    "41 an encoded slash arrives decoded, and raw": (
        get(b"/v1/models/a%2Fb"),
        {"path": "/v1/models/a/b", "raw": "/v1/models/a%2Fb"},
    ),
    "letters beyond ASCII": (get(b"/v1/models/%C3%A9"), {"path": "/v1/models/\xe9"}),
    "dots that are no segment": (get(b"/v1/models/gpt-4.1..x"), {"path": "/v1/models/gpt-4.1..x"}),
    "dots in the query": (get(b"/x?a=/../%2e%00"), {"path": "/x"}),
    "Host of an IPv6 address": (b"GET /x HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", {"path": "/x"}),
    "Host with blanks after it": (b"GET /x HTTP/1.1\r\nHost: a:80 \t\r\n\r\n", {"path": "/x"}),
    "HTTP/1.0 without Host": (b"GET /x HTTP/1.0\r\n\r\n", {"path": "/x"}),
    "line ends before the request": (b"\r\n\r\n" + GOOD, {"path": "/control"}),
    "100 headers": (get(b"/x", *[b"a: b"] * 99), {"path": "/x"}),
    "URL at its limit": (get(b"/" + b"u" * 8191), {"path": "/" + "u" * 8191}),
}


@pytest.mark.parametrize(("data", "told"), GOOD_ONES.values(), ids=GOOD_ONES)
def test_lets_by(roomy: Site, data: bytes, told: dict[str, Any]) -> None:
    roomy.clear()
    answer = roomy.ask(data)
    assert answer.status == 200
    heard = json.loads(answer.body)
    assert {key: heard[key] for key in told} == told
    assert roomy.refused == []


def test_a_trailer_never_becomes_a_header(roomy: Site) -> None:
    trailers = b"3\r\nabc\r\n0\r\nAuthorization: Bearer other\r\nHost: b\r\n\r\n"
    with roomy.wire() as wire:
        wire.send(post(CHUNKED, body=trailers) + GOOD)
        first, second = wire.answer(), wire.answer()
    assert json.loads(first.body)["names"] == ["host", "transfer-encoding"]
    assert json.loads(second.body)["names"] == ["host"]
    assert [name for name, _ in roomy.heard[-2]["headers"]] == [b"host", b"transfer-encoding"]


def test_the_refusal_keeps_a_harmless_request_id(roomy: Site) -> None:
    assert roomy.ask(get(b"//x", b"X-Request-Id: mine-1")).headers["x-request-id"] == "mine-1"
    assert roomy.ask(get(b"//x", b"X-Request-Id: not mine")).headers["x-request-id"] != "not mine"


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_a_head_that_never_ends_is_cut_at_its_bound(roomy: Site) -> None:
    roomy.clear()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with roomy.wire() as wire:
        wire.send(b"GET /x HTTP/1.1\r\nHost: a\r\nx-endless: ")
        sent = 0
        while sent < 40_000_000 and wire.offer(b"b" * 100_000):
            sent += 100_000
        after = resource.getrusage(resource.RUSAGE_SELF)
        wire.rest()
    assert roomy.refused == [(400, "invalid_request")]
    # Unbounded, 40 MB cost some 40 MB of memory and, copied over and over, many seconds.
    assert after.ru_maxrss - before.ru_maxrss < 20_000
    assert after.ru_utime - before.ru_utime < 5
    assert roomy.heard == []
    assert_works(roomy)


def test_the_head_is_counted_over_its_reads(tight: Site) -> None:
    tight.clear()
    with tight.wire() as wire:
        wire.send(b"GET /x HTTP/1.1\r\nHost: a\r\n")
        for number in range(15):
            wire.offer(b"x-%d: " % number + b"b" * 400 + b"\r\n")
            time.sleep(0.002)
        wire.offer(b"\r\n")
        assert_refusal(wire.answer(), 400, "invalid_request")
    assert tight.heard == []


def test_a_pipelined_head_behind_a_large_body_has_its_own_count(tight: Site) -> None:
    with tight.wire() as wire:
        wire.send(post(b"Content-Length: 60000", body=b"b" * 60_000) + get(b"/second", b"a: " + b"b" * 2000))
        assert json.loads(wire.answer().body)["length"] == 60_000
        assert json.loads(wire.answer().body)["path"] == "/second"


def test_a_declared_length_over_the_cap_is_refused_before_its_body(tight: Site) -> None:
    assert_refused_unheard(tight, post(b"Content-Length: 100001"), 413, "request_too_large")


def test_the_refusal_of_a_large_body_reaches_a_client_that_sends_all_of_it_first(roomy: Site) -> None:
    size = 25_000_000
    with roomy.wire() as wire:
        assert wire.offer(post(b"Content-Length: %d" % size))
        piece = b"b" * 250_000
        assert all(wire.offer(piece) for _ in range(size // len(piece)))
        assert_refusal(wire.answer(), 413, "request_too_large")


def test_a_chunked_body_over_the_cap_is_refused_and_the_application_told(tight: Site) -> None:
    tight.clear()
    with tight.wire() as wire:
        wire.send(post(CHUNKED, target=b"/hold-with-body"))
        eventually(lambda: tight.heard)
        for _ in range(11):
            wire.offer(b"2710\r\n" + b"b" * 10_000 + b"\r\n")
        assert_refusal(wire.answer(), 413, "request_too_large")
        assert wire.rest() == b""
    eventually(lambda: tight.lost)
    assert tight.lost == ["too_large"]
    assert tight.refused == []
    assert_works(tight)


def test_a_chunked_body_over_the_cap_in_one_read_is_never_heard(tight: Site) -> None:
    body = b"186a1\r\n" + b"b" * 100_001 + b"\r\n0\r\n\r\n"
    tight.clear()
    with tight.wire() as wire:
        wire.offer(post(CHUNKED, body=body))
        assert_refusal(wire.answer(), 413, "request_too_large")
    # How the kernel cuts it into reads decides whether the application had heard of its head.
    assert bool(tight.heard) != bool(tight.refused)


def test_a_body_at_the_cap_passes(tight: Site) -> None:
    answer = tight.ask(post(b"Content-Length: 100000", body=b"b" * 100_000))
    assert json.loads(answer.body)["length"] == 100_000
    answer = tight.ask(post(CHUNKED, body=b"186a0\r\n" + b"b" * 100_000 + b"\r\n0\r\n\r\n"))
    assert json.loads(answer.body)["length"] == 100_000


@pytest.mark.parametrize("start", [b"0\r\nx-t: ", b"3;e="], ids=["trailer", "extension"])
def test_framing_that_never_ends_is_cut(roomy: Site, start: bytes) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(post(CHUNKED, target=b"/hold-with-body", body=b"3\r\nabc\r\n" + start))
        eventually(lambda: roomy.heard)
        sent = 0
        while not roomy.lost and sent < 40_000_000:
            wire.offer(b"b" * 10_000)
            sent += 10_000
        eventually(lambda: roomy.lost)
        assert_refusal(wire.answer(), 400, "invalid_request")
    assert roomy.lost == ["malformed"]
    assert_works(roomy)


def test_a_refusal_reads_on_although_the_body_had_paused_it(roomy: Site) -> None:
    """The loop is held up while the client sends, so that one read brings both the large body and its fault."""
    roomy.clear()
    assert roomy.loop is not None
    with roomy.wire() as wire:
        roomy.loop.call_soon_threadsafe(time.sleep, 0.3)
        wire.send(post(CHUNKED, target=b"/gate", body=b"186a0\r\n" + b"b" * 100_000 + b"\r\nno size\r\n"))
        assert all(wire.offer(b"b" * 250_000) for _ in range(80))
        roomy.gate.set()
        assert_refusal(wire.answer(), 400, "invalid_request")


def test_malformed_chunks_after_the_application_heard(roomy: Site) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(post(CHUNKED, target=b"/hold-with-body", body=b"3\r\nabc\r\n"))
        eventually(lambda: roomy.heard)
        wire.send(b"no size\r\n")
        assert_refusal(wire.answer(), 400, "invalid_request")
    eventually(lambda: roomy.lost)
    assert roomy.lost == ["malformed"]


# --- times ----------------------------------------------------------------------------------------------------------


def test_a_slow_head_is_refused_at_its_deadline(hasty: Site) -> None:
    hasty.clear()
    started = time.monotonic()
    with hasty.wire() as wire:
        wire.send(b"GET /x HTTP/1.1\r\nHost: a\r\nx-slow: ")
        while not hasty.refused and wire.offer(b"b"):
            time.sleep(0.02)
        assert_refusal(wire.answer(), 408, "request_timeout")
        assert wire.rest() == b""
    assert time.monotonic() - started >= HASTY.head_seconds * 0.9
    assert hasty.heard == []
    assert hasty.refused == [(408, "request_timeout")]
    assert_works(hasty)


def test_a_slow_second_head_has_the_same_deadline(hasty: Site) -> None:
    hasty.clear()
    with hasty.wire() as wire:
        wire.send(post(b"Content-Length: 3", body=b"a"))
        eventually(lambda: hasty.heard)
        wire.send(b"bc")
        assert wire.answer().status == 200
        time.sleep(HASTY.head_seconds * 1.5)  # rest is part of neither body nor head
        wire.send(GOOD[:20])
        assert_refusal(wire.answer(), 408, "request_timeout")
    assert len(hasty.heard) == 1


def test_a_connection_without_a_request_is_closed_silently(hasty: Site) -> None:
    hasty.clear()
    with hasty.wire() as silent, hasty.wire() as blank:
        blank.send(b"\r\n\r\n")
        assert silent.rest() == b""
        assert blank.rest() == b""
    assert hasty.refused == []


def test_rest_between_requests_ends_silently() -> None:
    with serving(app, Limits(keep_alive_seconds=0.3)) as site, site.wire() as wire:
        wire.send(GOOD)
        assert wire.answer().status == 200
        wire.offer(b"\r\n")  # is no request, and buys no time
        assert wire.rest() == b""
        assert site.refused == []


def test_keep_alive_does_not_end_a_request_in_progress() -> None:
    with serving(app, Limits(keep_alive_seconds=0.8)) as site, site.wire() as wire:
        for _ in range(2):
            wire.send(GOOD[:10])
            time.sleep(0.02)
            wire.send(GOOD[10:])
            assert wire.answer().status == 200
        wire.send(get(b"/hold"))
        time.sleep(1.2)
        assert site.lost == []


def test_a_short_deadline_overtakes_a_long_one() -> None:
    with serving(app, Limits(head_seconds=3600, body_seconds=0.3)) as site, site.wire() as wire:
        wire.send(post(b"Content-Length: 10", body=b"b"))
        assert_refusal(wire.answer(), 408, "request_timeout")


def test_a_long_deadline_replaces_a_short_one() -> None:
    with serving(app, Limits(head_seconds=1.5)) as site, site.wire() as wire:
        time.sleep(0.4)
        wire.send(post(b"Content-Length: 2", body=b"b"))
        time.sleep(1.4)
        wire.send(b"b")
        assert wire.answer().status == 200


def test_a_client_that_never_closes_is_cut_after_its_refusal() -> None:
    with serving(app, Limits()) as site, site.wire() as wire:
        wire.send(get(b"//x"))
        assert_refusal(wire.answer(), 400, "invalid_request")
        assert wire.rest() == b""
        assert connected(site)
        eventually(lambda: not connected(site))


def test_keep_alive_does_not_end_a_head_in_progress() -> None:
    with serving(app, Limits(keep_alive_seconds=0.8)) as site, site.wire() as wire:
        wire.send(GOOD)
        assert wire.answer().status == 200
        wire.send(GOOD[:10])
        time.sleep(1.2)
        wire.send(GOOD[10:])
        assert wire.answer().status == 200


def test_time_in_which_the_application_does_not_read_is_not_the_clients(hasty: Site) -> None:
    hasty.clear()
    hasty.gate.clear()
    with hasty.wire() as wire:
        wire.send(post(b"Content-Length: 300000", target=b"/gate", body=b"b" * 300_000))
        time.sleep(HASTY.body_seconds * 1.5)
        hasty.gate.set()
        assert wire.answer().status == 200
    assert hasty.refused == []


@pytest.mark.parametrize("field", [b"Content-Length: 10", b"Transfer-Encoding: chunked"])
def test_a_slow_body_is_refused_at_its_deadline_and_the_application_told(hasty: Site, field: bytes) -> None:
    hasty.clear()
    with hasty.wire() as wire:
        wire.send(post(field, target=b"/hold-with-body", body=b"3"))
        assert_refusal(wire.answer(), 408, "request_timeout")
        assert wire.rest() == b""
    assert hasty.lost == ["body_timeout"]
    assert hasty.refused == []
    assert_works(hasty)


def test_32_expect_continue_then_silence(hasty: Site) -> None:
    hasty.clear()
    with hasty.wire() as wire:
        wire.send(post(b"Content-Length: 3", b"Expect: 100-continue"))
        assert wire.head()[0] == 100
        assert_refusal(wire.answer(), 408, "request_timeout")


def test_expect_continue_then_the_body(roomy: Site) -> None:
    with roomy.wire() as wire:
        wire.send(post(b"Content-Length: 3", b"Expect: 100-continue"))
        assert wire.head()[0] == 100
        wire.send(b"abc")
        assert wire.answer().status == 200


def test_a_body_that_nobody_wants_has_a_deadline_too(hasty: Site) -> None:
    hasty.clear()
    with hasty.wire() as wire:
        wire.send(post(b"Content-Length: 10", target=b"/early", body=b"b"))
        assert wire.answer().status == 401
        assert wire.rest() == b""
    assert hasty.refused == []


def test_a_body_deadline_in_the_middle_of_the_answer_cuts_it(hasty: Site) -> None:
    hasty.clear()
    with hasty.wire() as wire:
        wire.send(post(b"Content-Length: 10", target=b"/hold-streaming", body=b"b"))
        rest = wire.rest()
    assert rest.endswith(b"\r\n5\r\nfirst\r\n")
    assert hasty.lost == ["body_timeout"]


def sockets_of(site: Site) -> list[list[str]]:
    """The kernel's rows of connections to the server, from both ends: local, remote, state, queues, …, inode."""
    rows = [line.split()[1:10] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{site.port:04X}"
    return [row for row in rows if row[2] != "0A" and (row[0].endswith(port) or row[1].endswith(port))]


def nothing_in_flight(site: Site) -> bool:
    """Whether the server has read every byte that was sent to it."""
    return all(row[3] == "00000000:00000000" for row in sockets_of(site))


def connected(site: Site) -> bool:
    """Whether the server's process holds a connection."""
    return any(row[0].endswith(f":{site.port:04X}") and row[8] != "0" for row in sockets_of(site))


# --- order ----------------------------------------------------------------------------------------------------------


def test_33_a_thousand_pipelined_requests_are_answered_in_order_as_far_as_they_are(roomy: Site) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.offer(b"".join(get(b"/%d" % number) for number in range(1000)))
        answers = [wire.answer()]
        while "connection" not in answers[-1].headers:
            answers.append(wire.answer())
        wire.rest()
    paths = [json.loads(answer.body)["path"] for answer in answers]
    assert paths == [f"/{number}" for number in range(len(paths))]
    assert len(paths) >= 33
    assert answers[-1].headers["connection"] == "close"
    assert roomy.refused == []
    assert_works(roomy)


def test_a_few_pipelined_requests_are_all_answered(roomy: Site) -> None:
    with roomy.wire() as wire:
        for _ in range(3):
            wire.send(b"".join(post(b"Content-Length: 3", body=b"abc", target=b"/%d" % n) for n in range(33)))
            assert [json.loads(wire.answer().body)["path"] for _ in range(33)] == [f"/{n}" for n in range(33)]


def test_a_refusal_waits_for_the_answers_before_it(roomy: Site) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(get(b"/1") + get(b"/2") + get(b"//evil") + get(b"/4"))
        assert json.loads(wire.answer().body)["path"] == "/1"
        assert json.loads(wire.answer().body)["path"] == "/2"
        assert_refusal(wire.answer(), 400, "invalid_request")
        assert wire.rest() == b""
    assert roomy.refused == [(400, "invalid_request")]
    assert len(roomy.heard) == 2


def test_a_refused_body_in_the_queue_does_not_disturb_the_running_request(roomy: Site) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(get(b"/1") + post(CHUNKED, body=b"no size\r\n"))
        assert json.loads(wire.answer().body)["path"] == "/1"
        assert_refusal(wire.answer(), 400, "invalid_request")
    assert len(roomy.heard) == 1
    assert roomy.lost == []


def test_a_large_body_behind_a_running_request_is_not_waited_for(roomy: Site) -> None:
    roomy.clear()
    roomy.gate.clear()
    with roomy.wire() as wire:
        wire.send(get(b"/gate") + get(b"/2") + post(b"Content-Length: 500000", body=b"b" * 500_000))
        eventually(lambda: roomy.heard and nothing_in_flight(roomy))
        roomy.gate.set()
        assert wire.answer().headers.get("connection") is None
        last = wire.answer()
        assert json.loads(last.body)["path"] == "/2"
        assert last.headers["connection"] == "close"
        assert wire.rest() == b""
    assert len(roomy.heard) == 2
    assert roomy.refused == []


def test_a_client_that_left_behind_a_large_pipelined_body_is_noticed(roomy: Site) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(get(b"/hold") + post(b"Content-Length: 500000", body=b"b" * 500_000))
        eventually(lambda: roomy.heard and nothing_in_flight(roomy))
        wire.reset()
        eventually(lambda: roomy.lost)
    assert roomy.lost == ["gone"]
    assert len(roomy.heard) == 1


# --- hang-ups -------------------------------------------------------------------------------------------------------


def leave_with_fin(wire: Wire) -> None:
    wire.socket.close()


def leave_by_half(wire: Wire) -> None:
    wire.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [leave_with_fin, leave_by_half, Wire.reset])
@pytest.mark.parametrize(
    "data",
    [
        get(b"/hold"),
        get(b"/hold-streaming"),
        post(b"Content-Length: 10", target=b"/hold-with-body", body=b"b"),
        post(b"Content-Length: 3", target=b"/hold-with-body", body=b"abc"),
        post(b"Content-Length: 300000", target=b"/hold-with-body", body=b"b" * 300_000),
        get(b"/hold") + GOOD * 20,
        get(b"/hold") + GOOD * 1000,
    ],
    ids=["waiting", "streaming", "mid-body", "after the body", "after a large body", "pipelined", "pipelined 1000"],
)
def test_the_running_request_hears_that_its_client_left(roomy: Site, data: bytes, leave: Any) -> None:
    roomy.clear()
    with roomy.wire() as wire:
        wire.send(data)
        eventually(lambda: roomy.heard)
        leave(wire)
        eventually(lambda: roomy.lost)
    assert roomy.lost == ["gone"]
    assert len(roomy.heard) == 1
    assert_works(roomy)


async def forgetful(site: Site, scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Never takes its callback back."""
    path = scope["path"]
    lost = asyncio.Event()
    scope["extensions"]["breakwater"].on_lost(lambda reason: (site.lost.append(path + " " + reason), lost.set()))
    if path == "/hold":
        await lost.wait()
    else:
        await reply(send, b"ok")


def test_a_client_that_leaves_after_the_answer_is_not_news() -> None:
    with serving(forgetful, Limits()) as site:
        with site.wire() as wire:
            for _ in range(2):
                wire.send(GOOD)
                assert wire.answer().status == 200
        eventually(lambda: not connected(site))
        assert site.lost == []


def test_a_request_hears_nothing_of_the_next_ones_client() -> None:
    with serving(forgetful, Limits()) as site:
        with site.wire() as wire:
            wire.send(GOOD)
            assert wire.answer().status == 200
            wire.send(get(b"/hold"))
            eventually(lambda: len(site.heard) == 2)
        eventually(lambda: not connected(site))
        assert site.lost == ["/hold gone"]


def test_only_the_first_reason_is_told() -> None:
    with serving(forgetful, Limits(body_seconds=0.3)) as site:
        with site.wire() as wire:
            wire.send(post(b"Content-Length: 3", target=b"/hold"))
            assert_refusal(wire.answer(), 408, "request_timeout")
        eventually(lambda: not connected(site))
        assert site.lost == ["/hold body_timeout"]


def test_a_lost_connection_leaves_nothing_for_the_collector(roomy: Site) -> None:
    def alive() -> int:
        return sum(isinstance(thing, GuardedProtocol) for thing in gc.get_objects())

    eventually(lambda: gc.collect() >= 0 and alive() == 0)
    gc.disable()
    try:
        for data in (GOOD, get(b"//x"), get(b"/hold"), get(b"/hold") + GOOD * 3, b""):
            with roomy.wire() as wire:
                wire.send(data)
                if data in (GOOD, get(b"//x")):
                    wire.answer()
        eventually(lambda: alive() == 0)
    finally:
        gc.enable()


def test_who_asks_late_is_told_at_once() -> None:
    async def late(site: Site, scope: dict[str, Any], receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope["extensions"]["breakwater"].on_lost(site.lost.append)
        site.lost.append("returned")

    with serving(late, Limits()) as site:
        with site.wire() as wire:
            wire.send(GOOD)
            eventually(lambda: site.heard)
        eventually(lambda: len(site.lost) == 2)
        assert site.lost == ["gone", "returned"]


def test_abort_cuts_the_connection() -> None:
    async def aborting(site: Site, scope: dict[str, Any], receive: Any, send: Any) -> None:
        scope["extensions"]["breakwater"].on_lost(site.lost.append)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        scope["extensions"]["breakwater"].abort()
        while (await receive())["type"] != "http.disconnect":
            pass

    with serving(aborting, Limits()) as site, site.wire() as wire:
        wire.send(GOOD)
        wire.socket.settimeout(PATIENCE)
        assert not wire.rest().endswith(b"\r\n0\r\n\r\n")
        eventually(lambda: site.lost)
        assert site.lost == ["gone"]


def narrow(site: Site) -> Wire:
    """A client with a small receive buffer, so that little of an answer is out of our hands."""
    wire = site.wire()
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return wire


def test_a_client_that_takes_nothing_of_its_answer_is_cut() -> None:
    with serving(pieces, Limits(write_seconds=0.5)) as site, narrow(site) as wire:
        wire.send(GOOD)
        eventually(lambda: site.lost == ["gone"])


def test_a_client_that_takes_its_answer_slowly_is_served() -> None:
    with serving(pieces, Limits(write_seconds=0.5)) as site, narrow(site) as wire:
        wire.send(GOOD)
        wire.until(b"\r\n\r\n")
        started = time.monotonic()
        while time.monotonic() - started < 2.0:
            wire.exactly(2000)
            time.sleep(0.02)
        assert site.lost == []


async def pieces(site: Site, scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An answer without end, written as fast as the client takes it."""
    connection: Connection = scope["extensions"]["breakwater"]
    task = asyncio.current_task()
    assert task is not None

    def tell(reason: str) -> None:
        site.lost.append(reason)
        task.cancel()

    connection.on_lost(tell)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    try:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    except asyncio.CancelledError:
        pass
