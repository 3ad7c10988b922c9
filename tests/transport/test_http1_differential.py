"""Our parsing against h11's, over answers made up at random, spoiled at random, and cut at random.

Two readers of one byte string must not disagree on what it says: that is what response smuggling is made of. Ours may
refuse what h11 takes (it is the stricter one); where both take it, they take it for the same. And whatever else
happens: a connection with a single byte left over is never kept.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import h11
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.transport.wire import Outcome, read_with_ours

EXAMPLES = 5_000 if os.environ.get("BREAKWATER_FAULTS") else 100
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read_with_h11(pieces: list[bytes]) -> Outcome:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=65536)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    outcome = Outcome()
    try:
        for piece in pieces:
            connection.receive_data(piece)
            _take_events(connection, outcome)
    except h11.RemoteProtocolError:
        outcome.refused = True
        return outcome
    outcome.kept = connection.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE} and not connection.trailing_data[0]
    try:
        if not outcome.complete:
            connection.receive_data(b"")
            _take_events(connection, outcome)
    except h11.RemoteProtocolError:
        pass  # ended too early
    return outcome


def _take_events(connection: h11.Connection, outcome: Outcome) -> None:
    while True:
        match connection.next_event():
            case h11.Response() as head:
                outcome.status, outcome.headers = head.status_code, list(head.headers)
            case h11.Data() as data:
                outcome.body += bytes(data.data)
            case h11.EndOfMessage():
                outcome.complete = True
            case h11.InformationalResponse():
                continue
            case _:
                return


# -- answers ---------------------------------------------------------------------------------------------------------

token = st.text("abcXYZ019-_!", min_size=1, max_size=8).map(lambda text: b"x" + text.encode())
value = st.text('ab \t:;,="01~\xe9', max_size=12).map(lambda text: text.strip(" \t").encode("latin-1"))
spaces = st.sampled_from([b"", b" ", b"  ", b" \t"])
crlf = b"\r\n"


@st.composite
def fields(draw: st.DrawFn, most: int = 4) -> list[tuple[bytes, bytes]]:
    return draw(st.lists(st.tuples(token, value), max_size=most))


@st.composite
def lines(draw: st.DrawFn, headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(name + b":" + draw(spaces) + value + draw(spaces) + crlf for name, value in headers)


@dataclass
class Answer:
    data: bytes
    expected: Outcome


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """A well-formed answer, and what it says."""
    interim = b"".join(
        b"HTTP/1.1 %d Wait\r\n" % status + draw(lines(draw(fields(2)))) + crlf
        for status in draw(st.lists(st.sampled_from([100, 102, 103]), max_size=2))
    )
    status = draw(st.sampled_from([200, 200, 200, 201, 204, 304, 404, 429, 500, 599]))
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=4))
    empty = status in (204, 304)
    body = b"" if empty else b"".join(pieces)
    headers = draw(fields())
    goodbye = draw(st.sampled_from([None, None, b"close", b"keep-alive"]))
    if goodbye:
        headers.insert(0, (b"connection", goodbye))
    if framing == "length":
        headers.append((b"Content-Length", b"%d" % len(body)))
    elif framing == "chunked":
        headers.append((b"Transfer-Encoding", b"chunked"))
    head = b"HTTP/1.1 %d %b\r\n" % (status, draw(st.sampled_from([b"OK", b"", b"Not Here"])))
    written = draw(lines(headers))
    if framing == "chunked":
        written = written.replace(b"chunked \t", b"chunked")  # refused on purpose
    data = interim + head + written + crlf
    if framing == "chunked" and not empty:
        data += b"".join(b"%x%b\r\n%b\r\n" % (len(p), draw(st.sampled_from([b"", b";a=b"])), p) for p in pieces)
        data += b"0\r\n" + draw(lines(draw(fields(2)))) + crlf
    elif not empty:
        data += body
    lowered = [(name.lower(), value) for name, value in headers]
    kept = goodbye != b"close" and (framing != "close" or empty)
    return Answer(data, Outcome(status, lowered, body, complete=True, kept=kept))


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    at = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=6)))
    return [piece for piece in (data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)) if piece]


SPOIL = st.one_of(
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b";", b"\0", b"0", b"5", b"-", b",", b"\x80"]
    ),
    st.sampled_from([b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.0 ", b"HTTP/1.1 101 S\r\n"]),
    st.binary(max_size=2),
)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    data = draw(answers()).data
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(SPOIL) + data[at + draw(st.integers(0, 3)) :]
    return data


# -- and what must hold of them --------------------------------------------------------------------------------------


@many
@given(st.data())
def test_well_formed(loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    answer = data.draw(answers())
    expected = answer.expected
    ours = read_with_ours(loop, data.draw(cut(answer.data)))
    # A read that does not show where the message ends costs the connection: then, and only then, one is not kept.
    assert expected.kept or not ours.kept
    event(f"kept: {ours.kept}")
    ours.kept = expected.kept
    assert ours == expected
    theirs = read_with_h11([answer.data])
    theirs.kept = expected.kept
    assert theirs == expected


@many
@given(st.data())
def test_whole_answers_are_kept(loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    """In one read the end can be told, but for a body with a length that is nothing but line breaks."""
    answer = data.draw(answers())
    expected = answer.expected
    unclear = expected.body and not expected.body.strip(crlf) and b"content-length" in dict(expected.headers)
    assert read_with_ours(loop, [answer.data]).kept == (expected.kept and not unclear)


@many
@given(st.data())
def test_cut_short(loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    answer = data.draw(answers())
    short = answer.data[: data.draw(st.integers(0, len(answer.data) - 1))]
    ours, theirs = read_with_ours(loop, data.draw(cut(short)) if short else []), read_with_h11([short])
    assert not ours.kept
    assert ours.complete == theirs.complete  # a close-delimited body is complete wherever it ends
    assert (ours.status, ours.headers, ours.body) == (theirs.status, theirs.headers, theirs.body)
    assert answer.expected.body.startswith(ours.body)


@many
@given(st.data())
def test_surplus(loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    answer = data.draw(answers().filter(lambda answer: answer.expected.kept))
    surplus = data.draw(
        st.one_of(
            st.sampled_from([crlf, b"\n", b"\r", crlf * 2]), st.binary(min_size=1), answers().map(lambda a: a.data)
        )
    )
    ours = read_with_ours(loop, data.draw(cut(answer.data + surplus)))
    assert not ours.kept
    assert (ours.complete, ours.body) == (True, answer.expected.body)


@many
@given(st.data())
def test_spoiled(loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    raw = data.draw(spoiled())
    ours, theirs = read_with_ours(loop, data.draw(cut(raw)) if raw else []), read_with_h11([raw])
    event(f"ours {'refuses' if ours.refused else 'takes'}, h11 {'refuses' if theirs.refused else 'takes'}")
    if ours.complete and not theirs.refused:
        assert theirs.complete
        assert (ours.status, ours.headers, ours.body) == (theirs.status, theirs.headers, theirs.body)
        assert theirs.kept or not ours.kept


@many
@given(st.data())
def test_cuts_change_nothing(loop: asyncio.AbstractEventLoop, data: st.DataObject) -> None:
    """Spoiled or not, the same bytes say the same however they come in; only `kept` may be given up."""
    raw = data.draw(spoiled().filter(bool))
    whole, pieces = read_with_ours(loop, [raw]), read_with_ours(loop, data.draw(cut(raw)))
    assert whole.kept or not pieces.kept
    whole.kept = pieces.kept
    assert whole == pieces
