"""The bytes that go over the wire: what the load sends, what the upstream answers, what must come back.

All of it is deterministic, so every side can compute for itself what a right answer is. The model's name chooses the
shape of the reply:

    bench         plain: 1 KB with usage; stream: 100 chunks, one every few milliseconds
    bench-short   stream: 2 chunks, paced the same way (what is left is the cost of a stream as such)
    bench-burst   stream: 100 chunks in one write
    no-usage      as `bench`, but the reply never says what it cost
    long-400      as `bench`, for conversations whose window is known and near: their tokens are counted
    long-4000     the same, ten times as long
    long-cut      the same with a window that is too small: the conversation is cut
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

PLAIN_REQUEST_BYTES: Final = 1536
PLAIN_REPLY_BYTES: Final = 1024
CHUNKS: Final = 100
SHORT_CHUNKS: Final = 2
DONE: Final = b"data: [DONE]\n\n"
MESSAGE_BYTES: Final = 480
LONG_MESSAGE_BYTES: Final = 768
"""Of each message of a long conversation, JSON and comma included: 400 of them are 300 KB."""
LONG: Final[dict[str, int]] = {"long-400": 400, "long-4000": 4000, "long-cut": 400}
"""Messages by model."""
LONG_WINDOWS: Final[dict[str, int]] = {"long-400": 128_000, "long-4000": 1_280_000, "long-cut": 48_000}
"""Fewer tokens than a conversation has bytes, so that no bound spares the count; and more than it has tokens, but for
the last one."""
USAGE: Final[dict[str, Any]] = {
    "prompt_tokens": 310,
    "completion_tokens": 98,
    "total_tokens": 408,
    "prompt_tokens_details": {"cached_tokens": 128, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}

_WORDS: Final = (
    "the agent reads a file, compares what it found with the plan and calls the next tool; then it writes down "
    "which of the open questions are settled, which remain, and what it would need in order to answer them. "
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request. `size` is the body's length in bytes (at least 1 KB)."""

    model: str = "bench"
    size: int = PLAIN_REQUEST_BYTES
    stream: bool = False
    usage: bool = False
    """A stream that asks for its usage chunk itself."""
    messages: int = 0
    """A conversation of so many messages, all but the last the same in every variant. 0: as many as it takes."""


def request_body(ask: Ask, variant: int = 0) -> bytes:
    """A chat request of exactly `ask.size` bytes: a conversation in messages of about 480 bytes.

    Different variants differ in their last message, as the turns of a conversation do.
    """
    if ask.messages:
        return _long_body(ask, variant)
    body: dict[str, Any] = {"model": ask.model, "messages": [{"role": "system", "content": "You are a careful agent."}]}
    if ask.stream:
        body["stream"] = True
        if ask.usage:
            body["stream_options"] = {"include_usage": True}
    body["temperature"] = 0.2
    last = {"role": "user", "content": f"turn {variant:06d}: "}
    messages = body["messages"]
    fixed = len(_compact({**body, "messages": [*messages, last]}))
    while ask.size - fixed > 2 * MESSAGE_BYTES:
        role = "user" if len(messages) % 2 else "assistant"
        message = {"role": role, "content": _text(MESSAGE_BYTES, len(messages))}
        messages.append(message)
        fixed += len(_compact(message)) + 1
    last["content"] += _text(ask.size - fixed, variant)
    messages.append(last)
    encoded = _compact(body)
    if len(encoded) != ask.size:
        raise ValueError(f"a request of {ask.size} bytes cannot be made: {len(encoded)}")
    return encoded


def long_ask(model: str) -> Ask:
    messages = LONG[model]
    return Ask(model, size=messages * LONG_MESSAGE_BYTES, messages=messages)


def _long_body(ask: Ask, variant: int) -> bytes:
    beginning = _long_beginning(ask)
    last = {"role": "user", "content": f"turn {variant:06d}: "}
    end = _compact(last)[:-2]
    filled = end + _text(ask.size - len(beginning) - len(end) - len(b'"}]}'), variant).encode() + b'"}]}'
    encoded = beginning + filled
    if len(encoded) != ask.size:
        raise ValueError(f"a conversation of {ask.size} bytes cannot be made: {len(encoded)}")
    return encoded


@lru_cache(maxsize=4)
def _long_beginning(ask: Ask) -> bytes:
    """The body up to its last message."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": _text(LONG_MESSAGE_BYTES - 100, 0)}]
    while len(messages) < ask.messages - 1:
        message = {"role": "user" if len(messages) % 2 else "assistant", "content": ""}
        message["content"] = _text(LONG_MESSAGE_BYTES - len(_compact(message)) - 1, len(messages))
        messages.append(message)
    body: dict[str, Any] = {"model": ask.model, "temperature": 0.2, "messages": messages}
    return _compact(body)[:-2] + b","


def plain_reply(model: str) -> bytes:
    """The JSON body of a plain reply, exactly 1 KB (less without usage)."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None, "annotations": []}
    reply: dict[str, Any] = {
        "id": "chatcmpl-B3nCh0000000000000000000000",
        "object": "chat.completion",
        "created": 1790000000,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "service_tier": "default",
        "system_fingerprint": "fp_b3nc400000",
    }
    message["content"] = _text(PLAIN_REPLY_BYTES - len(_compact(reply)), 0)
    if model == "no-usage":
        del reply["usage"]
    return _compact(reply)


def stream_events(model: str, usage: bool) -> list[bytes]:
    """The SSE events of a streamed reply in order, `[DONE]` not included.

    Where usage was asked for, every chunk says `"usage":null` and one more chunk at the end tells it.
    """
    count = SHORT_CHUNKS if model == "bench-short" else CHUNKS
    told = usage and model != "no-usage"
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None}]
    deltas += [{"content": f" token{index:03d}"} for index in range(count - 2)]
    choices: list[list[dict[str, Any]]] = [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}] for delta in deltas
    ]
    choices.append([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}])
    events = [_chunk(model, choice, {"usage": None} if told else {}) for choice in choices]
    if told:
        events.append(_chunk(model, [], {"usage": USAGE}))
    return events


def stream_body(model: str, usage: bool) -> bytes:
    """The whole body of a stream as a client must get it."""
    return b"".join(stream_events(model, usage)) + DONE


def expected_body(ask: Ask) -> bytes:
    """What a right answer to `ask` is, byte for byte."""
    return stream_body(ask.model, ask.usage) if ask.stream else plain_reply(ask.model)


def chunk_count(ask: Ask) -> int:
    """How many chunks the answer to `ask` has, for the cost per chunk. The usage chunk and `[DONE]` do not count."""
    if not ask.stream:
        return 0
    return SHORT_CHUNKS if ask.model == "bench-short" else CHUNKS


def _chunk(model: str, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
    head: dict[str, Any] = {
        "id": "chatcmpl-B3nCh0000000000000000000000",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_b3nc400000",
        "choices": choices,
    }
    return b"data: " + _compact({**head, **extra}) + b"\n\n"


def _text(length: int, seed: int) -> str:
    start = (seed * 7) % len(_WORDS)
    words = _WORDS[start:] + _WORDS * (length // len(_WORDS) + 1)
    return words[: max(length, 0)]


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
