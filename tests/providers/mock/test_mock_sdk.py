"""The official client against `breakwater mock` as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from proxy.providers.mock.counting import real_counts
from tests import clear

COUNT = real_counts()
HI: list[Any] = [{"role": "user", "content": "What holds the harbor?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    },
}


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "mock", "--port", "0", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    return process, line.split()[2] if line.startswith("breakwater mock: http") else line


def stop(process: subprocess.Popen[str], by: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    with process:
        process.send_signal(by)
        try:
            code = process.wait(20)
        finally:
            process.kill()
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == ""
        return code, process.stderr.read()


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    process, url = start("--seed", "3")
    try:
        yield url
    finally:
        assert stop(process) == (0, "")


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="sk-test", max_retries=0, timeout=20, http_client=clear.client()) as one:
        yield one


def test_chat_plain_and_streamed(client: OpenAI) -> None:
    plain = client.chat.completions.create(model="any", messages=HI)
    assert plain.usage is not None
    assert plain.usage.completion_tokens == COUNT(plain.choices[0].message.content or "")
    chunks = list(
        client.chat.completions.create(model="any", messages=HI, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage


def test_the_client_accumulates_streamed_tool_calls(client: OpenAI) -> None:
    with client.chat.completions.stream(model="any", messages=HI, tools=[TOOL]) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    arguments = json.loads(message.tool_calls[0].function.arguments)
    assert isinstance(arguments["q"], str)
    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [call.to_dict() for call in message.tool_calls]},
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "stone"},
    ]
    after = client.chat.completions.create(model="any", messages=messages, tools=[TOOL])
    assert after.choices[0].finish_reason == "stop"


def test_embeddings_are_the_same_by_either_encoding(client: OpenAI) -> None:
    packed = client.embeddings.create(model="any", input=["a", "b"])  # the client asks for base64 by itself
    floats = client.embeddings.create(model="any", input=["a", "b"], encoding_format="float")
    assert len(packed.data[1].embedding) == 1536
    assert packed.data[1].embedding == pytest.approx(floats.data[1].embedding)


def test_completions_moderations_models_files_speech(client: OpenAI) -> None:
    assert client.completions.create(model="any", prompt="x").choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(model="any", prompt="x", stream=True))
    assert client.moderations.create(model="any", input="x").results[0].flagged is False
    assert {"echo", "cut"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("meta/llama:free").id == "meta/llama:free"
    assert client.files.create(file=("a.jsonl", b"{}\n" * 1000), purpose="batch").bytes == 3000
    assert len(client.files.content("file-1").content) == 4096
    assert len(client.audio.speech.create(model="any", voice="alloy", input="x y z").content) == 3 * 4096


def test_responses(client: OpenAI) -> None:
    made = client.responses.create(model="any", input="hi")
    assert made.output_text
    assert client.responses.retrieve(made.id).output_text == made.output_text
    with client.responses.stream(model="any", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == made.output_text
    assert final.usage == made.usage
    assert kinds[-1] == "response.completed"
    flat: Any = {"type": "function", "strict": False, **TOOL["function"]}
    with client.responses.stream(model="any", input="hi", tools=[flat]) as stream:
        call: Any = stream.get_final_response().output[0]
    assert isinstance(json.loads(call.arguments)["q"], str)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("mock/400", openai.BadRequestError),
        ("mock/401", openai.AuthenticationError),
        ("mock/403", openai.PermissionDeniedError),
        ("mock/404", openai.NotFoundError),
        ("mock/429", openai.RateLimitError),
        ("mock/500", openai.InternalServerError),
        ("mock/503", openai.InternalServerError),
        ("mock/cut", openai.APIConnectionError),
        ("mock/early-close", openai.APIConnectionError),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_faults_are_the_errors_that_the_client_knows(
    client: OpenAI, model: str, error: type[Exception], streamed: bool
) -> None:
    def call() -> None:
        for _ in client.chat.completions.create(model=model, messages=HI, stream=streamed):
            pass

    with pytest.raises(error):
        call()


def test_an_error_event_is_raised(client: OpenAI) -> None:
    for model in ("mock/error-event", "mock/error-late"):
        with pytest.raises(openai.APIError) as raised:
            list(client.chat.completions.create(model=model, messages=HI, stream=True))
        assert raised.value.code == "mock_error"


def test_a_stall_is_a_timeout(client: OpenAI) -> None:
    quick = client.with_options(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        quick.chat.completions.create(model="mock/stall", messages=HI)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_plays_a_script_and_ends_on_an_interrupt(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("- {status: 418, json: {error: {message: teapot}}}\n")
    process, url = start("--script", str(script))
    with OpenAI(base_url=url, api_key="sk-test", max_retries=0, http_client=clear.client()) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model="any", messages=HI)
        assert raised.value.status_code == 418
        assert client.chat.completions.create(model="any", messages=HI).choices
        stalled = client.chat.completions.create(model="stall", messages=HI, stream=True)
        next(stalled)
        assert stop(process, signal.SIGINT) == (0, "")  # also with a stream under way


def test_the_command_keeps_a_prompt_cache_if_asked_to() -> None:
    process, url = start("--prompt-cache")
    long: list[Any] = [{"role": "user", "content": "The tide turns. " * 600}]
    with OpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
        told = [client.chat.completions.create(model="any", messages=long).usage for _ in range(2)]
    assert stop(process) == (0, "")
    cached = [usage.prompt_tokens_details.cached_tokens for usage in told if usage and usage.prompt_tokens_details]
    assert cached[0] == 0
    assert cached[1] == told[1].prompt_tokens // 128 * 128


def failed(*options: str) -> list[str]:
    """What the command says before it exits with 1."""
    process, first = start(*options)
    with process:
        try:
            assert process.wait(20) == 1
        finally:
            process.kill()
        assert process.stderr is not None
        return (first + process.stderr.read()).splitlines()


def test_the_command_tells_what_is_wrong(tmp_path: Path, base_url: str) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("- {status: 200}\n- {stat: 1, times: 0}\n")
    key, times = failed("--script", str(script))
    assert key.startswith(f"{script}:2:4: steps[1].stat: is not a key")
    assert times == f"{script}:2:20: steps[1].times: must be a whole number from 1, or 'always'"
    port = base_url.split(":")[2].split("/")[0]
    assert failed("--port", port) == [f"breakwater mock: cannot listen on http://127.0.0.1:{port}"]
