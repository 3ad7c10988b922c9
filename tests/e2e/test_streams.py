"""The stream contract, through the whole program: what comes in at any offset goes out as it was, and every stream ends
with one terminator or one error event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import httpx2
import pytest

from proxy.observability.events import RequestFinished
from proxy.providers.opening import chunk_promises, response_promises
from proxy.types import Usage
from tests.clear import CLEAR
from tests.e2e.corpus import DONE, STOP, STREAMS, USAGE, Recorded, ends, read_events, said, stream
from tests.e2e.scene import (
    CHAT,
    END,
    SSE,
    Client,
    chunk,
    flushed,
    piece_of,
    plain,
    playing,
    scene,
    until,
)
from tests.transport.servers import Peer, Script

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

Part = Callable[[Peer], Awaitable[None]]
KEEP_ALIVE = b": keep-alive\n\n"
ANSWER = (
    b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"}}]%b}'
)


async def apart(peer: Peer, *pieces: bytes) -> None:
    """Sends pieces so that the application reads each by itself: it shares the loop, so a few turns are enough."""
    for piece in pieces:
        peer.writer.write(piece)
        await flushed(peer)
        for _ in range(3):
            await asyncio.sleep(0)


def error_of(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data)["error"])


# --- whole streams --------------------------------------------------------------------------------------------------


def split_by_seed(recorded: Recorded) -> Script:
    """Answers with the stream cut in two where the request's `seed` says; into single bytes at seed 0."""
    raw = recorded.raw

    async def script(peer: Peer) -> None:
        while True:
            at = json.loads((await peer.request()).body)["seed"]
            pieces = [raw[:at], raw[at:]] if at else [raw[n : n + 1] for n in range(len(raw))]
            await apart(peer, SSE + chunk(pieces[0]), *map(chunk, pieces[1:]), END)

    return script


@pytest.mark.parametrize("name", STREAMS)
async def test_every_stream_passes_as_it_is_wherever_it_is_split(name: str) -> None:
    recorded = STREAMS[name]
    cuts = range(len(recorded.raw))
    async with scene(split_by_seed(recorded)) as on_stage:
        client = await on_stage.client()
        for at in cuts:
            client.ask(path=recorded.path, stream=True, seed=at)
            assert (await client.head())[0] == 200
            body = await client.rest()
            assert read_events(body) == recorded.seen, at
            if recorded.untouched:
                assert body == recorded.raw, at
        client.close()
        told = {(event.status, getattr(event, "error_code", "")) for event in await on_stage.over(len(cuts))}
        assert told == {(200, None)}


@pytest.mark.parametrize("name", [name for name, one in STREAMS.items() if one.path == CHAT])
async def test_nothing_is_cut_for_a_client_that_asked_for_usage_itself(name: str) -> None:
    recorded = STREAMS[name]
    async with scene(split_by_seed(recorded)) as on_stage:
        client = await on_stage.client()
        for at in range(0, len(recorded.raw), 31):
            client.ask(stream=True, seed=at, stream_options={"include_usage": True})
            await client.head()
            assert read_events(await client.rest()) == recorded.whole, at
        client.close()


async def test_the_usage_that_was_cut_out_is_told_all_the_same() -> None:
    for name in ("openai", "vllm", "azure", "ollama", "finish chunk with usage", "responses", "crlf with usage"):
        async with scene(split_by_seed(STREAMS[name])) as on_stage:
            client = await on_stage.client()
            client.ask(path=STREAMS[name].path, stream=True, seed=50)
            await client.head()
            await client.rest()
            client.close()
            (event,) = await on_stage.over()
            assert isinstance(event, RequestFinished)
            assert event.usage == Usage(9, 2), name


async def test_each_event_is_passed_on_as_soon_as_it_is_whole() -> None:
    gates = [asyncio.Event() for _ in range(3)]

    async def part(peer: Peer) -> None:
        await peer.send(SSE)
        for number, gate in enumerate(gates):
            await peer.send(chunk(piece_of(f"n{number}") + b"data: "))
            await gate.wait()
            await peer.send(chunk(b'{"choices":[]}\n\n'))
        await peer.send(chunk(b"data: [DONE]\n\n") + END)

    async with scene(playing({"any": part})) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        for number, gate in enumerate(gates):
            await client.read_until(b"n%d" % number)
            assert client.seen.endswith(b"\n\n")  # and not a byte of the event that is incomplete
            gate.set()
        assert (await client.rest()).endswith(b"data: [DONE]\n\n")
        client.close()


async def test_the_answer_ends_with_the_terminator_not_with_the_body() -> None:
    gate = asyncio.Event()

    async def part(peer: Peer) -> None:
        await peer.send(SSE + chunk(stream(said("Hi"), DONE)))
        await gate.wait()

    async with scene(playing({"any": part}), silence=0.02) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        assert await client.rest() == stream(said("Hi"), DONE)  # no keep-alive behind it either
        client.ask("good")
        assert (await client.answer())[0] == 200  # the connection serves on
        client.close()
        gate.set()
        assert [event.status for event in await on_stage.over(2)] == [200, 200]


# --- cuts -----------------------------------------------------------------------------------------------------------

Cut = Literal["reset", "close", "clean end", "stall", "broken byte"]


def cut_at_seed(recorded: Recorded, how: Cut) -> Script:
    """The stream up to byte `seed`, and then what `how` says."""

    async def script(peer: Peer) -> None:
        while True:
            at = json.loads((await peer.request()).body)["seed"]
            raw = recorded.raw
            if how == "broken byte":
                await peer.send(SSE + chunk(raw[:at] + b"\xff" + raw[at + 1 :]) + END)
                continue
            await peer.send(SSE + (chunk(raw[:at]) if at else b""))
            if how == "clean end":
                await peer.send(END)
                continue
            if how == "reset":
                await flushed(peer)
                peer.reset()
            elif how == "stall":
                await peer.gone()
            return

    return script


def promises(data: bytes) -> bool:
    """It brings nothing of the reply yet."""
    return chunk_promises(data) or response_promises(data)


async def cut_streams(name: str, how: Cut, step: int) -> None:
    """Asks for the stream cut at every `step`th byte, and holds each answer and its event to the contract."""
    recorded = STREAMS[name]
    timeouts = {"first_event_ms": 40, "idle_ms": 40} if how == "stall" else {}
    async with scene(cut_at_seed(recorded, how), timeouts=timeouts) as on_stage:
        client = await on_stage.client()
        points = range(0, len(recorded.raw), step)
        for number, at in enumerate(points):
            client.ask(path=recorded.path, stream=True, seed=at)
            status, _, body = await client.answer()
            event = (await on_stage.over(number + 1))[-1]
            assert isinstance(event, RequestFinished)
            if status == 200:
                found = read_events(body)
                errors = [data for _, data in found if data.startswith(b'{"error":')]
                terminators = [one for one in found if ends(one)]
                assert len(errors) + len(terminators) == 1, (at, body)
                assert errors == [found[-1][1]] or ends(found[-1]), (at, body)
                if errors:
                    assert error_of(errors[0])["code"] == "stream_interrupted"
                    assert (event.error_code, event.interrupted) == ("stream_interrupted", True)
                else:
                    assert (event.error_code, event.interrupted) == (None, False)
                if how != "broken byte":
                    whole = found[:-1] if errors else found
                    assert whole == recorded.seen[: len(whole)], (at, body)
                    # What had come whole was passed on, and nothing is taken for whole that was not.
                    assert errors or at >= recorded.raw.rindex(recorded.whole[-1][1][:6]) + 6, at
            else:
                expected = "upstream_timeout" if how == "stall" else "upstream_unavailable"
                assert error_of(body)["code"] == event.error_code == expected, at
                came = [one for one in read_events(recorded.raw[:at])[:-1] if one in recorded.seen]
                assert all(promises(one[1]) for one in came), at
        client.close()


@pytest.mark.parametrize("how", ["reset", "close", "clean end"])
@pytest.mark.parametrize("name", ["openai", "crlf with usage", "lone cr", "responses", "legacy completions"])
async def test_a_stream_that_is_cut_ends_with_its_terminator_or_one_error(name: str, how: Cut) -> None:
    await cut_streams(name, how, 4 if name == "openai" else 5)


@pytest.mark.parametrize("name", ["openai", "responses", "crlf"])
async def test_a_stream_with_a_broken_byte_ends_with_its_terminator_or_one_error(name: str) -> None:
    await cut_streams(name, "broken byte", 3)


@pytest.mark.parametrize("name", ["openai", "responses"])
async def test_a_stream_that_stalls_ends_with_one_error(name: str) -> None:
    await cut_streams(name, "stall", 61)


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"\xc3", b"\xe4\xb8", b"\xed\xa0\x80", b"\xc0\xaf"],
    ids=["no UTF-8", "half", "two of three", "surrogate", "overlong"],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_text_that_is_no_utf8_is_an_error_not_the_clients_to_trip_over(path: str, text: bytes) -> None:
    good = said("Hi").encode()
    bad = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text
    whole = b"data: " + good + b"\n\n" + bad + b"data: [DONE]\n\n"
    async with scene(lambda peer: answered(peer, SSE + chunk(whole) + END)) as on_stage:
        status, _, body = await on_stage.post(path=path, stream=True)
        first, last = read_events(body)
        assert (status, first) == (200, (b"", good))
        assert error_of(last[1])["code"] == "stream_interrupted"
        assert (await on_stage.over())[0].status == 200


@pytest.mark.parametrize("bad", [b": \xff\n\n", b"id: \xff\ndata: {}\n\n", b"dat\xff: {}\n\n", b"data: [DONE]\xff\n\n"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_nor_is_what_stands_beside_the_data(path: str, bad: bytes) -> None:
    good = said("Hi").encode()
    whole = b"data: " + good + b"\n\n" + bad + b"data: [DONE]\n\n"
    async with scene(lambda peer: answered(peer, SSE + chunk(whole) + END)) as on_stage:
        status, _, body = await on_stage.post(path=path, stream=True)
        first, last = read_events(body)
        assert (status, first) == (200, (b"", good))
        assert error_of(last[1])["code"] == "stream_interrupted"


async def answered(peer: Peer, data: bytes) -> None:
    while True:
        await peer.request()
        await peer.send(data)


ERRORS = {
    "an error object": (b'{"error":{"message":"No.","type":"server_error","code":"x"}}', "x"),
    "an error text": (b'{"error":"overloaded"}', "stream_interrupted"),
    "html": (b"<html>502</html>", "stream_interrupted"),
    "an empty event": (b"", "stream_interrupted"),
    "an error that cannot be read": (b'{"error":"\\ud800"}', "stream_interrupted"),
    "an error with a number beyond all numbers": (b'{"error":{"code":"x","n":1e999}}', "x"),
    "an error without members": (b'{"error": { }}', "stream_interrupted"),
    "a list": (b"[1]", "stream_interrupted"),
    "deeply nested": (b'{"choices":' + b"[" * 100_000, "stream_interrupted"),
}


@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_an_event_that_is_none_ends_the_stream_with_one_error(path: str, what: str) -> None:
    data, code = ERRORS[what]
    sent = stream(said("Hi")) + b"data: " + data + b"\n\n" + stream(said("late"), DONE)
    async with scene(lambda peer: answered(peer, SSE + chunk(sent) + END)) as on_stage:
        status, _, body = await on_stage.post(path=path, stream=True)
        first, last = read_events(body)
        assert (status, first[1]) == (200, said("Hi").encode())
        assert error_of(last[1])["code"] == code
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert (event.status, event.error_code) == (200, "stream_interrupted")


# --- silence --------------------------------------------------------------------------------------------------------


async def kept_alive(client: Client, times: int = 2) -> None:
    before = client.seen.count(KEEP_ALIVE)
    while client.seen.count(KEEP_ALIVE) < before + times:
        assert await client.more(), client.seen


@pytest.mark.parametrize("head", [b"", SSE, SSE + chunk(b": PROCESSING\n\n"), SSE + chunk(b"data: {")])
async def test_silence_before_the_first_event_is_filled(head: bytes) -> None:
    gate = asyncio.Event()
    event = stream(said("Hi"))
    held = len(b"data: {") if head.endswith(b"{\r\n") else 0

    async def part(peer: Peer) -> None:
        if head:
            await peer.send(head)
        await gate.wait()
        await peer.send((b"" if head else SSE) + chunk(event[held:] + stream(DONE)) + END)

    async with scene(playing({"any": part}), silence=0.2) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert headers["cache-control"] == "no-cache"
        await kept_alive(client)
        assert client.seen.replace(KEEP_ALIVE, b"") == b""
        gate.set()
        assert (await client.rest()).replace(KEEP_ALIVE, b"") == event + stream(DONE)
        client.close()
        (outcome,) = await on_stage.over()
        assert isinstance(outcome, RequestFinished)
        assert (outcome.status, outcome.error_code, outcome.bytes_out) == (200, None, len(client.seen))


async def test_silence_between_events_is_filled_and_no_event_is_torn() -> None:
    gate, second = asyncio.Event(), asyncio.Event()

    async def part(peer: Peer) -> None:
        await peer.send(SSE + chunk(stream(said("Hi"))))
        await gate.wait()
        await peer.send(chunk(b"data: {"))
        await second.wait()
        await peer.send(chunk(stream(said("!"))[7:] + stream(DONE)) + END)

    async with scene(playing({"any": part}), silence=0.2) as on_stage:
        client = await on_stage.client()
        client.ask(stream=True)
        await client.head()
        for step in (gate, second):
            await kept_alive(client)
            step.set()
        comments = client.seen.count(KEEP_ALIVE)
        assert client.seen == stream(said("Hi")) + comments * KEEP_ALIVE
        body = await client.rest()
        assert body.replace(KEEP_ALIVE, b"") == stream(said("Hi"), said("!"), DONE)
        assert read_events(body) == [(b"", said("Hi").encode()), (b"", said("!").encode()), (b"", DONE.encode())]
        client.close()


FAILURES = {
    "400": (plain(b'{"error":{"message":"No.","type":"invalid_request_error","param":"p","code":"c"}}', 400), 400),
    "404 of another form": (plain(b'{"detail":"Not Found"}', 404), 404),
    "422 in HTML": (plain(b"<html>", 422, b"text/html"), 422),
    "400 without an error": (plain(b'{"error":null}', 400), 400),
    "400 with an empty error": (plain(b'{"error":{}}', 400), 400),
    "400 with a text": (plain(b'{"error":"model not found"}', 400), 400),
    "401": (plain(b'{"error":{"message":"Bad key sk-123.","code":"invalid_api_key"}}', 401), 503),
    "429": (plain(b'{"error":{"message":"Slow down."}}', 429, more=b"retry-after: 7\r\n"), 429),
    "500": (plain(b"oops", 500), 503),
    "503": (plain(b'{"error":{"message":"Overloaded."}}', 503), 503),
    "504": (plain(b"", 504), 504),
    "redirect": (plain(b"", 302, more=b"location: /x\r\n"), 503),
    "closed": (b"", 503),
    "html": (plain(b"<html>", 200, b"text/html"), 503),
    "error event": (SSE + chunk(b'data: {"error":{"message":"No.","code":"x"}}\n\n') + END, 503),
    "invalid request as an event": (
        SSE + chunk(b'data: {"error":{"message":"No.","type":"invalid_request_error","code":"c"}}\n\n') + END,
        400,
    ),
}


@pytest.mark.parametrize("what", FAILURES)
async def test_a_failure_after_keep_alives_is_the_same_error_as_an_event(what: str) -> None:
    """With the code, type and message that the status answer has; events and metrics tell that answer's status."""
    data, expected = FAILURES[what]
    gate = asyncio.Event()

    async def late(peer: Peer) -> None:
        await gate.wait()
        await at_once(peer)

    async def at_once(peer: Peer) -> None:
        await peer.send(data)
        if not data:
            raise ConnectionResetError

    async with scene(playing({"late": late, "at-once": at_once}), silence=0.2) as on_stage:
        status, _, refusal = await on_stage.post("at-once", stream=True)
        assert status == expected
        client = await on_stage.client()
        client.ask("late", stream=True)
        assert (await client.head())[0] == 200
        await kept_alive(client, 1)
        gate.set()
        body = await client.rest()
        client.close()
        (event,) = read_events(body)
        told, direct = error_of_any(event[1]), error_of_any(refusal)
        assert told  # what no SDK raises on would look like an empty success
        if direct and isinstance(direct, dict):
            assert isinstance(told, dict)
            assert {name: told.get(name) for name in ("message", "type", "param", "code")} == {
                name: direct.get(name) for name in ("message", "type", "param", "code")
            }
        elif isinstance(direct, str):
            assert told == direct
        first, second = await on_stage.over(2)
        assert isinstance(first, RequestFinished)
        assert isinstance(second, RequestFinished)
        assert (second.status, second.error_code) == (first.status, first.error_code) == (expected, first.error_code)
        assert not second.interrupted
        async with httpx2.AsyncClient(verify=CLEAR) as http:
            page = (await http.get(on_stage.stack.url + "/metrics")).text
        counted = [line for line in page.splitlines() if line.startswith("breakwater_requests_total{")]
        assert [line for line in counted if f'status="{expected}"' in line and line.endswith(" 2")], counted


def error_of_any(data: bytes) -> Any:
    try:
        return json.loads(data).get("error")
    except ValueError:
        return None


async def test_a_timeout_after_keep_alives() -> None:
    timeouts = {"first_event_ms": 500}
    async with scene(playing({"any": lambda peer: peer.gone()}), silence=0.2, timeouts=timeouts) as on_stage:
        status, _, body = await on_stage.post(stream=True)
        (event,) = read_events(body)
        assert (status, error_of(event[1])["code"]) == (200, "upstream_timeout")
        (outcome,) = await on_stage.over()
        assert isinstance(outcome, RequestFinished)
        assert (outcome.status, outcome.error_code) == (504, "upstream_timeout")


async def test_plain_replies_are_waited_for_in_silence() -> None:
    gate = asyncio.Event()

    async def part(peer: Peer) -> None:
        await gate.wait()
        await peer.send(plain(ANSWER % b""))

    async with scene(playing({"any": part, "stream": part}), silence=0.05) as on_stage:
        quiet, loud = await on_stage.client(), await on_stage.client()
        quiet.ask()
        loud.ask("stream", stream=True)
        await loud.head()
        await kept_alive(loud, 4)  # so long has the plain one been silent as well
        gate.set()
        status, headers, body = await quiet.answer()
        assert (status, headers["content-length"], body) == (200, str(len(body)), ANSWER % b"")
        await loud.rest()
        quiet.close()
        loud.close()


async def test_no_keep_alive_enters_a_plain_refusal_of_a_stream_that_the_client_is_slow_to_take() -> None:
    big = ANSWER % (b',"x":"' + b"x" * 8 * 1024 * 1024 + b'"')
    refusal = b'{"error":{"message":"No."}}'
    parts: dict[str, Part] = {
        "big": lambda peer: peer.send(plain(big)),
        "no": lambda peer: peer.send(plain(refusal, 400)),
    }
    parts["clock"] = lambda peer: peer.gone()
    async with scene(playing(parts), silence=0.05) as on_stage:
        client = await on_stage.client(receive_buffer=4096)
        client.ask("big")
        client.ask("no", stream=True)
        await until(lambda: len(on_stage.upstream.requests) == 2 and on_stage.slots.in_use == 0, "the refusal")
        clock = await on_stage.client()
        clock.ask("clock", stream=True)
        await clock.head()
        await kept_alive(clock, 4)  # more than one was due on the other stream meanwhile
        clock.close()
        assert (await client.answer())[2] == big
        status, headers, body = await client.answer()
        assert (status, headers["content-length"], body) == (400, str(len(refusal)), refusal)
        client.close()


# --- a plain answer to a wish for a stream --------------------------------------------------------------------------

TOOLS = (
    b'{"id":"c","object":"chat.completion","choices":[{"index":0,"finish_reason":"tool_calls","message":{"role":'
    b'"assistant","content":null,"tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}"}},'
    b'{"id":"b","type":"function","function":{"name":"g","arguments":"[]"}}]}}],%b}' % USAGE.encode()
)


async def test_a_plain_completion_becomes_a_stream() -> None:
    async with scene(lambda peer: answered(peer, plain(TOOLS))) as on_stage:
        for asked in (False, True):
            options = {"stream_options": {"include_usage": True}} if asked else {}
            status, headers, body = await on_stage.post(stream=True, **options)
            assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            *datas, done = [data for _, data in read_events(body)]
            assert done == b"[DONE]"
            first, *usage = map(json.loads, datas)
            assert first["object"] == "chat.completion.chunk"
            (choice,) = first["choices"]
            assert choice["finish_reason"] == "tool_calls"
            assert [(call["index"], call["id"]) for call in choice["delta"]["tool_calls"]] == [(0, "a"), (1, "b")]
            assert "message" not in choice
            assert [(one["choices"], one["usage"]["total_tokens"]) for one in usage] == ([([], 11)] if asked else [])
        for event in await on_stage.over(2):
            assert isinstance(event, RequestFinished)
            assert (event.stream, event.usage) == (True, Usage(9, 2))


async def test_a_plain_legacy_completion_becomes_a_stream() -> None:
    body = b'{"id":"c","object":"text_completion","choices":[{"index":0,"text":"Hi","finish_reason":"stop"}]}'
    async with scene(lambda peer: answered(peer, plain(body))) as on_stage:
        _, _, got = await on_stage.post(path="/v1/completions", prompt="Hello", stream=True)
        (_, data), done = read_events(got)
        assert (json.loads(data), done) == (json.loads(body), (b"", b"[DONE]"))
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert isinstance(event.usage, Usage)
        assert (event.usage.estimated, event.usage.output) == (True, 1)


@pytest.mark.parametrize("state", ["completed", "incomplete", "failed"])
async def test_a_plain_response_becomes_a_stream(state: str) -> None:
    body = b'{"id":"r","object":"response","status":"%b","output":[],"usage":{"input_tokens":9,"output_tokens":2}}'
    async with scene(lambda peer: answered(peer, plain(body % state.encode()))) as on_stage:
        _, _, got = await on_stage.post(path="/v1/responses", input="Hello", stream=True)
        first, last = read_events(got)
        assert (first[0], last[0]) == (b"response.created", f"response.{state}".encode())
        assert json.loads(first[1])["response"]["status"] == "in_progress"
        assert json.loads(last[1])["response"] == json.loads(body % state.encode())
        (event,) = await on_stage.over()
        assert isinstance(event, RequestFinished)
        assert event.usage == Usage(9, 2)


@pytest.mark.parametrize("body", [b"<html>", b'{"error":{"message":"No."}}', b"{}", b"[]", b""])
async def test_a_plain_answer_that_is_none_is_an_error_not_an_empty_stream(body: bytes) -> None:
    async with scene(lambda peer: answered(peer, plain(body))) as on_stage:
        status, _, got = await on_stage.post(stream=True)
        assert (status, error_of(got)["code"]) == (503, "upstream_unavailable")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b'{"error":{"n":1e999},"choices":[]}'),
        ("/v1/embeddings", b'{"error":{"m":"\\ud800"}}'),
    ],
)
async def test_a_plain_answer_with_what_cannot_be_read_is_the_providers_fault_not_ours(path: str, body: bytes) -> None:
    async with scene(lambda peer: answered(peer, plain(body))) as on_stage:
        status, _, got = await on_stage.post(path=path, input="Hello", encoding_format="base64")
        assert (status, error_of(got)["code"]) == (503, "upstream_unavailable")


# --- trailer --------------------------------------------------------------------------------------------------------

TRAILER = {"x-breakwater-trailer": "1"}
PLAIN_RESPONSE = b'{"id":"r","status":"completed","output":[],"usage":{"input_tokens":9,"output_tokens":2}}'


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (CHAT, SSE + chunk(STREAMS["openai"].raw) + END),
        (CHAT, SSE + chunk(STREAMS["crlf with usage"].raw) + END),
        ("/v1/responses", SSE + chunk(STREAMS["responses"].raw) + END),
        (CHAT, plain(TOOLS)),
        ("/v1/responses", plain(PLAIN_RESPONSE)),
    ],
    ids=["chat", "crlf", "responses", "plain chat", "plain response"],
)
async def test_the_trailer_stands_before_the_terminator_for_who_asked(path: str, sent: bytes) -> None:
    async with scene(lambda peer: answered(peer, sent)) as on_stage:
        without = (await on_stage.post(path=path, stream=True))[2]
        _, headers, body = await on_stage.post(path=path, stream=True, headers=TRAILER)
        assert b"breakwater" not in without
        assert read_events(body) == read_events(without)
        before, mark, after = body.partition(b": breakwater ")
        trailer, _, terminator = after.partition(b"\n\n")
        assert before + terminator == without
        assert mark
        assert [ends(one) for one in read_events(terminator)] == [True]
        assert json.loads(trailer) == {
            "request_id": headers["x-request-id"],
            "provider": "up",
            "model": "any",
            "usage_total": 11,
            "cost_usd": "unknown",
        }


async def test_a_stream_that_is_interrupted_has_no_trailer() -> None:
    async with scene(lambda peer: answered(peer, SSE + chunk(stream(said("Hi"))) + END)) as on_stage:
        body = (await on_stage.post(stream=True, headers=TRAILER))[2]
        assert b": breakwater" not in body
        assert error_of(read_events(body)[-1][1])["code"] == "stream_interrupted"


# --- usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_usage_zero_is_not_usage_missing(streamed: bool) -> None:
    """Zeros that a provider states are its figures. Silence is counted by us, and marked."""

    def sent(usage: bytes) -> bytes:
        if not streamed:
            return plain(ANSWER % usage)
        return SSE + chunk(stream(said("Hi"), STOP % usage.decode(), DONE)) + END

    zero = b',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'
    parts: dict[str, Part] = {
        "zero": lambda peer: peer.send(sent(zero)),
        "null": lambda peer: peer.send(sent(b',"usage":null')),
        "absent": lambda peer: peer.send(sent(b"")),
        "odd": lambda peer: peer.send(sent(b',"usage":{"prompt_tokens":"many"}')),
    }
    async with scene(playing(parts)) as on_stage:
        told = {}
        for number, model in enumerate(parts):
            _, headers, _ = await on_stage.post(model, stream=streamed)
            event = (await on_stage.over(number + 1))[-1]
            assert isinstance(event, RequestFinished)
            told[model] = event.usage
            assert headers.get("x-breakwater-usage-total") == ("0" if model == "zero" and not streamed else None)
        assert told["zero"] == Usage(0, 0)
        assert told["absent"] == told["null"] == told["odd"] == Usage(8, 1, estimated=True)


# --- backpressure ---------------------------------------------------------------------------------------------------


async def test_a_client_that_reads_slowly_slows_the_provider_down() -> None:
    """What waits for it is bounded, and all of it arrives in the end."""
    sent = 0
    enough = asyncio.Event()
    megabyte = chunk(piece_of("x" * 1000) * 1000)

    async def flood(peer: Peer) -> None:
        nonlocal sent
        await peer.send(SSE)
        while not enough.is_set():
            await peer.send(megabyte)
            sent += 1
            await asyncio.sleep(0)
        await peer.send(chunk(b"data: [DONE]\n\n") + END)

    async with scene(playing({"any": flood})) as on_stage:
        client = await on_stage.client(receive_buffer=4096)
        client.ask(stream=True)
        await until(
            lambda: any(one.flow.write_paused for one in on_stage.connections), "the client's buffer to be full"
        )
        await standstill(lambda: sent)
        stopped_at = sent
        assert stopped_at < 32  # megabytes in five buffers of the kernel and two of ours
        (connection,) = on_stage.connections
        assert connection.transport.get_write_buffer_size() < 1024 * 1024
        enough.set()
        await client.head()
        body = await client.rest()
        assert body == piece_of("x" * 1000) * 1000 * sent + b"data: [DONE]\n\n"
        assert sent <= stopped_at + 1
        client.close()


async def standstill(count: Callable[[], int]) -> None:
    """Waits until `count` has not moved for a third of a second."""
    quiet, last = 0, count()
    while quiet < 30:
        await asyncio.sleep(0.01)
        quiet, last = (quiet + 1, last) if count() == last else (0, count())
