"""`config.example.yaml` as it is, against `breakwater mock` where it says: through the proxy come the mock's own lines.

Only the proxy's port is a free one. The mock's is written in the file: the tests skip where something else has it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.clear import CLEAR
from tests.e2e.stack import ServeProcess, serving
from tests.e2e.upstreams import PATIENCE, MockProcess, PortTaken, mock_process

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"
MOCK_PORT = 8089
CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Grüße an alle ✓"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"q": {}}}}}]


@pytest.fixture(scope="module")
def mock() -> Iterator[MockProcess]:
    """Another run of these tests soon gives the port back; another program may keep it."""
    deadline = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                one = stack.enter_context(mock_process(MOCK_PORT))
            except PortTaken:
                if time.monotonic() > deadline:
                    pytest.skip(f"127.0.0.1:{MOCK_PORT}, which the example names, is taken by another program")
                time.sleep(0.1)
            else:
                break
        yield one


@pytest.fixture(scope="module")
def proxy(mock: MockProcess) -> Iterator[ServeProcess]:
    """With no variable set that the file mentions."""
    set_here = [name for name in os.environ if name.startswith("BREAKWATER_") or name == "OPENAI_API_KEY"]
    with pytest.MonkeyPatch.context() as patch:
        for name in set_here:
            patch.delenv(name)
        with serving(EXAMPLE) as process:
            yield process


def post(base: str, body: dict[str, Any], path: str = "chat/completions") -> httpx2.Response:
    answer = httpx2.post(f"{base}/{path}", json=body, timeout=30, verify=CLEAR)
    assert answer.status_code == 200, answer.text
    return answer


def data_lines(answer: httpx2.Response) -> list[bytes]:
    """The lines of a stream without its comments."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [line for line in answer.content.split(b"\n") if not line.startswith(b":")]


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"n": 2, "max_tokens": 7}], ids=["text", "tools", "choices"])
def test_a_plain_chat(mock: MockProcess, proxy: ServeProcess, more: dict[str, Any]) -> None:
    ask = {**CHAT, **more}
    assert post(f"{proxy.url}/v1", ask).content == post(mock.url, ask).content


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"n": 2, "max_tokens": 7}], ids=["text", "tools", "choices"])
@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["without", "with-usage"])
def test_a_streamed_chat(mock: MockProcess, proxy: ServeProcess, more: dict[str, Any], usage: dict[str, Any]) -> None:
    ask = {**CHAT, **more, **usage, "stream": True}
    through, direct = data_lines(post(f"{proxy.url}/v1", ask)), data_lines(post(mock.url, ask))
    assert through == direct
    assert through[-3] == b"data: [DONE]"
    assert (b'"usage"' in b"".join(through)) == bool(usage)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"model": "any", "prompt": "Once"}),
        ("responses", {"model": "any", "input": "hi"}),
        ("embeddings", {"model": "any", "input": "hi", "encoding_format": "base64"}),
        ("moderations", {"model": "any", "input": "hi"}),
    ],
)
def test_the_other_routes(mock: MockProcess, proxy: ServeProcess, path: str, body: dict[str, Any]) -> None:
    assert post(f"{proxy.url}/v1", body, path).content == post(mock.url, body, path).content
    if path in ("completions", "responses"):
        streamed = {**body, "stream": True}
        assert data_lines(post(f"{proxy.url}/v1", streamed, path)) == data_lines(post(mock.url, streamed, path))


def test_the_file_says_where_and_what(mock: MockProcess, proxy: ServeProcess) -> None:
    assert f"127.0.0.1:{MOCK_PORT}" in EXAMPLE.read_text()
    listed = httpx2.get(f"{proxy.url}/v1/models", timeout=30, verify=CLEAR).json()["data"]
    assert listed == httpx2.get(f"{mock.url}/models", timeout=30, verify=CLEAR).json()["data"]
    assert [line["event"] for line in proxy.lines() if line["event"] != "request.finished"] == ["server.started"]
