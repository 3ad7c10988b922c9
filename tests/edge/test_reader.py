"""The reader alone: however its input is cut into reads, it says the same; whatever its input is, it says something."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.edge.head import ChunkAudit, Limits, Target
from proxy.edge.reader import IDLE, Reader, Stop
from proxy.edge.refusals import CHUNK_FRAMING, HEAD_TOO_LARGE, MALFORMED
from proxy.errors import ProxyError

LIMITS = Limits(head_bytes=500, header_count=10, url_bytes=100, body_bytes=1000)


class Heard:
    """A sink that keeps what it hears. Bodies are joined: their cut is the network's business."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.stop = False
        self.reader = Reader(self, LIMITS)

    def begin(self, method: str, version: str, target: Target, keep_alive: bool) -> None:
        if self.stop:
            raise Stop
        self.events.append((method, version, target, keep_alive, list(self.reader.headers)))
        self.events.append(b"")

    def body(self, data: bytes) -> None:
        self.events[-1] += data

    def complete(self) -> None:
        self.events.append("complete")


def hear(*reads: bytes) -> tuple[list[Any], ProxyError | None]:
    heard = Heard()
    for data in reads:
        fault = heard.reader.feed(data)
        if fault is not None:
            return heard.events, fault
    return heard.events, None


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % len(data) for place in places} - {0}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


STREAMS = [
    b"POST /v1/chat?x=%2e HTTP/1.1\r\nHost: a:80\r\nContent-Length: 5\r\n\r\nhello" * 3,
    b"\r\nGET /a%20b HTTP/1.0\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    b"5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nHost: b\r\nX-T: t\r\n\r\n"
    b"GET /b HTTP/1.1\r\nhOST: a\r\nEmpty:\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200 + b"0\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nwhatever follows is ignored",
]
FAULTY = [
    b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET //b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX",
    b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 500 + b"\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 10 + b"\r\n",
    b"GET /" + b"a" * 100 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
]


@pytest.mark.parametrize("stream", STREAMS)
def test_every_single_cut_is_the_same(stream: bytes) -> None:
    whole = hear(stream)
    assert whole[1] is None
    assert whole[0].count("complete") == whole[0].count(b"") + sum(isinstance(e, bytes) and e != b"" for e in whole[0])
    for place in range(1, len(stream)):
        assert hear(stream[:place], stream[place:]) == whole


@settings(deadline=None)
@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 10_000)))
def test_any_cuts_are_the_same(stream: bytes, places: list[int]) -> None:
    assert hear(*cut(stream, places)) == hear(stream)


@settings(deadline=None)
@given(st.sampled_from(FAULTY), st.lists(st.integers(0, 10_000)))
def test_a_fault_is_found_however_it_is_cut(stream: bytes, places: list[int]) -> None:
    whole, fault = hear(stream)
    assert fault is not None
    events, same = hear(*cut(stream, places))
    assert same is not None
    assert same.status == fault.status
    assert [e for e in events if isinstance(e, tuple)] == [e for e in whole if isinstance(e, tuple)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
@example([b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00"])
def test_garbage_is_a_fault_or_nothing_and_never_more(reads: list[bytes]) -> None:
    _, fault = hear(*[data for data in reads if data])
    assert fault is None or fault.status in (400, 413)


WORDS = (
    rb"GET |/|%2e|a| HTTP/1.1|\r\n|Host:| |\n|Content-Length: 1|Upgrade: x|Transfer-Encoding: chunked|1\r\nx\r\n|"
    rb"0\r\n\r\n|\r\n\r\n|CONNECT |*|:|\x00|\xff"
)
HEAD_PARTS = st.sampled_from([word.decode("unicode_escape").encode("latin-1") for word in WORDS.split(b"|")])


@settings(deadline=None)
@given(st.lists(HEAD_PARTS, max_size=40), st.lists(st.integers(0, 10_000)))
def test_near_requests_are_read_alike_however_they_are_cut(parts: list[bytes], places: list[int]) -> None:
    stream = b"".join(parts) or b"x"
    events, fault = hear(stream)
    again, other = hear(*cut(stream, places))
    assert (fault is None) == (other is None)
    assert [e for e in events if isinstance(e, tuple)] == [e for e in again if isinstance(e, tuple)]


def test_what_a_head_can_hold_is_its_bound_and_one_read() -> None:
    heard = Heard()
    fed = 0
    fault = heard.reader.feed(b"GET /a HTTP/1.1\r\nHost: a\r\nx: ")
    while fault is None:
        fed += 100
        fault = heard.reader.feed(b"y" * 100)
    assert fault is HEAD_TOO_LARGE
    assert fed == LIMITS.head_bytes + 100


def test_a_sink_that_stops_ends_the_reading() -> None:
    heard = Heard()
    heard.stop = True
    assert heard.reader.feed(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n") is MALFORMED
    assert heard.events == []


def test_framing_of_a_complete_body_is_judged_too() -> None:
    events, fault = hear(
        b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"e" * 20_000 + b"\r\nx\r\n0\r\n\r\n"
    )
    assert fault is CHUNK_FRAMING
    assert events[-1] == "complete"


@pytest.mark.parametrize(
    "reads",
    [
        [b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000] * 30,
        [b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000, b"\r\n" * 10_000],
    ],
    ids=["before", "after"],
)
def test_the_audit_does_not_count_what_else_is_in_the_read(reads: list[bytes]) -> None:
    chunked = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    _, fault = hear(b"".join(reads) + chunked)
    assert fault is None
    _, fault = hear(chunked[:-5], chunked[-5:] + b"".join(reads))
    assert fault is None


def test_only_http_1_1_keeps_the_connection() -> None:
    events, _ = hear(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert events[0][3] is False
    events, _ = hear(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
    assert events[0][3] is True
    events, _ = hear(b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert events[0][3] is False


def test_the_audit_of_one_body_ends_with_it() -> None:
    heard = Heard()
    small = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    for _ in range(1000):
        assert heard.reader.feed(small) is None
    for _ in range(1000):
        assert heard.reader.feed(b"\r\n" * 100) is None
    assert heard.reader.phase == IDLE


def test_the_audit_allows_small_chunks_and_forbids_barren_ones() -> None:
    audit = ChunkAudit(100)
    assert not audit.exceeded(100 + 6 * 1000, 1000)
    assert not any(audit.exceeded(60_000, 1000 + 10_000 * n) for n in range(1, 50))
    body = 491_000
    assert not audit.exceeded(16_384, body)
    assert audit.exceeded(1, body)
