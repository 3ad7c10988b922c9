"""What a reply has produced so far, for when its provider never says.

Most streams end with a usage object and nobody asks the meter: so `see` only keeps a reference. Not until 64 KiB are
held are they read, and all but the generated text is dropped. The text is kept per channel (a choice's content, its
reasoning, each tool call), because a provider counts a channel's text, not the pieces it was sent in.

Memory is bounded by 64 KiB plus the largest piece plus `TEXT_CHARS` characters. The text beyond those, about 60,000
tokens, is only measured: it counts at the ratio of tokens to characters of the text before.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from proxy.tokens.count import Counter

HELD_BYTES: Final = 65_536
TEXT_CHARS: Final = 262_144
PLAIN_BYTES: Final = 8_388_608
"""Of a plain body that comes in several pieces, as much is kept. A longer one counts as a token per four bytes."""

CHANNELS: Final = 1024
"""Whatever would open one more goes into one channel for all."""


class _Call(msgspec.Struct):
    """`function`, `custom` or `function_call` of a tool call. Leaves are of any type, so that odd ones harm nobody."""

    name: Any = None
    arguments: Any = None
    input: Any = None


class _ToolCall(msgspec.Struct):
    index: Any = None
    function: _Call | None = None
    custom: _Call | None = None


class _Message(msgspec.Struct):
    """`delta` of a chunk or `message` of a plain reply."""

    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Call | None = None


class _Choice(msgspec.Struct):
    index: Any = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: Any = None


class _Chunk(msgspec.Struct):
    """One JSON text of either API, streamed or not."""

    choices: list[_Choice] | None = None
    type: Any = None
    delta: Any = None
    item: Any = None
    output: list[dict[str, Any]] | None = None
    output_index: Any = 0


_OVERFLOW: Final = ("", 0, 0)
_decode = msgspec.json.Decoder(_Chunk).decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Meter:
    """Of one reply: fed by `see` as it is forwarded, asked by `output_tokens` at the end. One task at a time."""

    __slots__ = ("_beyond", "_channels", "_chars", "_held", "_plain", "_rough", "_size")

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._size = 0
        self._plain: bool | None = None
        """The body is one JSON text, not an event stream: known from its first byte that is not blank."""
        self._channels: dict[tuple[str, int, int], list[str]] = {}
        self._chars = 0
        self._beyond = 0
        """Characters that were measured but not kept."""
        self._rough = 0
        """Tokens that were guessed from bytes."""

    def see(self, data: bytes) -> None:
        """Takes note of a piece that was forwarded: complete SSE events, or (a part of) a plain JSON body."""
        self._held.append(data)
        self._size += len(data)
        if self._size > HELD_BYTES:
            self._fold(end=False)

    async def output_tokens(self, counter: Counter, encoding: str) -> int:
        """Tokens of the text generated so far; more pieces may follow. Raises what `Counter` raises.

        Content, refusals, reasoning that was shown, names and arguments of tool calls. What was never sent (hidden
        reasoning, audio) is not in it.
        """
        self._fold(end=True)
        tokens = await counter.count_texts(["".join(pieces) for pieces in self._channels.values()], encoding)
        if self._beyond:
            tokens += -(-self._beyond * tokens // self._chars)
        return tokens + self._rough

    def _fold(self, *, end: bool) -> None:
        if self._plain is None:
            self._plain = _is_json(self._held)
        if self._plain:
            self._fold_plain(end)
            return
        # A piece of a stream holds whole events: so does any row of them.
        data = b"".join(self._held)
        self._held.clear()
        self._size = 0
        for text in _event_data(data):
            self._read(text)
        for pieces in self._channels.values():
            if len(pieces) > 1:  # fifty bytes of overhead for each word
                pieces[:] = ["".join(pieces)]

    def _fold_plain(self, end: bool) -> None:
        """A plain body can only be read as a whole; usually it is one piece, and the reference costs nothing."""
        if self._rough or (len(self._held) > 1 and self._size > PLAIN_BYTES):
            self._rough += self._size // 4
        elif not end or not self._size:
            return
        else:
            body = b"".join(self._held)
            if not self._read(body):
                self._held = [body]  # not complete yet, or no reply at all
                return
        self._held.clear()
        self._size = 0

    def _read(self, text: bytes) -> bool:
        """Keeps the generated text of one JSON text. False if it is not JSON of a known shape."""
        try:
            chunk = _decode(text)
        except _NOT_JSON:
            return False
        if chunk.choices is not None:
            for choice in chunk.choices:
                self._choice(choice)
        elif chunk.delta is not None:
            self._delta_event(chunk)
        elif chunk.type == "response.output_item.added" and isinstance(chunk.item, dict):
            self._keep("name", _index(chunk.output_index), 0, chunk.item.get("name"))
        elif chunk.output is not None:
            for number, item in enumerate(chunk.output):
                self._item(_index(number), item)
        return True

    def _choice(self, choice: _Choice) -> None:
        index = _index(choice.index)
        if choice.text:
            self._keep("text", index, 0, choice.text)
        message = choice.delta or choice.message
        if message is None:
            return
        if message.content:
            self._keep("content", index, 0, message.content)
        if message.refusal:
            self._keep("refusal", index, 0, message.refusal)
        reasoning = message.reasoning_content or message.reasoning  # some servers send the same text under both names
        if reasoning:
            self._keep("reasoning", index, 0, reasoning)
        if message.tool_calls is not None:
            for number, call in enumerate(message.tool_calls):
                # A plain reply's calls have no index, and a server that streams none sends each call whole.
                place = number if call.index is None else _index(call.index)
                self._call(index, place, call.function or call.custom)
        if message.function_call is not None:
            self._call(index, 0, message.function_call)

    def _call(self, index: int, place: int, call: _Call | None) -> None:
        if call is not None:
            self._keep("name", index, place, call.name)
            self._keep("arguments", index, place, call.arguments or call.input)

    def _delta_event(self, chunk: _Chunk) -> None:
        """`response.output_text.delta` and its kin. Deltas of audio are base64, not text."""
        kind = chunk.type
        if isinstance(kind, str) and kind.endswith(".delta") and not kind.endswith("audio.delta"):
            self._keep(kind, _index(chunk.output_index), 0, chunk.delta)

    def _item(self, number: int, item: dict[str, Any]) -> None:
        """An item of `output` of a plain Responses reply."""
        for member in ("content", "summary", "arguments", "input", "name"):
            self._keep(member, number, 0, item.get(member))

    def _keep(self, kind: str, index: int, place: int, text: Any) -> None:
        if not text:
            return
        if not isinstance(text, str):
            text = _of_parts(text)
        room = TEXT_CHARS - self._chars
        if len(text) > room:
            self._beyond += len(text) - room
            text = text[:room]
        if text:
            self._chars += len(text)
            pieces = self._channels.get((kind, index, place))
            if pieces is None:
                key = (kind, index, place) if len(self._channels) < CHANNELS else _OVERFLOW
                pieces = self._channels.setdefault(key, [])
            pieces.append(text)


def _is_json(held: list[bytes]) -> bool | None:
    """An event stream never starts with a brace or a bracket. None: nothing but blanks so far."""
    for data in held:
        start = data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if start:
            return start in b"{["
    return None


def _event_data(data: bytes) -> list[bytes]:
    """The data of each event that has any, of complete events; the lines of one event joined by a line feed."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    found = []
    for event in data.split(b"\n\n"):
        if event.startswith(b"data:") and b"\n" not in event:  # nearly every event is one line
            found.append(event[5:])
            continue
        lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
        if lines:
            found.append(lines[0] if len(lines) == 1 else b"\n".join(lines))
    return found


def _index(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _of_parts(content: Any) -> str:
    """The text of content that is a list of parts (Mistral's reasoning, Responses items)."""
    if not isinstance(content, list):
        return ""
    found = []
    for part in content:
        if isinstance(part, dict):
            for member in ("text", "refusal", "thinking"):
                text = part.get(member)
                found.append(text if isinstance(text, str) else _of_parts(text))
    return "".join(found)
