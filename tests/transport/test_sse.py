"""The splitter and the event parser: whole events whatever the reads, and not one byte changed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.transport import sse
from proxy.transport.sse import EventTooLarge, Splitter, events

EOLS = (b"\n", b"\r\n", b"\r")


def corpus(eol: bytes) -> bytes:
    lines = [
        b": comment", b"",
        b'data: {"a":"h\xc3\xa9"}', b"",
        b"event: response.created", b'data: {"type":"response.created"}', b"",
        b"data:no space", b"data: second line", b"",
        b"id: 7", b"retry: 10", b"",
        b"data", b"",
        b":", b"", b"",
        b"data: [DONE]", b"", b"",
    ]  # fmt: skip
    return eol.join(lines)


PARSED = [
    (b"", None),
    (b"", b'{"a":"h\xc3\xa9"}'),
    (b"response.created", b'{"type":"response.created"}'),
    (b"", b"no space\nsecond line"),
    (b"", None),
    (b"", b""),
    (b"", None),
    (b"", b"[DONE]"),
]


def feed(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = Splitter()
    return [block for piece in pieces if (block := splitter.feed(piece))], splitter.held


def parsed(blocks: list[bytes]) -> list[tuple[bytes, bytes | None]]:
    return [(name, data) for block in blocks for raw, name, data in events(block) if raw.strip(b"\r\n")]


@pytest.mark.parametrize("eol", EOLS)
def test_every_way_to_cut_a_stream_in_three_gives_the_same_events(eol: bytes) -> None:
    stream = corpus(eol)
    for first, second in itertools.combinations(range(len(stream) + 1), 2):
        blocks, held = feed([stream[:first], stream[first:second], stream[second:]])
        assert b"".join(blocks) == stream
        assert held == b""
        assert parsed(blocks) == PARSED


@pytest.mark.parametrize("eol", EOLS)
def test_one_byte_at_a_time(eol: bytes) -> None:
    stream = corpus(eol)
    blocks, held = feed([stream[i : i + 1] for i in range(len(stream))])
    assert (b"".join(blocks), held) == (stream, b"")
    assert parsed(blocks) == PARSED


def test_a_block_is_never_less_than_whole_events() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert splitter.held == b"data: 2"
    assert splitter.feed(b"\n") == b""
    assert splitter.feed(b"\ndata: 3\n\n") == b"data: 2\n\ndata: 3\n\n"
    assert splitter.held == b""


def test_a_carriage_return_at_the_end_waits_for_its_line_feed() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\r\n\r") == b""
    assert splitter.feed(b"\ndata: 2") == b"data: 1\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_byte_order_mark_is_taken_off(cut: int) -> None:
    stream = b"\xef\xbb\xbfdata: 1\n\n"
    blocks, _ = feed([stream[:cut], stream[cut:]])
    assert b"".join(blocks) == b"data: 1\n\n"


def test_an_event_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    splitter = Splitter()
    for _ in range(100):
        assert splitter.feed(b"x" * 10) == b""
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x")


lines = st.lists(
    st.sampled_from([b"data: x", b"data:", b": c", b"event: e", b"", b"", b"\xc3\xa9", b"data: [DONE]"]), max_size=12
)


@given(lines, st.lists(st.sampled_from(EOLS), min_size=12, max_size=12), st.lists(st.integers(0, 90), max_size=6))
def test_no_cut_changes_bytes_or_meaning(content: list[bytes], ends: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(line + end for line, end in zip(content, ends, strict=False))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges)]
    splitter = Splitter()
    blocks = [block for piece in pieces if (block := splitter.feed(piece))]
    assert (b"".join(blocks) + bytes(splitter._held)) == stream
    whole = Splitter()
    assert parsed(blocks) == parsed([whole.feed(stream)] if stream else [])
    for block in blocks:
        assert b"".join(raw for raw, _, _ in events(block)) == block
