"""What one event means, and every way in which a stream can end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from proxy.errors import ProxyError, StreamInterrupted, UpstreamBroken, UpstreamTimeout
from proxy.providers.openai import Timeouts
from proxy.providers.opening import chunk_promises
from proxy.providers.streams import (
    Interrupted,
    StreamReply,
    Verdict,
    judge_chunk,
    judge_response_event,
    pass_ordinary,
)
from proxy.transport.answer import Answer, End
from proxy.transport.sse import MAX_EVENT_BYTES
from proxy.types import Headers, Usage
from tests.providers.upstream import Upstream, chat

HI = b'{"choices":[{"delta":{"content":"Hi"}}]}'
USAGE = b'"usage":{"prompt_tokens":3,"completion_tokens":2}'
ALONE = b'{"choices":[],%b}' % USAGE
DONE = b"data: [DONE]\n\n"
ERROR = b'{"error":{"message":"down","type":"server_error"}}'


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def chunk(data: bytes, *, asked: bool = False) -> Verdict | None:
    return judge_chunk(asked, event(data), data)


# --- one event ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        HI,
        b"{}",
        b'{"type":"ping"}',
        b'{"choices":[],"prompt_filter_results":[]}',
        b'{"choices":null}',
        '{"choices":[{"delta":{"content":"é\U0001f600"}}]}'.encode(),
        b'{"choices":[],"error":null}',
        b'{"choices":[],"error":{}}',
        b'{"choices":[],"error":""}',
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_an_ordinary_chunk_passes(data: bytes, asked: bool) -> None:
    assert chunk(data, asked=asked) is None
    assert pass_ordinary(asked, event(data)) in (event(data), None)


@pytest.mark.parametrize("data", [b"[DONE]", b"[DONE] and more"])
@pytest.mark.parametrize("judge", [partial(judge_chunk, True), judge_response_event])
def test_done_is_the_end(data: bytes, judge: Callable[[bytes, bytes], Verdict | None]) -> None:
    verdict = judge(event(data), data)
    assert verdict is not None
    assert (verdict.passed, verdict.last) == (event(data), True)


@pytest.mark.parametrize(
    ("data", "without"),
    [
        (HI[:-1] + b',"usage":null}', HI),
        (b'{"usage":null,"choices":[]}', b'{"choices":[]}'),
        (b'{"choices":[], "usage": null }', b'{"choices":[] }'),
        (b'{"x":{"usage":null},"usage":null,"y":1}', b'{"x":{"usage":null},"y":1}'),
    ],
)
def test_null_usage_is_cut_where_we_asked_for_it(data: bytes, without: bytes) -> None:
    verdict = chunk(data, asked=True)
    assert verdict is not None
    assert (verdict.passed, verdict.usage) == (event(without), None)
    assert pass_ordinary(True, event(data)) in (event(without), None)
    assert chunk(data) is None
    assert pass_ordinary(False, event(data)) == event(data)


@pytest.mark.parametrize("choices", [b'"choices":[],', b'"choices": [ ] ,', b'"choices":null,', b""])
def test_the_usage_chunk_is_left_out_where_we_asked_for_it(choices: bytes) -> None:
    data = b"{%b%b}" % (choices, USAGE)
    for asked, passed in ((True, b""), (False, event(data))):
        verdict = chunk(data, asked=asked)
        assert verdict is not None
        assert (verdict.passed, verdict.usage, verdict.last) == (passed, Usage(3, 2), False)
        assert pass_ordinary(asked, event(data)) is None


def test_usage_beside_a_choice_passes() -> None:
    data = HI[:-1] + b"," + USAGE + b"}"
    verdict = chunk(data, asked=True)
    assert verdict is not None
    assert (verdict.passed, verdict.usage) == (event(data), Usage(3, 2))


def test_usage_of_nothing_is_no_usage() -> None:
    verdict = chunk(b'{"choices":[],"usage":{}}')
    assert verdict is not None
    assert verdict.usage is None
    zero = chunk(b'{"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0}}')
    assert zero is not None
    assert zero.usage == Usage(0, 0)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"a":"\xff"}', b"{}{}", b"[" * 100_000])
@pytest.mark.parametrize("judge", [partial(judge_chunk, True), judge_response_event])
def test_what_is_no_object_is_no_event(data: bytes, judge: Callable[[bytes, bytes], Verdict | None]) -> None:
    with pytest.raises(Interrupted) as raised:
        judge(event(data), data)
    assert raised.value.event is None
    assert pass_ordinary(True, event(data)) is None


@pytest.mark.parametrize(
    ("error", "raised_by_sdks"),
    [(b'{"message":"x"}', True), (b'{"n":1e999}', True), (b'"text"', False), (b"[1]", False), (b"true", False)],
)
@pytest.mark.parametrize("judge", [partial(judge_chunk, True), judge_response_event])
def test_an_error_ends_a_stream(
    error: bytes, raised_by_sdks: bool, judge: Callable[[bytes, bytes], Verdict | None]
) -> None:
    data = b'{"choices":[],"error":%b}' % error
    with pytest.raises(Interrupted) as raised:
        judge(event(data), data)
    assert raised.value.event == (event(data) if raised_by_sdks else None)


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_a_response_ends_with_its_own_terminators(kind: str) -> None:
    data = b'{"type":"response.%b","response":{"usage":{"input_tokens":5,"output_tokens":1}}}' % kind.encode()
    verdict = judge_response_event(event(data), data)
    assert verdict is not None
    assert (verdict.passed, verdict.usage, verdict.last) == (event(data), Usage(5, 1), True)


@pytest.mark.parametrize("usage", [b"", b',"usage":null', b',"usage":{}'])
def test_a_response_need_not_tell_its_usage(usage: bytes) -> None:
    data = b'{"type":"response.failed","response":{"id":"r"%b}}' % usage
    verdict = judge_response_event(event(data), data)
    assert verdict is not None
    assert (verdict.usage, verdict.last) == (None, True)


@pytest.mark.parametrize("kind", [b"response.created", b"response.output_text.delta", b"response.new", b""])
def test_other_events_of_a_response_pass(kind: bytes) -> None:
    data = b'{"type":"%b","response":{}}' % kind
    assert judge_response_event(event(data), data) is None


def test_a_flat_error_event_of_a_response_is_its_last() -> None:
    data = b'{"type":"error","code":"x","message":"y"}'
    with pytest.raises(Interrupted) as raised:
        judge_response_event(b"event: error\n" + event(data), data)
    assert raised.value.event == b"event: error\n" + event(data)


@pytest.mark.parametrize("data", [b'{"type":5}', b'{"type":"response.completed"}', b'{"type":"\xff"}'])
def test_an_odd_event_of_a_response_ends_it(data: bytes) -> None:
    with pytest.raises(Interrupted):
        judge_response_event(event(data), data)


# --- a whole stream -------------------------------------------------------------------------------------------------


class Body:
    """A response whose body comes in these pieces; an exception among them is raised. After the last one: the end."""

    status = 200
    headers: Headers = []  # noqa: RUF012 - nobody changes it

    def __init__(self, pieces: Iterable[bytes | Exception]) -> None:
        self.pieces = list(pieces)
        self.deadlines: list[float] = []
        self.closed = 0

    async def read(self, deadline: float) -> bytes:
        self.deadlines.append(deadline)
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece

    async def aclose(self) -> None:
        self.closed += 1


def stream(*pieces: bytes | Exception, terminated: bool = True, **more: Any) -> StreamReply:
    settings: dict[str, Any] = {
        "judge": partial(judge_chunk, True),
        "ordinary": partial(pass_ordinary, True),
        "idle": 7.0,
        "upstream_request_id": "r",
        "scrub": bytes,
    }
    return StreamReply(Body(pieces), [], terminated=terminated, **{**settings, **more})


async def drained(reply: StreamReply) -> tuple[list[bytes], ProxyError | None]:
    """The pushes to the client, and how it ended badly if it did."""
    await reply.first(0.0)
    found: list[bytes] = []
    try:
        while True:
            found.append((await anext(reply)).data)
    except StopAsyncIteration:
        return found, None
    except StreamInterrupted as error:
        return found, error


def run(reply: Callable[[], StreamReply]) -> tuple[list[bytes], ProxyError | None]:
    async def main() -> tuple[list[bytes], ProxyError | None]:
        return await drained(reply())

    return asyncio.run(main())


def test_each_read_is_one_push() -> None:
    assert run(lambda: stream(event(HI) * 3, event(HI), DONE)) == ([event(HI) * 3, event(HI), DONE], None)


def test_what_follows_the_terminator_is_left_out() -> None:
    assert run(lambda: stream(event(HI), DONE + event(HI), event(HI))) == ([event(HI), DONE], None)


def test_half_events_wait_for_their_rest() -> None:
    whole = event(HI) + DONE
    assert run(lambda: stream(whole[:9], whole[9:20], whole[20:])) == ([whole], None)


def test_the_terminator_is_known_by_its_length_at_the_end_of_a_push() -> None:
    async def main() -> None:
        reply = stream(event(HI) + event(ALONE) + b"data:[DONE]\r\n\r\n")
        await reply.first(0.0)
        (one,) = [one async for one in reply.events]
        assert (one.data, one.usage, one.terminator) == (event(HI) + b"data:[DONE]\r\n\r\n", Usage(3, 2), 15)

    asyncio.run(main())


def test_a_terminator_without_its_blank_line_gets_it() -> None:
    for rest in (b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n"):
        found, error = run(lambda rest=rest: stream(event(HI), rest))  # type: ignore[misc]
        assert error is None
        assert found[0] == event(HI)
        assert found[1].startswith(b"data: [DONE]")
        assert found[1].endswith(b"\n\n")


def test_comments_in_front_are_dropped_and_later_ones_pass() -> None:
    wait, later = b": wait\n\n", b": later\n\n"
    assert run(lambda: stream(wait, wait + event(HI), later, DONE)) == ([event(HI), later, DONE], None)


def test_a_byte_order_mark_is_dropped() -> None:
    assert run(lambda: stream(b"\xef\xbb", b"\xbf" + event(HI), DONE)) == ([event(HI), DONE], None)


def test_a_usage_chunk_alone_opens_nothing_and_says_nothing() -> None:
    assert run(lambda: stream(event(ALONE), DONE)) == ([DONE], None)


BAD_ENDS: dict[str, tuple[bytes | Exception, ...]] = {
    "clean": (),
    "half an event": (b"data: {",),
    "a whole event without its end": (b"data: " + HI,),
    "timeout": (UpstreamTimeout("x"),),
    "broken": (UpstreamBroken("x", reason="reset"),),
    "garbage": (b"data: <html>\n\n", DONE),
    "no text": (b'data: {"a":"\xff"}\n\n', DONE),
    "error": (event(ERROR), DONE),
    "too large": (b"x" * (MAX_EVENT_BYTES + 1), DONE),
}


@pytest.mark.parametrize("end", BAD_ENDS.values(), ids=BAD_ENDS)
def test_any_other_end_is_an_interruption_behind_what_came_before(end: tuple[bytes | Exception, ...]) -> None:
    found, error = run(lambda: stream(event(HI), *end))
    assert found == [event(HI)]
    assert isinstance(error, StreamInterrupted)
    assert error.event == (event(ERROR) if event(ERROR) in end else None)


def test_what_came_in_one_read_with_a_failure_is_passed_first() -> None:
    found, error = run(lambda: stream(event(HI) + event(ALONE) + event(ERROR) + DONE))
    assert found == [event(HI)]
    assert isinstance(error, StreamInterrupted)
    assert error.event == event(ERROR)


def test_a_provider_s_error_event_holds_no_secret_of_ours() -> None:
    error = ERROR.replace(b"down", b"sk-ours")
    _, failure = run(lambda: stream(event(HI), event(error), scrub=lambda data: data.replace(b"sk-ours", b"*")))
    assert isinstance(failure, StreamInterrupted)
    assert failure.event == event(ERROR.replace(b"down", b"*"))


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((), UpstreamBroken),
        ((b": only\n\n",), UpstreamBroken),
        ((b"data: {",), UpstreamBroken),
        ((UpstreamTimeout("x"),), UpstreamTimeout),
        ((UpstreamBroken("x", reason="reset"),), UpstreamBroken),
        ((event(ERROR),), StreamInterrupted),
        ((b"data: <html>\n\n",), StreamInterrupted),
        ((b"x" * (MAX_EVENT_BYTES + 1),), StreamInterrupted),
    ],
)
def test_before_the_first_event_it_is_no_interruption(
    pieces: tuple[bytes | Exception, ...], error: type[ProxyError]
) -> None:
    async def main() -> None:
        with pytest.raises(error) as raised:
            await stream(*pieces).first(0.0)
        assert type(raised.value) is error

    asyncio.run(main())


def test_its_deadlines_are_the_caller_s_for_the_first_event_then_the_idle_time() -> None:
    async def main() -> None:
        body = Body([b": x\n\n", event(HI), event(HI), DONE])
        reply = stream()
        reply._response = body
        await reply.first(123.0)
        assert body.deadlines == [123.0, 123.0]
        now = asyncio.get_running_loop().time()
        assert [one.data async for one in reply.events] == [event(HI), event(HI), DONE]
        assert all(now + 7.0 <= deadline < now + 60.0 for deadline in body.deadlines[2:4])
        assert body.deadlines[4] < now + 7.0  # after the terminator nobody waits for long
        await reply.aclose()
        assert body.closed == 1

    asyncio.run(main())


def test_a_failure_behind_the_terminator_is_nobody_s_business() -> None:
    for failure in (UpstreamTimeout("x"), UpstreamBroken("x", reason="reset")):
        assert run(lambda failure=failure: stream(event(HI), DONE, failure)) == ([event(HI), DONE], None)  # type: ignore[misc]


@pytest.mark.parametrize("pieces", [(b"data: 1\n\n", b"data: 2"), (b"data: 1",), (b": c\n\ndata: 1\n",)])
def test_without_a_dialect_the_framing_alone_counts(pieces: tuple[bytes, ...]) -> None:
    found, error = run(lambda: stream(*pieces, terminated=False, judge=lambda raw, data: None, ordinary=None))
    assert error is None
    assert b"".join(found) == b"".join(pieces).removeprefix(b": c\n\n")


def test_without_a_dialect_a_cut_is_a_cut() -> None:
    cut = UpstreamBroken("x", reason="closed")
    found, error = run(
        lambda: stream(b"data: 1\n\n", cut, terminated=False, judge=lambda raw, data: None, ordinary=None)
    )
    assert found == [b"data: 1\n\n"]
    assert isinstance(error, StreamInterrupted)


def test_a_role_and_then_nothing_is_a_stall_like_any_other() -> None:
    role = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'

    async def opened() -> None:
        pieces = [(0.0, b"data: " + role + b"\n\n")]
        answer = Answer(200, [(b"content-type", b"text/event-stream")], pieces, end=End.STALL)
        provider = Upstream(answer).provider(timeouts=Timeouts(first_event=20.0, idle=0.02, total=20.0))
        async with asyncio.timeout(5):
            with pytest.raises(UpstreamTimeout):
                await provider.open(chat(stream=True), "m")

    asyncio.run(opened())


def test_before_the_content_silence_is_counted_from_what_came_last() -> None:
    role = event(b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}')

    async def main() -> None:
        now = asyncio.get_running_loop().time()
        body = Body([role, role, b": wait\n\n", event(HI), DONE])
        later = iter([now, now + 5, now + 10, now + 11])
        reply = stream(promises=chunk_promises)
        reply._response, reply._now = body, lambda: next(later)
        await reply.first(now + 15)
        assert body.deadlines == [now + 15, now + 7, now + 12, now + 15]

    asyncio.run(main())
