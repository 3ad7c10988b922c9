"""What the mock answers, asked directly: shapes, determinism, counts, refusals."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_wire import CALM

from proxy.providers.mock.counting import Memo, real_counts
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.ledger import Ledger
from proxy.providers.mock.text import running, shorten, split
from proxy.transport.answer import NEVER, Answer, End, Outcome

COUNT = real_counts()
HI = [{"role": "user", "content": "hi there"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


def post(mock: Mock, path: str, body: Any, *headers: tuple[bytes, bytes]) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return mock.handle(b"POST", path.encode(), list(headers), data).answer


def get(mock: Mock, path: str, method: bytes = b"GET") -> Answer:
    return mock.handle(method, path.encode(), [], b"").answer


def body_of(answer: Answer) -> bytes:
    return b"".join(data for _, data in answer.steps)


def json_of(answer: Answer) -> Any:
    return json.loads(body_of(answer))


def chat(mock: Mock, model: str = "some-model", **more: Any) -> Any:
    return json_of(post(mock, "/v1/chat/completions", {"model": model, "messages": HI, **more}))


def events(answer: Answer) -> list[Any]:
    """The data of each step; every step is one whole event."""
    assert dict(answer.headers)[b"content-type"].startswith(b"text/event-stream")
    out = []
    for _, data in answer.steps:
        assert data.endswith(b"\n\n")
        assert data.count(b"\n\n") == 1
        line = data.rstrip().split(b"\n")[-1]
        assert line.startswith(b"data: ")
        out.append("[DONE]" if line == b"data: [DONE]" else json.loads(line[6:]))
    return out


def stream(mock: Mock, model: str = "some-model", **more: Any) -> list[Any]:
    return events(post(mock, "/v1/chat/completions", {"model": model, "messages": HI, "stream": True, **more}))


@pytest.fixture
def mock() -> Mock:
    return Mock(COUNT)


# -- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "m", "messages": HI}),
        ("/v1/chat/completions", {"model": "m", "messages": HI, "stream": True, "tools": [WEATHER]}),
        ("/v1/completions", {"model": "m", "prompt": "hi"}),
        ("/v1/responses", {"model": "m", "input": "hi", "stream": True}),
        ("/v1/embeddings", {"model": "m", "input": "hi"}),
        ("/v1/moderations", {"model": "m", "input": "hi"}),
    ],
)
def test_the_same_request_gets_the_same_bytes(path: str, body: Any) -> None:
    first, again = Mock(COUNT, seed=7), Mock(COUNT, seed=7)
    once = post(first, path, body)
    assert body_of(post(first, path, body)) == body_of(once)
    assert body_of(post(again, path, body)) == body_of(once)
    assert post(again, path, body).headers == once.headers


def test_another_seed_or_another_question_gets_another_answer(mock: Mock) -> None:
    text = chat(mock)["choices"][0]["message"]["content"]
    assert chat(Mock(COUNT, seed=1))["choices"][0]["message"]["content"] != text
    other = chat(mock, messages=[{"role": "user", "content": "hi where"}])
    assert other["choices"][0]["message"]["content"] != text
    assert other["id"] != chat(mock)["id"]


def test_white_space_member_order_and_prefix_do_not_change_what_is_said(mock: Mock) -> None:
    tight = json.dumps({"model": "m", "messages": HI}, separators=(",", ":")).encode()
    loose = json.dumps({"messages": HI, "model": "mock/m"}, indent=4).encode()
    one, two = (json_of(post(mock, "/v1/chat/completions", body)) for body in (tight, loose))
    assert (one.pop("model"), two.pop("model")) == ("m", "mock/m")
    assert one == two


def test_an_answer_kept_for_equal_requests_is_booked_for_each(mock: Mock) -> None:
    body = json.dumps({"model": "m", "messages": HI}).encode()
    servings = [mock.handle(b"POST", b"/v1/chat/completions", [(b"x-request-id", b"r%d" % i)], body) for i in range(3)]
    assert servings[0].answer is servings[2].answer
    assert [s.request_id for s in servings] == [b"r0", b"r1", b"r2"]
    servings[1].tally.close(1, Outcome.FINISHED)
    servings[1].tally.close(0, Outcome.GONE)  # the second word does not count
    books = mock.ledger.read()
    assert [entry["request_id"] for entry in books["entries"]] == ["r0", "r1", "r2"]
    assert [entry["in_flight"] for entry in books["entries"]] == [True, False, True]
    assert (books["totals"]["in_flight"], books["totals"]["finished"], books["totals"]["client_gone"]) == (2, 1, 0)


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_plain_answer_has_the_wire_shape_and_true_counts(mock: Mock) -> None:
    answer = chat(mock)
    message = answer["choices"][0]["message"]
    usage = answer["usage"]
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 15 <= usage["completion_tokens"] <= 90
    assert usage["completion_tokens"] == COUNT(message["content"])
    assert usage["prompt_tokens"] == 3 + 3 + COUNT("user") + COUNT("hi there")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_says_the_same_as_the_plain_answer(mock: Mock) -> None:
    chunks = stream(mock)
    plain = chat(mock)
    assert chunks[-1] == "[DONE]"
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks[:-1]} == {
        (plain["id"], plain["created"], plain["model"], "chat.completion.chunk")
    }
    deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[-1] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert "".join(d.get("content", "") for d in deltas) == plain["choices"][0]["message"]["content"]
    assert len(deltas) - 2 >= 20
    assert all("usage" not in c for c in chunks[:-1])


def test_the_usage_chunk_comes_only_when_asked_for(mock: Mock) -> None:
    chunks = stream(mock, stream_options={"include_usage": True})
    assert all(c["usage"] is None for c in chunks[:-2])
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == chat(mock)["usage"]
    assert all("usage" not in c for c in stream(mock, stream_options={"include_usage": False})[:-1])


def test_the_books_follow_the_stream_piece_by_piece(mock: Mock) -> None:
    answer = post(mock, "/v1/chat/completions", {"model": "m", "messages": HI, "stream": True})
    chunks = events(answer)
    for sent in (0, 1, 5, len(answer.steps)):
        serving = mock.handle(
            b"POST",
            b"/v1/chat/completions",
            [],
            json.dumps({"model": "m", "messages": HI, "stream": True}).encode(),
        )
        serving.tally.close(sent, Outcome.GONE)
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:sent] if c != "[DONE]")
        entry = mock.ledger.read()["entries"][-1]
        assert entry["completion_tokens"] == COUNT(text)
        assert entry["chunks_sent"] == sent


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_cuts_and_says_so(mock: Mock, name: str) -> None:
    answer = chat(mock, **{name: 7})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 1 <= answer["usage"]["completion_tokens"] <= 7
    assert chat(mock, **{name: 5000})["choices"][0]["finish_reason"] == "stop"
    assert stream(mock, **{name: 7})[-2]["choices"][0]["finish_reason"] == "length"


def test_stop_texts_end_the_answer_before_them(mock: Mock) -> None:
    text = chat(mock, model="echo", messages=[{"role": "user", "content": "one two three four"}], stop=[" three", "x"])
    assert text["choices"][0]["message"]["content"] == "one two"
    assert text["choices"][0]["finish_reason"] == "stop"


def test_several_choices(mock: Mock) -> None:
    answer = chat(mock, n=3)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == sum(map(COUNT, texts))
    streamed = ["", "", ""]
    order = []
    for chunk in stream(mock, n=3)[:-1]:
        choice = chunk["choices"][0]
        order.append(choice["index"])
        streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts
    assert order[:6] == [0, 1, 2, 0, 1, 2]


def test_echo_is_verbatim_streamed_or_not(mock: Mock) -> None:
    said = "  Zwölf\tBoxkämpfer 🥊\n\njagen \u200bViktor" + "x" * 100 + " \n"
    messages = [*HI, {"role": "assistant", "content": "no"}, {"role": "user", "content": said}]
    assert chat(mock, "mock/echo", messages=messages)["choices"][0]["message"]["content"] == said
    parts = [{"type": "text", "text": said[:9]}, {"type": "text", "text": said[9:]}]
    chunks = stream(mock, "echo", messages=[{"role": "user", "content": parts}])
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1]) == said


# -- tools -----------------------------------------------------------------------------------------------------------


def test_tools_are_called_and_then_answered(mock: Mock) -> None:
    answer = chat(mock, tools=[WEATHER, CLOCK])
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 3
    done = [*HI, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    after = chat(mock, tools=[WEATHER, CLOCK], messages=done)["choices"][0]
    assert after["finish_reason"] == "stop"
    assert after["message"]["content"]
    assert "tool_calls" not in after["message"]


def test_streamed_calls_join_to_the_plain_ones(mock: Mock) -> None:
    more = {"tools": [WEATHER, CLOCK], "messages": [{"role": "user", "content": "get_time, then get_weather"}]}
    plain = chat(mock, **more)["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in plain] == ["get_weather", "get_time"]
    joined: dict[int, Any] = {}
    fragments = 0
    for chunk in stream(mock, **more)[:-1]:
        for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if "id" in part:
                joined[part["index"]] = {k: part[k] for k in ("id", "type", "function")}
            else:
                joined[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
                fragments += 1
    assert [joined[i] for i in sorted(joined)] == plain
    assert fragments > len(plain)
    one = chat(mock, **more, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]
    assert len(one) == 1


@pytest.mark.parametrize(
    ("choice", "name", "finish"),
    [
        ("required", "get_weather", "tool_calls"),
        ({"type": "function", "function": {"name": "get_time"}}, "get_time", "stop"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CLOCK]}}, "get_time", "tool_calls"),
    ],
)
def test_a_tool_choice_decides(mock: Mock, choice: Any, name: str, finish: str) -> None:
    answer = chat(mock, tools=[WEATHER, CLOCK], tool_choice=choice)["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == name
    assert answer["finish_reason"] == finish


def test_no_tool_is_called_where_none_may(mock: Mock) -> None:
    assert "tool_calls" not in chat(mock, tools=[WEATHER], tool_choice="none")["choices"][0]["message"]


def test_a_custom_tool_gets_text(mock: Mock) -> None:
    tool = {"type": "custom", "custom": {"name": "shell"}}
    (call,) = chat(mock, tools=[tool])["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "custom"
    assert call["custom"]["name"] == "shell"
    assert call["custom"]["input"]
    parts = [c["choices"][0]["delta"].get("tool_calls") for c in stream(mock, tools=[tool])[:-1]]
    assert "".join(p[0]["custom"]["input"] for p in parts if p) == call["custom"]["input"]


def test_a_token_limit_leaves_half_a_call(mock: Mock) -> None:
    answer = chat(mock, tools=[WEATHER], max_tokens=8)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] <= 8
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["function"]["arguments"])


def test_structured_answers(mock: Mock) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert isinstance(json.loads(chat(mock, response_format=form)["choices"][0]["message"]["content"])["n"], int)
    form = {"type": "json_object"}
    assert isinstance(json.loads(chat(mock, response_format=form)["choices"][0]["message"]["content"]), dict)


# -- the other routes ------------------------------------------------------------------------------------------------


def test_completions(mock: Mock) -> None:
    body = {"model": "m", "prompt": ["one", "two"], "n": 2}
    answer = json_of(post(mock, "/v1/completions", body))
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 4
    chunks = events(post(mock, "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"] == answer["usage"]
    joined = [""] * 4
    for chunk in chunks[:-2]:
        joined[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert joined == texts


def test_embeddings_are_unit_vectors_in_either_form(mock: Mock) -> None:
    floats = json_of(post(mock, "/v1/embeddings", {"model": "m", "input": ["a", "b"]}))
    packed = json_of(post(mock, "/v1/embeddings", {"model": "m", "input": ["a", "b"], "encoding_format": "base64"}))
    for one, two in zip(floats["data"], packed["data"], strict=True):
        vector = one["embedding"]
        assert len(vector) == 1536
        assert math.isclose(math.fsum(v * v for v in vector), 1.0, abs_tol=1e-4)
        assert list(struct.unpack("<1536f", base64.b64decode(two["embedding"]))) == vector
    assert floats["data"][0]["embedding"] != floats["data"][1]["embedding"]
    assert floats["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    short = json_of(post(mock, "/v1/embeddings", {"model": "m", "input": [[5, 6, 7]], "dimensions": 8}))
    assert len(short["data"][0]["embedding"]) == 8
    assert short["usage"]["prompt_tokens"] == 3


def test_responses_plain_and_streamed_agree(mock: Mock) -> None:
    body = {"model": "m", "input": "hi", "instructions": "Be terse."}
    plain = json_of(post(mock, "/v1/responses", body))
    assert plain["status"] == "completed"
    assert plain["usage"]["output_tokens"] == COUNT(plain["output"][0]["content"][0]["text"])
    answer = post(mock, "/v1/responses", {**body, "stream": True})
    for _, data in answer.steps:
        kind = data.split(b"\n")[0].removeprefix(b"event: ").decode()
        assert json.loads(data.split(b"data: ", 1)[1])["type"] == kind
    seen = events(answer)
    assert [e["sequence_number"] for e in seen] == list(range(len(seen)))
    assert [e["type"] for e in seen[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    text = "".join(e["delta"] for e in seen if e["type"] == "response.output_text.delta")
    assert text == plain["output"][0]["content"][0]["text"]
    assert seen[-1]["type"] == "response.completed"
    assert seen[-1]["response"] == plain


def test_responses_call_flat_tools_and_stop_at_a_limit(mock: Mock) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    plain = json_of(post(mock, "/v1/responses", {"model": "m", "input": "hi", "tools": [tool]}))
    (item,) = plain["output"]
    assert item["type"] == "function_call"
    json.loads(item["arguments"])
    follow = [{"role": "user", "content": "hi"}, item, {**OUTPUT, "call_id": item["call_id"]}]
    after = json_of(post(mock, "/v1/responses", {"model": "m", "input": follow, "tools": [tool]}))
    assert after["output"][0]["type"] == "message"
    cut = events(post(mock, "/v1/responses", {"model": "m", "input": "hi", "max_output_tokens": 5, "stream": True}))
    assert cut[-1]["type"] == "response.incomplete"
    assert cut[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


OUTPUT = {"type": "function_call_output", "output": "sunny"}


def test_stored_responses(mock: Mock) -> None:
    made = json_of(post(mock, "/v1/responses", {"model": "m", "input": "hi"}))
    path = f"/v1/responses/{made['id']}"
    assert json_of(get(mock, path)) == made
    assert json_of(get(mock, path + "/input_items"))["data"][0]["content"] == "hi"
    more = {"model": "m", "input": "and?", "previous_response_id": made["id"]}
    alone = json_of(post(mock, "/v1/responses", {"model": "m", "input": "and?"}))["usage"]["input_tokens"]
    after = json_of(post(mock, "/v1/responses", more))
    assert after["usage"]["input_tokens"] == alone + made["usage"]["total_tokens"]
    assert json_of(get(mock, path, b"DELETE"))["deleted"] is True
    assert get(mock, path).status == 404
    assert post(mock, "/v1/responses", {**more, "instructions": "x"}).status == 400
    hidden = json_of(post(mock, "/v1/responses", {"model": "m", "input": "psst", "store": False}))
    assert get(mock, f"/v1/responses/{hidden['id']}").status == 404
    counted = json_of(post(mock, "/v1/responses/input_tokens", {"model": "m", "input": "and?"}))
    assert counted == {"object": "response.input_tokens", "input_tokens": alone}


def test_models_files_speech_moderations(mock: Mock) -> None:
    listed = [one["id"] for one in json_of(get(mock, "/v1/models"))["data"]]
    assert {"echo", "stall", "429"} <= set(listed)
    assert json_of(get(mock, "/v1/models/meta%2Fllama-3:free"))["id"] == "meta/llama-3:free"
    assert json_of(get(mock, "/v1/models/meta/llama-3"))["id"] == "meta/llama-3"
    assert get(mock, "/v1/models/404").status == 404
    assert set(body_of(get(mock, "/v1/files/file-1/content"))) == set(range(256))
    sound = post(mock, "/v1/audio/speech", {"model": "m", "input": "hi you", "voice": "x"})
    assert dict(sound.headers)[b"content-type"] == b"audio/mpeg"
    assert len(body_of(sound)) == 8192
    assert json_of(post(mock, "/v1/moderations", {"model": "m", "input": "hi"}))["results"][0]["flagged"] is False


def test_an_upload_is_measured(mock: Mock) -> None:
    data = bytes(range(256)) * 3 + b"\r\n--other\r\n"
    form = (
        b'--bound\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--bound--\r\n"
    )
    kind = (b"content-type", b"multipart/form-data; boundary=bound")
    answer = json_of(post(mock, "/v1/files", form, kind))
    assert (answer["bytes"], answer["filename"], answer["purpose"]) == (len(data), "a.bin", "batch")
    assert post(mock, "/v1/files", form[:-12], kind).status == 400
    assert post(mock, "/v1/files", form).status == 400


# -- faults by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 429, 500, 503, 529])
@pytest.mark.parametrize("streamed", [False, True])
def test_status_models(mock: Mock, status: int, streamed: bool) -> None:
    for path, asked in (("/v1/chat/completions", {"messages": HI}), ("/v1/embeddings", {"input": "x"})):
        answer = post(mock, path, {"model": f"mock/{status}", "stream": streamed, **asked})
        assert answer.status == status
        assert set(json_of(answer)["error"]) == {"message", "type", "param", "code"}
        assert ((b"retry-after", b"1") in answer.headers) == (status in (429, 503))
    entry = mock.ledger.read()["entries"][-1]
    assert (entry["status"], entry["prompt_tokens"], entry["completion_tokens"]) == (status, 0, 0)


def faulty(mock: Mock, name: str, streamed: bool, **more: Any) -> Answer:
    return post(mock, "/v1/chat/completions", {"model": name, "messages": HI, "stream": streamed, **more})


def test_answers_that_break_off(mock: Mock) -> None:
    for name, end in (("cut", End.RESET), ("early-close", End.CLOSE)):
        plain, streamed = faulty(mock, name, False), faulty(mock, name, True)
        assert plain.end is streamed.end is end
        assert plain.length is not None
        assert 0 < len(body_of(plain)) < plain.length
        assert not plain.whole
        assert events(streamed)[-1]["choices"][0]["finish_reason"] is None
        assert len(streamed.steps) > 5
    assert faulty(mock, "stall", False).delay == NEVER
    stalled = faulty(mock, "stall", True)
    assert (stalled.end, len(stalled.steps), stalled.delay) == (End.STALL, 1, 0)


def test_answers_that_are_wrong(mock: Mock) -> None:
    assert events(faulty(mock, "no-done", True))[-1]["choices"][0]["finish_reason"] == "stop"
    assert faulty(mock, "no-done", True).end is End.COMPLETE
    assert dict(faulty(mock, "garbage", False).headers)[b"content-type"].startswith(b"text/html")
    with pytest.raises(json.JSONDecodeError):
        events(faulty(mock, "garbage", True))
    assert [set(e) for e in events(faulty(mock, "error-event", True))] == [{"error"}]
    assert "error" in events(faulty(mock, "error-late", True))[-1]
    assert len(faulty(mock, "error-late", True).steps) > 5
    assert set(json_of(faulty(mock, "error-event", False))) == {"error"}
    assert json_of(faulty(mock, "plain", True))["object"] == "chat.completion"
    assert "usage" not in json_of(faulty(mock, "no-usage", False))
    asked = {"stream_options": {"include_usage": True}}
    assert all("usage" not in c for c in events(faulty(mock, "no-usage", True, **asked))[:-1])
    refused = faulty(mock, "refuses-usage", True, **asked)
    assert (refused.status, json_of(refused)["error"]["param"]) == (400, "stream_options")
    assert faulty(mock, "refuses-usage", True).status == 200
    assert json_of(faulty(mock, "window-3", False))["error"]["code"] == "context_length_exceeded"
    assert faulty(mock, "window-100", False).status == 200


def test_faults_of_the_responses_stream_are_in_its_own_shape(mock: Mock) -> None:
    def asked(name: str) -> list[Any]:
        return events(post(mock, "/v1/responses", {"model": name, "input": "hi", "stream": True}))

    assert asked("no-done")[-1]["type"] == "response.output_item.done"
    (flat,) = asked("error-event")
    assert (flat["type"], flat["code"]) == ("error", "mock_error")


def test_the_pace_is_in_the_steps() -> None:
    mock = Mock(COUNT, tokens_per_second=10, first_token_ms=500, slow_ms=3000)
    answer = post(mock, "/v1/chat/completions", {"model": "m", "messages": HI, "stream": True})
    delays = [delay for delay, _ in answer.steps]
    billed = chat(mock, "m")["usage"]["completion_tokens"]
    assert delays[0] == 0.5
    assert math.isclose(sum(delays), 0.5 + 0.1 * billed)
    assert delays[-2:] == [0, 0]
    assert math.isclose(post(mock, "/v1/chat/completions", {"model": "m", "messages": HI}).delay, sum(delays))
    assert post(mock, "/v1/chat/completions", {"model": "slow", "messages": HI}).delay >= 3
    sized = post(mock, "/v1/chat/completions", {"model": "bench-20-100", "messages": HI, "stream": True})
    assert len(sized.steps) == 20 + 3
    assert sum(delay > 0 for delay, _ in sized.steps) == 21


# -- refusals --------------------------------------------------------------------------------------------------------

CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {}}]}


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "tool", "tool_call_id": "c1", "content": "x"}]}, "messages[1].role"),
        ({"messages": [*HI, CALLED]}, "messages[1].role"),
        ({"messages": [*HI, CALLED, *HI]}, "messages[2].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_what_a_provider_refuses_is_refused(mock: Mock, changed: Any, param: str) -> None:
    answer = post(mock, "/v1/chat/completions", {"model": "m", "messages": HI, **changed})
    assert answer.status == 400
    assert json_of(answer)["error"]["param"] == param


def test_bodies_that_are_no_json_objects_and_unknown_paths(mock: Mock) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe{}", b'{"model":"m"} x'):
        assert post(mock, "/v1/chat/completions", body).status == 400
    for method, path in ((b"GET", "/v1/chat/completions"), (b"POST", "/v1/nothing"), (b"PUT", "/v1/models"),
                         (b"GET", "/"), (b"POST", "/__ledger"), (b"GET", "/__x")):  # fmt: skip
        answer = mock.handle(method, path.encode(), [], b"{}").answer
        assert answer.status == 404
        assert json_of(answer)["error"]["code"] == "unknown_url"


def test_an_outage_begins_and_ends_on_request(mock: Mock) -> None:
    asked = {"model": "m", "messages": HI}
    before = body_of(post(mock, "/v1/chat/completions", asked))
    assert json_of(get(mock, "/v1/__outage", b"POST")) == {"outage": True}
    for _ in range(2):
        answer = post(mock, "/v1/chat/completions", asked)
        assert (answer.status, json_of(answer)["error"]["code"]) == (503, "outage")
    assert get(mock, "/v1/models").status == 503
    assert get(mock, "/__health").status == 200
    assert json_of(get(mock, "/__outage", b"DELETE")) == {"outage": False}
    assert body_of(post(mock, "/v1/chat/completions", asked)) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.text(max_size=4) | st.sampled_from(["function", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "name", "function", "tools", "$ref"]), inner)
    ),
    max_leaves=8,
)
MEMBERS = ("messages", "input", "prompt", "tools", "tool_choice", "stop", "n", "text", "response_format", "stream",
           "stream_options", "dimensions", "instructions", "previous_response_id", "parallel_tool_calls")  # fmt: skip
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/moderations",
         "/v1/audio/speech", "/v1/responses/input_tokens", "/v1/responses/x/y")  # fmt: skip


@settings(CALM, max_examples=300)
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=6), st.booleans())
def test_no_body_makes_the_mock_stumble(path: str, members: dict[str, Any], sensible: bool) -> None:
    body = {"model": "m", **({"messages": HI, "input": "x", "prompt": "y"} if sensible else {}), **members}
    answer = post(MANY, path, body)
    assert answer.status in (200, 400, 404)


MANY = Mock(lambda text: len(text.split()))


# -- books and words -------------------------------------------------------------------------------------------------


def test_the_books_are_bounded_and_can_be_read_from_any_place() -> None:
    ledger = Ledger(kept=5)
    for i in range(8):
        ledger.open("/p", "m", 200, 10, [i], b"", b"Bearer key-%d" % (i % 2)).close(1, Outcome.FINISHED)
    books = ledger.read()
    assert [entry["id"] for entry in books["entries"]] == [4, 5, 6, 7, 8]
    assert books["totals"]["requests"] == 8
    assert books["totals"]["completion_tokens"] == sum(range(8))
    assert [entry["id"] for entry in ledger.read(since=6)["entries"]] == [7, 8]
    assert [entry["id"] for entry in ledger.read(since=1, limit=2)["entries"]] == [4, 5]
    assert ledger.read(since=99)["entries"] == []
    seen = [entry["authorization_seen"] for entry in books["entries"]]
    assert len(set(seen)) == 2
    assert all(len(one) == 12 for one in seen)
    open_still = ledger.open("/p", "m", 200, 10, [1], b"", b"")
    assert ledger.reset() == 5
    open_still.close(1, Outcome.FINISHED)
    assert ledger.read()["totals"]["finished"] == 0
    assert ledger.open("/p", "m", 200, 0, [], b"", b"").id == 10


def test_no_key_is_ever_in_the_books(mock: Mock) -> None:
    for name in (b"authorization", b"api-key", b"x-api-key"):
        body = json.dumps({"model": "m", "messages": HI}).encode()
        value = b"Bearer sk-secret-canary" if name == b"authorization" else b"sk-secret-canary"
        mock.handle(b"POST", b"/v1/chat/completions", [(name, value)], body)
    page = body_of(get(mock, "/__ledger"))
    assert b"canary" not in page
    assert len({entry["authorization_seen"] for entry in json.loads(page)["entries"]}) == 1


@CALM
@given(st.text(max_size=300))
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(split(text)) == text


@CALM
@given(
    st.lists(st.text(min_size=1, max_size=5), max_size=20),
    st.integers(1, 10),
    st.lists(st.text(min_size=1), max_size=2),
)
def test_what_is_shortened_is_a_beginning_within_its_bounds(pieces: list[str], limit: int, stop: list[str]) -> None:
    kept, cut = shorten(pieces, limit, stop, len)
    text, whole = "".join(kept), "".join(pieces)
    assert whole.startswith(text)
    assert len(text) <= limit
    assert all(word not in text for word in stop)
    assert cut or text == min((whole[: whole.find(w)] for w in stop if w in whole), key=len, default=whole)
    counts = running(kept, len)
    assert counts == sorted(counts)
    assert not counts or counts[-1] == len(text)


def test_the_memo_is_bounded_and_right() -> None:
    asked: list[str] = []
    memo = Memo(lambda text: asked.append(text) or len(text), size=2, longest=5)
    assert [memo("a"), memo("a"), memo("bb"), memo("ccc"), memo("a")] == [1, 1, 2, 3, 1]
    assert asked == ["a", "bb", "ccc", "a"]
    assert [memo("dddddd"), memo("dddddd")] == [6, 6]
    assert asked.count("dddddd") == 1  # a long one by its digest
