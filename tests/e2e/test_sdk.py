"""The official `openai` package, sync and async, on a real socket: right answers, and every error as its own class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import yaml
from openai import Omit

from tests.clear import CLEAR
from tests.e2e.sdk import KINDS, Sdk
from tests.e2e.stack import ALONE, ServeProcess, serving
from tests.e2e.upstreams import MockProcess, mock_process

pytestmark = pytest.mark.slow

HI: list[Any] = [{"role": "user", "content": "What holds the harbor? Grüße ✓"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["q", "n"],
        },
    },
}
USAGE: Any = {"include_usage": True}
TENANT_KEY = "bw-tenant-key-0123456789"
OTHER_KEY = "bw-other-tenant-0123456789"
FLOATS = [[0.125, -0.5, 0.0078125, 0.1], [1.0, 0.25, -3.4e38, 1e-30]]
MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockProcess]:
    """One of its models ignores the wish for base64, as many servers do."""
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(FLOATS)]
    floats = {
        "match": {"path": "/v1/embeddings", "model": "floats"},
        "times": "always",
        "json": {"object": "list", "data": data, "model": "floats", "usage": {"prompt_tokens": 2, "total_tokens": 2}},
    }
    script = tmp_path_factory.mktemp("mock") / "script.yaml"
    script.write_text(yaml.safe_dump([floats]))
    with mock_process(script=script) as one:
        yield one


@pytest.fixture(scope="module")
def proxy(mock: MockProcess) -> Iterator[ServeProcess]:
    """Without tenants. `quick/*` is the same mock with little patience, `inner/*` the one without a network."""
    up = {"kind": "openai", "base_url": mock.url, "api_key": "sk-upstream-0123456789"}
    config = {
        **ALONE,
        "listen": {"max_body_bytes": MOST_BYTES},
        "providers": {
            "up": up,
            "quick": {**up, "timeouts": {"idle_ms": 400, "total_ms": 400}},
            "inner": {"kind": "mock", "seed": 7},
        },
        "models": [
            {"name": "*", "targets": ["up/*"]},
            {"name": "quick/*", "targets": ["quick/*"]},
            {"name": "inner/*", "targets": ["inner/*"]},
            {"name": "renamed", "targets": ["up/gpt-4o-mini"]},
        ],
    }
    with serving(config) as process:
        yield process


@pytest.fixture(scope="module")
def keyed() -> Iterator[ServeProcess]:
    """With two tenants, of whom one may use one model and no further path."""
    config = {
        "providers": {"inner": {"kind": "mock"}},
        "models": [{"name": "*", "targets": ["inner/*"]}],
        "tenants": [
            {"name": "acme", "keys": [TENANT_KEY], "passthrough": ["/v1/moderations"]},
            {"name": "narrow", "keys": [OTHER_KEY], "models": ["gpt-4o*"]},
        ],
    }
    with serving(config) as process:
        yield process


@pytest.fixture(scope="module", params=KINDS)
def sdk(request: pytest.FixtureRequest, proxy: ServeProcess) -> Iterator[Sdk]:
    with Sdk(request.param, f"{proxy.url}/v1") as one:
        yield one


@pytest.fixture(scope="module")
def direct(mock: MockProcess) -> Iterator[Sdk]:
    """Straight to the provider."""
    with Sdk("sync", mock.url) as one:
        yield one


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# --- right answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt-4o-mini", "inner/gpt-4o-mini", "renamed"])
def test_chat(sdk: Sdk, model: str) -> None:
    answer = sdk.call("chat.completions.create", model=model, messages=HI)
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0
    chunks = sdk.call("chat.completions.create", model=model, messages=HI, stream=True)
    assert text_of(chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_answer_is_the_provider_s(sdk: Sdk, direct: Sdk) -> None:
    for options in ({}, {"stream": True}, {"stream": True, "stream_options": USAGE}, {"n": 3, "max_tokens": 5}):
        through = sdk.call("chat.completions.create", model="any", messages=HI, **options)
        assert through == direct.call("chat.completions.create", model="any", messages=HI, **options)


@pytest.mark.parametrize("model", ["any", "inner/any"])
def test_usage_comes_in_a_stream_when_it_is_asked_for_and_never_else(sdk: Sdk, model: str) -> None:
    plain = sdk.call("chat.completions.create", model=model, messages=HI)
    asked = sdk.call("chat.completions.create", model=model, messages=HI, stream=True, stream_options=USAGE)
    assert asked[-1].choices == []
    assert asked[-1].usage == plain.usage
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        unasked = sdk.call("chat.completions.create", model=model, messages=HI, stream=True, **options)
        assert len(unasked) == len(asked) - 1
        assert all(chunk.choices for chunk in unasked)
        assert not any("usage" in chunk.model_fields_set for chunk in unasked)


@pytest.mark.parametrize("model", ["any", "inner/any"])
def test_tool_calls(sdk: Sdk, model: str) -> None:
    answer = sdk.call("chat.completions.create", model=model, messages=HI, tools=[TOOL])
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["q"], str)
    assert isinstance(arguments["n"], int)
    chunks = sdk.call("chat.completions.create", model=model, messages=HI, tools=[TOOL], stream=True)
    deltas = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert len(deltas) > 2  # it came in fragments
    assert [delta.id for delta in deltas if delta.id] == [call.id]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_legacy_completions(sdk: Sdk) -> None:
    answer = sdk.call("completions.create", model="any", prompt="Once")
    chunks = sdk.call("completions.create", model="any", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text != ""
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)
    asked = sdk.call("completions.create", model="any", prompt="Once", stream=True, stream_options=USAGE)
    assert asked[-1].usage == answer.usage


@pytest.mark.parametrize("model", ["any", "inner/any"])
def test_embeddings_are_the_same_in_either_encoding(sdk: Sdk, model: str) -> None:
    packed = sdk.call("embeddings.create", model=model, input=["a", "b"])  # the client asks for base64 by itself
    floats = sdk.call("embeddings.create", model=model, input=["a", "b"], encoding_format="float")
    assert len(floats.data[0].embedding) == 1536
    for one, other in zip(packed.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-7)
    assert packed.usage == floats.usage


def test_floats_become_base64_when_the_client_decodes_base64(sdk: Sdk) -> None:
    packed = sdk.call("embeddings.create", model="floats", input=["a", "b"])
    assert [entry.embedding for entry in packed.data] == [pytest.approx(vector, rel=1e-6) for vector in FLOATS]
    raw = sdk.call("embeddings.with_raw_response.create", model="floats", input=["a", "b"], encoding_format="base64")
    assert all(isinstance(entry["embedding"], str) for entry in json.loads(raw.content)["data"])
    floats = sdk.call("embeddings.create", model="floats", input=["a", "b"], encoding_format="float")
    assert [entry.embedding for entry in floats.data] == FLOATS


@pytest.mark.parametrize("model", ["any", "inner/any"])
def test_responses(sdk: Sdk, model: str) -> None:
    answer = sdk.call("responses.create", model=model, input="hi")
    assert answer.output_text
    events = sdk.call("responses.create", model=model, input="hi", stream=True)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output == answer.output
    assert events[-1].response.usage == answer.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text


def test_a_response_s_stream_has_no_done(proxy: ServeProcess) -> None:
    body = {"model": "any", "input": "hi", "stream": True}
    answer = httpx2.post(f"{proxy.url}/v1/responses", json=body, timeout=30, verify=CLEAR)
    assert answer.text.split("\n\n")[-2].startswith("event: response.completed\n")
    assert "[DONE]" not in answer.text


def test_stored_responses_pass_without_tenants(sdk: Sdk) -> None:
    made = sdk.call("responses.create", model="any", input="hi")
    assert sdk.call("responses.retrieve", made.id).output_text == made.output_text
    after = sdk.call("responses.create", model="any", input="and then?", previous_response_id=made.id)
    assert after.previous_response_id == made.id
    sdk.call("responses.delete", made.id)
    with pytest.raises(openai.NotFoundError):
        sdk.call("responses.retrieve", made.id)


def test_models(sdk: Sdk) -> None:
    ids = [model.id for model in sdk.call("models.list")]
    assert {"renamed", "echo", "quick/echo", "inner/echo", "gpt-4o-mini"} <= set(ids)
    assert len(ids) == len(set(ids))
    for name in ("renamed", "echo", "inner/echo", "quick/echo"):
        assert sdk.call("models.retrieve", name).id == name
    with pytest.raises(openai.NotFoundError) as raised:
        sdk.call("models.retrieve", "inner/not/there")
    assert raised.value.code == "model_not_found"


def test_pass_through(sdk: Sdk) -> None:
    assert sdk.call("moderations.create", model="any", input="x").results[0].flagged is False
    sound = sdk.call("audio.speech.create", model="any", voice="alloy", input="x y z")
    assert sound.content == bytes(range(256)) * 16 * 3
    assert sdk.call("files.create", file=("a.jsonl", b"{}\n" * 1000), purpose="batch").bytes == 3000
    assert sdk.call("files.content", "file-1").content == bytes(range(256)) * 16


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/"])
def test_with_and_without_the_prefix(sdk: Sdk, proxy: ServeProcess, base: str) -> None:
    one = sdk.altered(base_url=proxy.url + base)
    assert one.call("chat.completions.create", model="any", messages=HI).choices
    assert one.call("embeddings.create", model="any", input="a").data
    assert one.call("moderations.create", model="any", input="x").results
    assert one.call("models.retrieve", "inner/echo").id == "inner/echo"
    assert one.get("/models/").json()["object"] == "list"


# --- errors before the first byte -----------------------------------------------------------------------------------


def refused(sdk: Sdk, kind: type[openai.APIStatusError], method: str, **options: Any) -> openai.APIStatusError:
    """The error, of exactly this class, in the envelope and with a request id."""
    with pytest.raises(openai.APIStatusError) as raised:
        sdk.call(method, **options)
    error = raised.value
    assert type(error) is kind
    assert isinstance(error.body, dict)
    assert set(error.body) - {"breakwater"} == {"message", "type", "param", "code"}
    assert error.request_id
    return error


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_s_own_refusal_passes_unchanged(sdk: Sdk, direct: Sdk, stream: bool) -> None:
    for model, kind in (("mock/400", openai.BadRequestError), ("mock/404", openai.NotFoundError)):
        options: Any = {"model": model, "messages": HI, "stream": stream}
        error = refused(sdk, kind, "chat.completions.create", **options)
        theirs = refused(direct, kind, "chat.completions.create", **options)
        assert error.response.content == theirs.response.content
    long = refused(sdk, openai.BadRequestError, "chat.completions.create", model="window-1", messages=HI, stream=stream)
    assert long.code == "context_length_exceeded"


def test_invalid_requests(sdk: Sdk) -> None:
    chat = "chat.completions.create"
    for options, param in (
        ({"model": "", "messages": HI}, "model"),
        ({"model": "any", "messages": "hi"}, "messages"),
        ({"model": "any", "messages": HI, "max_tokens": -1}, "max_tokens"),
        ({"model": "any", "messages": HI, "n": 1000}, "n"),
    ):
        error = refused(sdk, openai.BadRequestError, chat, **options)
        assert (error.code, error.type, error.param) == ("invalid_request", "invalid_request_error", param)


def test_keys(sdk: Sdk, keyed: ServeProcess) -> None:
    no_bearer: dict[str, Any] = {"Authorization": Omit()}
    good = [{}, {**no_bearer, "api-key": TENANT_KEY}, {**no_bearer, "x-api-key": TENANT_KEY}]
    chat: dict[str, Any] = {"model": "any", "messages": HI}
    bad = [
        {"Authorization": f"Bearer {TENANT_KEY}x"},
        {"Authorization": f"Bearer {TENANT_KEY[:-1]}"},
        {"Authorization": f"Basic {TENANT_KEY}"},
        {"x-api-key": OTHER_KEY},  # beside the good one
        {**no_bearer, "api-key": TENANT_KEY.upper()},
        no_bearer,
    ]
    bodies = set()
    one = sdk.altered(base_url=f"{keyed.url}/v1", api_key=TENANT_KEY)
    for headers in good:
        assert one.call("chat.completions.create", **chat, extra_headers=headers).choices
    for headers in bad:
        error = refused(one, openai.AuthenticationError, "chat.completions.create", **chat, extra_headers=headers)
        assert (error.status_code, error.code, error.type) == (401, "invalid_api_key", "invalid_request_error")
        bodies.add(error.response.content)
    assert len(bodies) == 1


def test_what_a_tenant_may_not_use_does_not_exist(sdk: Sdk, keyed: ServeProcess) -> None:
    narrow = sdk.altered(base_url=f"{keyed.url}/v1", api_key=OTHER_KEY)
    assert narrow.call("chat.completions.create", model="gpt-4o-mini", messages=HI).choices
    error = refused(narrow, openai.NotFoundError, "chat.completions.create", model="any", messages=HI)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert refused(narrow, openai.NotFoundError, "moderations.create", input="x").code == "unsupported_route"
    acme = narrow.altered(api_key=TENANT_KEY)
    assert acme.call("moderations.create", model="any", input="x").results
    made = acme.call("responses.create", model="gpt-4o-mini", input="hi")
    assert acme.call("responses.create", model="any", input="and?", previous_response_id=made.id).output_text
    assert acme.call("responses.retrieve", made.id).output_text == made.output_text
    for options in ({"previous_response_id": made.id}, {"conversation": "conv_1"}):
        error = refused(narrow, openai.NotFoundError, "responses.create", model="gpt-4o-mini", input="hi", **options)
        assert (error.code, error.param) == ("unsupported_route", next(iter(options)))
    error = refused(narrow, openai.NotFoundError, "responses.retrieve", response_id=made.id)
    assert error.code == "unsupported_route"
    acme.call("responses.delete", made.id)


def test_unknown_paths_and_methods(sdk: Sdk, proxy: ServeProcess) -> None:
    assert refused(sdk, openai.NotFoundError, "get", path="/nothing/here", cast_to=object).code == "unknown_url"
    bare = sdk.altered(base_url=proxy.url)
    assert refused(bare, openai.NotFoundError, "get", path="/nothing", cast_to=object).code == "unknown_url"
    wrong = refused(sdk, openai.APIStatusError, "get", path="/chat/completions", cast_to=object)
    assert (wrong.status_code, wrong.code) == (405, "method_not_allowed")
    assert wrong.response.headers["allow"] == "POST"


def test_a_body_that_is_too_large(sdk: Sdk) -> None:
    messages = [{"role": "user", "content": "x" * MOST_BYTES}]
    error = refused(sdk, openai.APIStatusError, "chat.completions.create", model="any", messages=messages)
    assert (error.status_code, error.code) == (413, "request_too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_a_rate_limit_passes_with_its_wait(sdk: Sdk, stream: bool) -> None:
    options: Any = {"model": "mock/429", "messages": HI, "stream": stream}
    error = refused(sdk, openai.RateLimitError, "chat.completions.create", **options)
    assert (error.code, error.type) == ("upstream_rate_limited", "upstream_error")
    assert error.response.headers["retry-after"] == "1"
    assert "x-should-retry" not in error.response.headers  # to wait and try again is right


ALWAYS_REFUSED = ["mock/500", "mock/503", "mock/529", "mock/401", "mock/403", "mock/error-event"]


@pytest.mark.parametrize(
    ("model", "stream"),
    [(model, stream) for model in ALWAYS_REFUSED for stream in (False, True)]
    + [("mock/cut", False), ("mock/early-close", False), ("mock/garbage", False)],
)
def test_what_failed_for_good_is_tried_once(sdk: Sdk, mock: MockProcess, model: str, stream: bool) -> None:
    before = mock.served
    options: Any = {"model": model, "messages": HI, "stream": stream}
    error = refused(sdk.altered(max_retries=3), openai.InternalServerError, "chat.completions.create", **options)
    assert (error.status_code, error.code, error.type) == (503, "upstream_unavailable", "upstream_error")
    assert error.response.headers["x-should-retry"] == "false"
    (attempt,) = error.body["breakwater"]["attempts"]  # type: ignore[index]  # it is a dict: see `refused`
    assert attempt["target"] == f"up/{model}"
    assert len(mock.ledger(before, model)) == 1


def test_a_provider_that_never_answers(sdk: Sdk, mock: MockProcess) -> None:
    before = mock.served
    options: Any = {"model": "quick/mock/stall", "messages": HI}
    error = refused(sdk.altered(max_retries=3), openai.InternalServerError, "chat.completions.create", **options)
    assert (error.status_code, error.code) == (504, "upstream_timeout")
    assert error.response.headers["x-should-retry"] == "false"
    assert len(mock.ledger(before, "mock/stall")) == 1


# --- errors in a stream ---------------------------------------------------------------------------------------------

BROKEN = ["mock/cut", "mock/early-close", "mock/no-done", "mock/garbage", "mock/error-event", "mock/error-late"]


@pytest.mark.parametrize("model", [*BROKEN, "quick/mock/stall", "inner/cut", "inner/no-done", "inner/error-late"])
@pytest.mark.parametrize("asked", [{}, {"stream_options": USAGE}], ids=["plain", "usage"])
def test_a_broken_stream_is_raised(sdk: Sdk, model: str, asked: dict[str, Any]) -> None:
    for method, prompt in (("chat.completions.create", {"messages": HI}), ("completions.create", {"prompt": "x"})):
        with pytest.raises(openai.APIError) as raised:
            sdk.call(method, model=model, stream=True, **prompt, **asked)
        if model == "mock/error-event":  # nothing was forwarded yet: a status tells it
            assert isinstance(raised.value, openai.InternalServerError)
        elif model == "quick/mock/stall" and method == "chat.completions.create":  # a role, and then nothing
            assert isinstance(raised.value, openai.InternalServerError)
            assert raised.value.code == "upstream_timeout"
        elif "error-late" in model:
            assert (raised.value.code, raised.value.type) == ("mock_error", "server_error")
        else:
            assert (raised.value.code, raised.value.type) == ("stream_interrupted", "upstream_error")


@pytest.mark.parametrize(
    "model", ["mock/cut", "mock/early-close", "mock/no-done", "mock/error-event", "quick/mock/stall"]
)
def test_a_broken_response_is_raised(sdk: Sdk, model: str) -> None:
    with pytest.raises(openai.APIError) as raised:
        sdk.call("responses.create", model=model, input="hi", stream=True)
    before_the_first = {"mock/error-event": "upstream_unavailable", "quick/mock/stall": "upstream_timeout"}
    assert raised.value.code == before_the_first.get(model, "stream_interrupted")


def test_a_response_s_own_error_event_is_the_last_event(sdk: Sdk) -> None:
    events = sdk.call("responses.create", model="mock/error-late", input="hi", stream=True)
    assert events[-1].type == "error"  # this API's errors are events: the client hands them over
    assert events[-1].code == "mock_error"
    assert not any(event.type == "response.completed" for event in events)


# --- providers with manners of their own ----------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"stream_options": USAGE}], ids=["plain", "usage"])
def test_a_json_answer_to_a_wish_for_a_stream_becomes_one(sdk: Sdk, asked: dict[str, Any]) -> None:
    answer = sdk.call("chat.completions.create", model="mock/plain", messages=HI)
    chunks = sdk.call("chat.completions.create", model="mock/plain", messages=HI, stream=True, **asked)
    assert text_of(chunks) == answer.choices[0].message.content
    assert chunks[0].object == "chat.completion.chunk"
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([answer.usage] if asked else [])
    calls = sdk.call("chat.completions.create", model="mock/plain", messages=HI, tools=[TOOL], stream=True, **asked)
    (call,) = calls[0].choices[0].delta.tool_calls
    assert call.index == 0
    assert isinstance(json.loads(call.function.arguments)["q"], str)
    made = sdk.call("responses.create", model="mock/plain", input="hi")
    events = sdk.call("responses.create", model="mock/plain", input="hi", stream=True)
    assert [event.type for event in events] == ["response.created", "response.completed"]
    assert events[-1].response.output == made.output


def test_a_provider_that_refuses_the_wish_for_usage_is_remembered(sdk: Sdk, mock: MockProcess) -> None:
    model = "mock/refuses-usage" if sdk.kind == "sync" else "refuses-usage"  # remembered by name: one for each form
    options: Any = {"model": model, "messages": HI, "stream": True}
    before = mock.served
    for _ in range(3):
        assert text_of(sdk.call("chat.completions.create", **options))
    assert [entry["status"] for entry in mock.ledger(before)] == [400, 200, 200, 200]
    # What the client itself asks for is the client's own affair.
    error = refused(sdk, openai.BadRequestError, "chat.completions.create", **options, stream_options=USAGE)
    assert error.param == "stream_options"
