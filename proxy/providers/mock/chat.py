"""`/v1/chat/completions` and the older `/v1/completions`, in OpenAI's wire format."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import orjson

from proxy.providers.mock.admission import admit
from proxy.providers.mock.ask import Json, Prompt, add_tools, choose, stops, tool_list, whole
from proxy.providers.mock.compose import CALL_TOKENS, Choice, ToolCall, compose
from proxy.providers.mock.draft import SSE, Draft, plain, sse
from proxy.providers.mock.prefixes import Unit
from proxy.providers.mock.refusal import invalid
from proxy.providers.mock.text import Count

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_IMAGE_TOKENS = 85
DONE = b"data: [DONE]\n\n"


def chat(prompt: Prompt, count: Count) -> Draft:
    """Raises Refusal."""
    body = prompt.body
    _read_messages(prompt, count)
    prompt.tools = tool_list(body, nested=True)
    choose(prompt)
    if prompt.tools:
        add_tools(prompt, count)
    prompt.limit = whole(body, "max_completion_tokens", 1, 1 << 31) or whole(body, "max_tokens", 1, 1 << 31)
    prompt.choices = whole(body, "n", 1, 128) or 1
    prompt.stop = stops(body)
    prompt.schema = _format(body.get("response_format"))
    admit(prompt, count, "messages")
    choices = compose(prompt, count)
    if prompt.stream:
        return _stream(prompt, "chat.completion.chunk", "chatcmpl-", choices, _chat_deltas)
    return _whole(prompt, "chat.completion", "chatcmpl-", choices, _message)


def completions(prompt: Prompt, count: Count) -> Draft:
    """Raises Refusal. Several prompts are answered as several choices, as the API does."""
    body = prompt.body
    texts = _prompts(body.get("prompt"))
    prompt.prompt_tokens = sum(count(text) if isinstance(text, str) else len(text) for text in texts)
    prompt.texts = [text for text in texts if isinstance(text, str)]
    prompt.last_user = prompt.texts[-1] if prompt.texts else ""
    prompt.limit = whole(body, "max_tokens", 1, 1 << 31)
    prompt.choices = len(texts) * (whole(body, "n", 1, 128) or 1)
    prompt.stop = stops(body)
    admit(prompt, count, "prompt")
    choices = compose(prompt, count)
    if prompt.stream:
        return _stream(prompt, "text_completion", "cmpl-", choices, _text_deltas)
    return _whole(prompt, "text_completion", "cmpl-", choices, _text)


def _prompts(value: Any) -> list[Any]:
    """`prompt`: a string, tokens, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, int) for item in value):
            return [value]
        if all(isinstance(item, str | list) for item in value) and len(value) <= 128:
            return value
    raise invalid("'prompt' must be a string, a list of tokens, or a list of either.", "prompt", "invalid_type")


def _format(value: Any) -> Any:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {}
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise invalid("A schema is missing.", "response_format.json_schema.schema", "missing_required_parameter")
        return schema
    raise invalid("'response_format.type' is not known.", "response_format.type", "invalid_value")


def _read_messages(prompt: Prompt, count: Count) -> None:
    messages = prompt.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("'messages' must be an array with at least one message.", "messages", "invalid_type")
    tokens = 3
    open_calls: list[Any] = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid("A message's role is missing or unknown.", f"messages[{i}].role", "invalid_value")
        text, extra = _content(message.get("content"), i)
        open_calls = _pair(message, role, open_calls, i)
        head = 3 + count(role)
        size = head + count(text) + extra
        if isinstance(message.get("name"), str):
            size += 1 + count(message["name"])
        if role == "user":
            prompt.last_user = text
        elif role == "assistant":
            size += sum(_call_tokens(call, count) for call in message.get("tool_calls") or ())
        tokens += size
        prompt.texts.append(text)
        if prompt.prefixes is not None:
            prompt.units.append(Unit.of(message, size, role, head, text))
    if open_calls:
        raise _unpaired(len(messages) - 1)
    prompt.answers_tool = messages[-1]["role"] in ("tool", "function")
    prompt.prompt_tokens = tokens


def _call_tokens(call: Json, count: Count) -> int:
    """A call costs in a prompt what it cost as an answer: its ids and braces are not the model's words."""
    inner = call.get("custom") if call.get("type") == "custom" else call.get("function")
    given = [inner.get(member) for member in ("name", "arguments", "input")] if isinstance(inner, dict) else []
    return CALL_TOKENS + sum(count(text) for text in given if isinstance(text, str))


def _pair(message: Json, role: str, open_calls: list[Any], i: int) -> list[Any]:
    """Keeps the rule that providers enforce: each call is answered, and nothing stands between call and answer."""
    if role == "tool":
        ident = message.get("tool_call_id")
        if ident not in open_calls:
            raise invalid(
                "A message with role 'tool' must follow a message with 'tool_calls' that names its 'tool_call_id'.",
                f"messages[{i}].role",
            )
        return [call for call in open_calls if call != ident]
    if open_calls:
        raise _unpaired(i)
    calls = message.get("tool_calls")
    if role != "assistant" or calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in calls):
        raise invalid("'tool_calls' must be an array of calls with ids.", f"messages[{i}].tool_calls", "invalid_type")
    return [call["id"] for call in calls]


def _unpaired(i: int) -> Exception:
    return invalid(
        "An assistant message with 'tool_calls' must be followed by a tool message for each 'tool_call_id'.",
        f"messages[{i}].role",
    )


def _content(content: Any, i: int) -> tuple[str, int]:
    """(text, tokens of what is not text)."""
    if content is None:
        return "", 0
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid("'content' must be a string or an array of parts.", f"messages[{i}].content", "invalid_type")
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    return "".join(texts), _IMAGE_TOKENS * (len(content) - len(texts))


def usage(prompt: Prompt, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": prompt.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _frame(prompt: Prompt, kind: str, prefix: str) -> Json:
    return {
        "id": prefix + prompt.ident,
        "object": kind,
        "created": prompt.created,
        "model": prompt.model,
        "service_tier": "default",
        "system_fingerprint": "fp_mock",
    }


def _whole(prompt: Prompt, kind: str, prefix: str, choices: list[Choice], render: Any) -> Draft:
    total = sum(choice.total for choice in choices)
    body = _frame(prompt, kind, prefix)
    body["choices"] = [
        {"index": i, **render(choice), "logprobs": None, "finish_reason": choice.finish}
        for i, choice in enumerate(choices)
    ]
    if prompt.name != "no-usage":
        body["usage"] = usage(prompt, total)
    return plain(orjson.dumps(body), prompt.prompt_tokens, total, cached_tokens=prompt.cached_tokens)


def _text(choice: Choice) -> Json:
    return {"text": choice.text}


def _message(choice: Choice) -> Json:
    message: Json = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if choice.calls:
        message["content"] = None
        message["tool_calls"] = [
            {"id": call.id, "type": call.kind, call.kind: {"name": call.name, _argument(call): call.arguments}}
            for call in choice.calls
        ]
    return {"message": message}


def _argument(call: ToolCall) -> str:
    return "input" if call.kind == "custom" else "arguments"


Delta = tuple[Json, int]
"""(members of a chunk's choice, completion tokens of that choice once it is sent)."""


def _chat_deltas(choice: Choice) -> Iterator[Delta]:
    content = None if choice.calls else ""
    yield _delta({"role": "assistant", "content": content, "refusal": None}), 0
    for piece, tokens in zip(choice.pieces, choice.tokens, strict=True):
        yield _delta({"content": piece}), tokens
    before = 0
    for i, call in enumerate(choice.calls):
        name = _argument(call)
        opening = {"index": i, "id": call.id, "type": call.kind, call.kind: {"name": call.name, name: ""}}
        yield _delta({"tool_calls": [opening]}), before + (0 if call.pieces else call.tokens[-1])
        for piece, tokens in zip(call.pieces, call.tokens, strict=True):
            yield _delta({"tool_calls": [{"index": i, call.kind: {name: piece}}]}), before + tokens
        before += call.tokens[-1]
    yield _delta({}, choice.finish), choice.total


def _delta(delta: Json, finish: str | None = None) -> Json:
    return {"delta": delta, "logprobs": None, "finish_reason": finish}


def _text_deltas(choice: Choice) -> Iterator[Delta]:
    for piece, tokens in zip(choice.pieces, choice.tokens, strict=True):
        yield {"text": piece, "logprobs": None, "finish_reason": None}, tokens
    yield {"text": "", "logprobs": None, "finish_reason": choice.finish}, choice.total


def _stream(prompt: Prompt, kind: str, prefix: str, choices: list[Choice], deltas: Any) -> Draft:
    """Choices take turns, chunk by chunk."""
    draft = Draft(content_type=SSE, stream=True, prompt_tokens=prompt.prompt_tokens, cached_tokens=prompt.cached_tokens)
    draft.headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    frame = _frame(prompt, kind, prefix)
    told = prompt.wants_usage and prompt.name != "no-usage"
    billed = [0] * len(choices)
    for turn in zip_longest(*(deltas(choice) for choice in choices)):
        for i, delta in enumerate(turn):
            if delta is None:
                continue
            members, billed[i] = delta
            chunk = {**frame, "choices": [{"index": i, **members}]}
            if told:
                chunk["usage"] = None
            draft.pieces.append(event(chunk))
            draft.billed.append(sum(billed))
    if told:
        draft.pieces.append(event({**frame, "choices": [], "usage": usage(prompt, draft.billed[-1])}))
        draft.billed.append(draft.billed[-1])
    draft.pieces.append(DONE)
    draft.billed.append(draft.billed[-1])
    return draft


def event(value: Json) -> bytes:
    return sse("", orjson.dumps(value))
