"""Event streams as providers send them, and a reader of event streams that owes nothing to the program's own."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.e2e.scene import CHAT


@dataclass(frozen=True)
class Recorded:
    """One stream. It was answered to a request without `stream_options`, into which we put our own wish for usage."""

    raw: bytes
    path: str = CHAT
    hidden: bytes | None = None
    """The data of the event that came for our wish alone."""
    cut: bytes = b""
    """What else is there for our wish alone, inside of the other events."""
    untouched: bool = False
    """What the client gets is the same byte for byte, not only line for line."""

    @property
    def seen(self) -> list[tuple[bytes, bytes]]:
        """The events that the client must get, up to the terminator."""
        return [(name, data.replace(self.cut, b"")) for name, data in self.whole if data != self.hidden]

    @property
    def whole(self) -> list[tuple[bytes, bytes]]:
        """The provider's own events, up to the terminator."""
        found = read_events(self.raw)
        last = next(number for number, event in enumerate(found) if ends(event))
        return found[: last + 1]


def read_events(raw: bytes) -> list[tuple[bytes, bytes]]:
    """(event, data) of each event, by the algorithm of WHATWG HTML 9.2.6, but for the incomplete event at the end: the
    official clients do not drop it, so it counts."""
    lines = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    found: list[tuple[bytes, bytes]] = []
    name, data = b"", b""
    for line in [*lines, b""]:
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if not line:
            if data:
                found.append((name, data[:-1]))
            name, data = b"", b""
        elif field == b"event":
            name = value
        elif field == b"data":
            data += value + b"\n"
    return found


def ends(event: tuple[bytes, bytes]) -> bool:
    """It is a terminator."""
    data = event[1]
    if data.startswith(b"[DONE]"):
        return True
    try:
        return json.loads(data)["type"] in ("response.completed", "response.incomplete", "response.failed")
    except (ValueError, KeyError, TypeError):
        return False


def said(content: str, more: str = "") -> str:
    return f'{{"id":"c","choices":[{{"index":0,"delta":{{"content":"{content}"}},"finish_reason":null}}]{more}}}'


USAGE = '"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}'
STOP = '{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]%s}'
DONE = "[DONE]"


def stream(*datas: str, start: str = "data: ", end: str = "\n\n") -> bytes:
    return "".join(start + data + end for data in datas).encode()


USAGE_CHUNK = '{"id":"c","choices":[],' + USAGE + "}"
SPACED_USAGE = '"usage": {"prompt_tokens": 9, "total_tokens": %d, "completion_tokens": %d}'
NULL = ',"usage":null'
AZURE_FIRST = '{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0}]}'
CALL = '{"id":"c","choices":[{"index":0,"delta":{"tool_calls":[%s]},"finish_reason":null}]}'

STREAMS = {
    "openai": Recorded(
        stream(said("Grüß", NULL), said("e, 世界 ✓", NULL), STOP % NULL, USAGE_CHUNK, DONE),
        hidden=USAGE_CHUNK.encode(),
        cut=NULL.encode(),
    ),
    "openai, without usage": Recorded(stream(said("Hel"), said("lo"), STOP % "", DONE), untouched=True),
    "vllm": Recorded(
        stream(
            '{"id": "c", "choices": [{"index": 0, "delta": {"content": "Hi"}}], ' + SPACED_USAGE % (10, 1) + "}",
            '{"id": "c", "usage": null, "choices": [{"index": 0, "delta": {"content": "!"}}]}',
            '{"id": "c", "choices": [], ' + SPACED_USAGE % (11, 2) + "}",
            DONE,
        ),
        hidden=('{"id": "c", "choices": [], ' + SPACED_USAGE % (11, 2) + "}").encode(),
        cut=b', "usage": null',
    ),
    "azure": Recorded(
        stream(AZURE_FIRST, said("Hi", NULL), STOP % NULL, USAGE_CHUNK, DONE),
        hidden=USAGE_CHUNK.encode(),
        cut=NULL.encode(),
    ),
    "openrouter": Recorded(
        b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"
        + stream(said("Hi"))
        + b": OPENROUTER PROCESSING\n\n: and\n"
        + stream(said("!"), STOP % ("," + USAGE), DONE)
    ),
    "ollama": Recorded(
        stream(
            '{"id":"chatcmpl-1","created":1,"model":"llama3","system_fingerprint":"fp_ollama","choices":[{"index":0,'
            '"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}]}',
            '{"id":"chatcmpl-1","created":1,"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}',
            DONE,
        ),
        hidden=b'{"id":"chatcmpl-1","created":1,"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}',
    ),
    "tool calls": Recorded(
        stream(
            CALL % '{"index":0,"id":"call_1","type":"function","function":{"name":"f","arguments":""}}',
            CALL % r'{"index":0,"function":{"arguments":"{\"a\":1,\"usage\":null,\"b\":\"\\n"}}',
            CALL % r'{"index":0,"function":{"arguments":"\u00e9\"}"}}',
            STOP % "",
            DONE,
        ),
        untouched=True,
    ),
    "usage everywhere": Recorded(
        stream('{"usage":null,"meta":{"a":1,"usage":null},"choices":[{"delta":{"usage":null}}]}', DONE),
        cut=b'"usage":null,',  # the nested ones are none of ours, and stay
    ),
    "finish chunk with usage": Recorded(stream(said("Hi"), STOP % ("," + USAGE), DONE), untouched=True),
    "legacy completions": Recorded(
        stream('{"id":"c","choices":[{"text":"Hi","index":0}]}', USAGE_CHUNK, DONE),
        path="/v1/completions",
        hidden=USAGE_CHUNK.encode(),
    ),
    "responses": Recorded(
        b"".join(
            b"event: %b\ndata: %b\n\n" % (name, data)
            for name, data in (
                (b"response.created", b'{"type":"response.created","sequence_number":0,"response":{"usage":null}}'),
                (b"response.output_text.delta", '{"type":"response.output_text.delta","delta":"Grüße"}'.encode()),
                (
                    b"response.completed",
                    b'{"type":"response.completed","response":{"usage":{"input_tokens":9,"output_tokens":2}}}',
                ),
            )
        ),
        path="/v1/responses",
        untouched=True,
    ),
    "crlf": Recorded(stream(said("Hi"), said("!"), DONE, end="\r\n\r\n"), untouched=True),
    "crlf with usage": Recorded(
        stream(said("Hi", NULL), USAGE_CHUNK, DONE, end="\r\n\r\n"), hidden=USAGE_CHUNK.encode(), cut=NULL.encode()
    ),
    "lone cr": Recorded(stream(said("Hi"), said("!"), DONE, end="\r\r"), untouched=True),
    "all line ends": Recorded(
        stream(said("Hi"), end="\n\r\n")
        + stream(said("!"), end="\r\n\n")
        + stream(said("?"), end="\r\n\r")
        + stream(DONE),
    ),
    "byte order mark": Recorded(b"\xef\xbb\xbf" + stream(said("Hi"), DONE)),
    "data in two lines": Recorded(b'data: {"choices":\ndata: [{"index":0}]}\n\n' + stream(DONE), untouched=True),
    "no space": Recorded(stream(said("Hi"), DONE, start="data:"), untouched=True),
    "id, retry and unknown fields": Recorded(
        b"retry: 3000\n\n: hm\nid: 1\nevent: message\n"
        + stream(said("Hi"))
        + b"id: 2\nfoo: bar\ndata\n"
        + stream(said("!"))
        + stream(DONE)
    ),
    "no blank line at the end": Recorded(stream(said("Hi")) + b"data: [DONE]\n"),
    "no line end at all": Recorded(stream(said("Hi")) + b"data: [DONE]"),
    "something after the end": Recorded(stream(said("Hi"), DONE, said("late"), DONE)),
}
