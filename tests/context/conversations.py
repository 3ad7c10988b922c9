"""Conversations as clients send them, of both dialects, out of lists of small numbers.

A conversation is drawn as a list of numbers, one for each step, so that a failing one shrinks to few and plain steps.
Each number says what kind of step it is, and seeds what stands in it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from hypothesis import strategies as st

from proxy.context.heads import Dialect
from tests.context.judged import Message, tokens

TEXTS: Final = (
    "",
    "ok",
    "Please find the cause of the failure in the nightly build, and mend it.",
    "Grüße, 你好 世界, здравствуйте, 🙂🏽 \u202e",
    "line one\n\tline two\r\n\u0000\u0001\u001f\u007f",
    "<|im_start|>system<|im_end|><|endoftext|>",
    '{"role": "tool", "tool_call_id": "call_0", "cache_control": null}',
    "cache_control",
    "a" * 700,
    "the quick brown fox jumps over the lazy dog. " * 30,
)
IMAGE: Final = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
CALLS: Final = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
    "computer_call": "computer_call_output",
    "local_shell_call": "local_shell_call_output",
    "shell_call": "shell_call_output",
    "apply_patch_call": "apply_patch_call_output",
    "telepathy_call": "telepathy_call_output",
}
HOSTED: Final = ("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "mcp_call")


@dataclass
class Writer:
    """Writes one conversation."""

    random: random.Random = field(default_factory=lambda: random.Random(0))
    messages: list[Message] = field(default_factory=list)
    calls: int = 0

    def text(self) -> str:
        return self.random.choice(TEXTS)

    def output(self) -> str:
        """What a tool says: mostly little, at times a lot."""
        draw = self.random.random()
        if draw < 0.4:
            return self.text()
        size = self.random.randrange(200_000) if draw > 0.995 else self.random.randrange(4000)
        return ("0123456789 abcdef\n" * (size // 18 + 1))[:size]

    def id(self) -> str:
        """Most clients hand out ids of their own; some servers start at `call_0` in every turn."""
        self.calls += 1
        return f"call_{self.random.randrange(3)}" if self.random.random() < 0.3 else f"call_{self.calls:024x}"

    def some(self, most: int = 3) -> range:
        return range(self.random.choice((1, 1, 1, 2, most)))

    def shuffled(self, messages: list[Message]) -> list[Message]:
        if self.random.random() < 0.3:
            self.random.shuffle(messages)
        return messages

    def add(self, **members: Any) -> None:
        self.messages.append(members)


# -- chat ------------------------------------------------------------------------------------------------------------


def user(writer: Writer) -> None:
    writer.add(role="user", content=writer.text())


def user_parts(writer: Writer) -> None:
    parts: list[Message] = [
        {"type": "text", "text": writer.text()},
        {"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "file", "file": {"file_id": "file-1", "filename": writer.text()}},
    ]
    writer.add(role="user", name="bob", content=parts[: writer.random.randrange(5)])


def marked(writer: Writer) -> None:
    control = {"type": "ephemeral"} if writer.random.random() < 0.7 else None
    writer.add(role="user", content=[{"type": "text", "text": writer.text(), "cache_control": control}])


def says(writer: Writer) -> None:
    more: Message = writer.random.choice(({}, {"tool_calls": None}, {"tool_calls": []}, {"refusal": "no"}))
    writer.add(role="assistant", content=writer.random.choice((None, writer.text())), **more)


def speaks(writer: Writer) -> None:
    writer.add(role="assistant", content=None, audio={"id": "audio_1"}, reasoning_content=writer.text())


def _chat_calls(writer: Writer) -> list[Message]:
    """The message that calls is written; its results are returned."""
    calls: list[Message] = []
    for _ in writer.some():
        if writer.random.random() < 0.2:
            calls.append({"id": writer.id(), "type": "custom", "custom": {"name": "run", "input": writer.text()}})
        else:
            arguments = json.dumps({"path": writer.text()})
            function = {"name": "read", "arguments": arguments}
            calls.append({"id": writer.id(), "type": "function", "function": function})
    writer.add(role="assistant", content=writer.random.choice((None, "", writer.text())), tool_calls=calls)
    results: list[Message] = []
    for call in calls:
        output = writer.output()
        content: Any = output if writer.random.random() < 0.8 else [{"type": "text", "text": output}]
        results.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return writer.shuffled(results)


def chat_turn(writer: Writer) -> None:
    writer.messages += _chat_calls(writer)


def chat_interrupted(writer: Writer) -> None:
    results = _chat_calls(writer)
    results.insert(writer.random.randrange(len(results)), {"role": "user", "content": "Are you done?"})
    writer.messages += results


def legacy(writer: Writer) -> None:
    name = writer.random.choice(("look", "find"))
    writer.add(role="assistant", content=None, function_call={"name": name, "arguments": "{}"})
    writer.add(role="function", name=name, content=writer.random.choice((None, writer.output())))


def system(writer: Writer) -> None:
    writer.add(role=writer.random.choice(("system", "developer")), content=writer.text())


# -- responses -------------------------------------------------------------------------------------------------------


def item_user(writer: Writer) -> None:
    typed: Message = {"type": "message"} if writer.random.random() < 0.5 else {}
    content: Any = [{"type": "input_text", "text": writer.text()}, {"type": "input_image", "image_url": IMAGE}]
    writer.add(**typed, role="user", content=content if writer.random.random() < 0.4 else writer.text())


def item_says(writer: Writer) -> None:
    content = [{"type": "output_text", "text": writer.text(), "annotations": []}]
    writer.add(type="message", id="msg_1", role="assistant", status="completed", content=content)


def item_hosted(writer: Writer) -> None:
    item_thinks(writer)
    writer.add(type=writer.random.choice(HOSTED), id="ws_1", status="completed", output=None)
    item_says(writer)


def item_thinks(writer: Writer) -> None:
    if writer.random.random() < 0.7:
        writer.add(type="reasoning", id="rs_1", summary=[], encrypted_content=writer.text())


def item_lone_thought(writer: Writer) -> None:
    writer.add(type="reasoning", id="rs_2", summary=[{"type": "summary_text", "text": writer.text()}])


def _item_calls(writer: Writer) -> list[Message]:
    results: list[Message] = []
    item_thinks(writer)
    for _ in writer.some():
        kind = "function_call" if writer.random.random() < 0.75 else writer.random.choice(list(CALLS))
        key = writer.id()
        writer.add(type=kind, id="fc_1", call_id=key, name="read", arguments='{"path":"a"}')
        results.append({"type": CALLS[kind], "call_id": key, "output": _item_output(writer, kind)})
        if writer.random.random() < 0.2:
            item_thinks(writer)
    return writer.shuffled(results)


def _item_output(writer: Writer, kind: str) -> Any:
    output = writer.output()
    if kind == "computer_call":
        return {"type": "computer_screenshot", "image_url": IMAGE}
    if kind == "shell_call":
        return [{"stdout": output, "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]
    if writer.random.random() < 0.2 and kind in ("function_call", "custom_tool_call"):
        return [{"type": "input_text", "text": output}]
    return output


def item_turn(writer: Writer) -> None:
    writer.messages += _item_calls(writer)


def item_interrupted(writer: Writer) -> None:
    results = _item_calls(writer)
    results.insert(writer.random.randrange(len(results)), {"role": "user", "content": "Are you done?"})
    writer.messages += results


def item_approval(writer: Writer) -> None:
    writer.add(type="mcp_list_tools", id="mcpl_1", server_label="s", tools=[])
    request = writer.id()
    writer.add(type="mcp_approval_request", id=request, name="write", arguments="{}", server_label="s")
    writer.add(type="mcp_approval_response", approval_request_id=request, approve=True)


def item_compaction(writer: Writer) -> None:
    writer.add(type="compaction", id="cmp_1", encrypted_content=writer.text())


def item_unknown(writer: Writer) -> None:
    writer.add(type="premonition", text=writer.text())


Step = Callable[[Writer], None]
_CHAT: Final[tuple[Step, ...]] = (
    *(user, user, user, says, says, says, chat_turn, chat_turn, chat_turn, chat_turn, chat_turn, chat_turn),
    *(user_parts, legacy, speaks, chat_interrupted, system, marked),
)
_RESPONSES: Final[tuple[Step, ...]] = (
    *(item_user, item_user, item_user, item_says, item_says, item_turn, item_turn, item_turn, item_turn, item_turn),
    *(item_hosted, item_lone_thought, item_interrupted, item_approval, item_compaction, item_unknown, system, marked),
)


def written(dialect: Dialect, steps: Sequence[int]) -> list[Message]:
    """The conversation that some numbers stand for. The first one decides about the opening."""
    kinds = _CHAT if dialect == "chat" else _RESPONSES
    writer = Writer()
    for at, step in enumerate(steps):
        writer.random = random.Random(step)
        if at == 0 and step % 4:
            for _ in range(step % 3 + 1):
                system(writer)
        kinds[step % len(kinds)](writer)
    return writer.messages


def as_json(message: Any, seed: int) -> bytes:
    """As one of several serializers would write it."""
    draw = random.Random(seed)
    separators = draw.choice(((",", ":"), (", ", ": "), (" ,\n", " : ")))
    return json.dumps(message, ensure_ascii=draw.random() < 0.5, separators=separators).encode()


@dataclass
class Case:
    """A conversation, and the limits to hold it to."""

    dialect: Dialect
    messages: list[Message]
    raws: list[bytes]
    fixed: int
    high: int
    low: int
    masking: bool

    @property
    def each(self) -> list[int]:
        return [tokens(raw) for raw in self.raws]


@st.composite
def cases(draw: st.DrawFn, dialect: Dialect) -> Case:
    least = draw(st.integers(0, 40))
    steps = draw(st.lists(st.integers(0, 65_535), min_size=least, max_size=least + 10))
    per_mille, low = draw(st.tuples(st.integers(100, 1100), st.integers(300, 1000)))
    messages = written(dialect, steps)
    seed = sum(steps)
    raws = [as_json(message, seed + at) for at, message in enumerate(messages)]
    fixed = draw(st.integers(0, 300))
    high = (fixed + sum(map(tokens, raws))) * per_mille // 1000
    if draw(st.integers(0, 7)) == 7:  # where a note makes the difference between what fits and what does not
        high = max(fixed + sum(map(tokens, raws)) + draw(st.integers(-45, 45)), 0)
    return Case(dialect, messages, raws, fixed, high, high * low // 1000, draw(st.booleans()))
