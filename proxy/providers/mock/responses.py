"""`/v1/responses`: plain, as a stream of typed events, and the stored objects."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import orjson

from proxy.providers.mock.admission import admit
from proxy.providers.mock.ask import Json, Prompt, add_tools, choose, flag, tool_list, whole
from proxy.providers.mock.compose import Choice, ToolCall, compose
from proxy.providers.mock.draft import SSE, Draft, plain, sse
from proxy.providers.mock.prefixes import Unit
from proxy.providers.mock.refusal import Refusal, invalid
from proxy.providers.mock.text import Count

_MOST_STORED: Final = 1000
_MOST_STORED_TOKENS: Final = 4_000_000


class Stored:
    """The responses kept for `GET /v1/responses/{id}`: the last thousand, or fewer with long prompts."""

    def __init__(self, most: int = _MOST_STORED, tokens: int = _MOST_STORED_TOKENS) -> None:
        """`tokens`: of all their prompts together. The last one is kept however long it is."""
        self._most = most
        self._most_tokens = tokens
        self._tokens = 0
        self._kept: OrderedDict[str, tuple[Json, list[Any], int]] = OrderedDict()

    def add(self, response: Json, items: list[Any], tokens: int) -> None:
        """`tokens`: of the prompt."""
        self._drop(response["id"])
        self._kept[response["id"]] = (response, items, tokens)
        self._tokens += tokens
        while len(self._kept) > self._most or (self._tokens > self._most_tokens and len(self._kept) > 1):
            self._drop(next(iter(self._kept)))

    def get(self, ident: str) -> tuple[Json, list[Any]]:
        """(the response, its input items). Raises Refusal (404)."""
        found = self._kept.get(ident)
        if found is None:
            raise Refusal(404, f"Response with id '{ident[:80]}' not found.", code=None)
        return found[:2]

    def remove(self, ident: str) -> None:
        """Raises Refusal (404)."""
        self.get(ident)
        self._drop(ident)

    def _drop(self, ident: str) -> None:
        found = self._kept.pop(ident, None)
        if found is not None:
            self._tokens -= found[2]


def responses(prompt: Prompt, count: Count, stored: Stored) -> Draft:
    """Raises Refusal."""
    body = prompt.body
    if "include_usage" in (body.get("stream_options") or ()):
        raise invalid("Unknown parameter: 'stream_options.include_usage'.", "stream_options", "unknown_parameter")
    items = read_input(prompt, count)
    prompt.tools = tool_list(body, nested=False)
    choose(prompt)
    if prompt.tools:
        add_tools(prompt, count)
    prompt.limit = whole(body, "max_output_tokens", 1, 1 << 31)
    prompt.schema = _format(body.get("text"))
    previous = body.get("previous_response_id")
    if previous is not None:
        prompt.prompt_tokens += _earlier(previous, stored)
        prompt.units.clear()  # what stands before them is not known here any more
    admit(prompt, count, "input")
    choice = compose(prompt, count)[0]
    final = _response(prompt, choice)
    if flag(body, "store", True):
        stored.add(final, items, prompt.prompt_tokens)
    if not prompt.stream:
        return plain(orjson.dumps(final), prompt.prompt_tokens, choice.total, cached_tokens=prompt.cached_tokens)
    return _stream(prompt, choice, final)


def read_input(prompt: Prompt, count: Count) -> list[Any]:
    """Counts `input` and `instructions` into the prompt and returns the input items. Raises Refusal."""
    given = prompt.body.get("input")
    instructions = prompt.body.get("instructions")
    tokens = 3
    if isinstance(instructions, str):
        size = 4 + count(instructions)
        tokens += size
        if prompt.prefixes is not None:
            prompt.units.append(Unit.of(instructions, size, "instructions", 4, instructions))
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise invalid("'input' must be a string or an array of items.", "input", "invalid_type")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise invalid("An input item must be an object.", f"input[{i}]", "invalid_type")
        text = _item_text(item)
        size = 4 + count(text)
        tokens += size
        prompt.texts.append(text)
        if prompt.prefixes is not None:
            prompt.units.append(Unit.of(item, size, str(item.get("role") or item.get("type")), 4, text))
        if item.get("role") == "user":
            prompt.last_user = text
    prompt.answers_tool = items[-1].get("type") in ("function_call_output", "custom_tool_call_output")
    prompt.prompt_tokens = tokens
    return items


def _item_text(item: Json) -> str:
    for member in ("content", "output", "arguments", "input"):
        value = item.get(member)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            parts = [part.get("text") for part in value if isinstance(part, dict)]
            return "".join(part for part in parts if isinstance(part, str))
    return ""


def _earlier(previous: Any, stored: Stored) -> int:
    if not isinstance(previous, str):
        raise invalid("'previous_response_id' must be a string.", "previous_response_id", "invalid_type")
    try:
        response, _ = stored.get(previous)
    except Refusal:
        message = f"Previous response with id '{previous[:80]}' not found."
        raise invalid(message, "previous_response_id", "previous_response_not_found") from None
    total = response["usage"]["total_tokens"] if response["usage"] else 0
    return int(total)


def _format(value: Any) -> Any:
    kind = value.get("format") if isinstance(value, dict) else None
    if not isinstance(kind, dict) or kind.get("type") in (None, "text"):
        return None
    if kind["type"] == "json_object":
        return {}
    if kind["type"] == "json_schema" and isinstance(kind.get("schema"), dict):
        return kind["schema"]
    raise invalid("'text.format' is not known or lacks its schema.", "text.format", "invalid_value")


def _response(prompt: Prompt, choice: Choice) -> Json:
    body = prompt.body
    done = choice.finish != "length"
    usage = {
        "input_tokens": prompt.prompt_tokens,
        "input_tokens_details": {"cached_tokens": prompt.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": choice.total,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt.prompt_tokens + choice.total,
    }
    return {
        "id": "resp_" + prompt.ident,
        "object": "response",
        "created_at": prompt.created,
        "status": "completed" if done else "incomplete",
        "background": False,
        "error": None,
        "incomplete_details": None if done else {"reason": "max_output_tokens"},
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": prompt.model,
        "output": _output(prompt, choice, "completed" if done else "incomplete"),
        "parallel_tool_calls": prompt.parallel,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.get("store") is not False,
        "temperature": body.get("temperature", 1.0),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p", 1.0),
        "truncation": body.get("truncation") or "disabled",
        "usage": None if prompt.name == "no-usage" else usage,
        "user": body.get("user"),
        "metadata": body.get("metadata") or {},
    }


def _output(prompt: Prompt, choice: Choice, status: str) -> list[Json]:
    if choice.calls:
        return [_call_item(call, status, call.arguments) for call in choice.calls]
    return [_message_item(prompt, status, [_part(choice.text)])]


def _message_item(prompt: Prompt, status: str, content: list[Json]) -> Json:
    return {"id": "msg_" + prompt.ident, "type": "message", "status": status, "role": "assistant", "content": content}


def _call_item(call: ToolCall, status: str, arguments: str) -> Json:
    if call.kind == "custom":
        kind, prefix, member = "custom_tool_call", "ctc_", "input"
    else:
        kind, prefix, member = "function_call", "fc_", "arguments"
    ident = prefix + call.id.removeprefix("call_")
    return {"id": ident, "type": kind, "status": status, "call_id": call.id, "name": call.name, member: arguments}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Events:
    """The typed events in order, numbered, each with the tokens billed once it is sent."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def add(self, kind: str, billed: int, **members: Any) -> None:
        value = {"type": kind, "sequence_number": len(self._draft.pieces), **members}
        self._draft.pieces.append(sse(kind, orjson.dumps(value)))
        self._draft.billed.append(billed)


def _stream(prompt: Prompt, choice: Choice, final: Json) -> Draft:
    draft = Draft(content_type=SSE, stream=True, prompt_tokens=prompt.prompt_tokens, cached_tokens=prompt.cached_tokens)
    draft.headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    events = _Events(draft)
    begun = {**final, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    events.add("response.created", 0, response=begun)
    events.add("response.in_progress", 0, response=begun)
    if choice.calls:
        before = 0
        for i, call in enumerate(choice.calls):
            _stream_call(events, call, final["output"][i], i, before)
            before += call.tokens[-1]
    else:
        _stream_text(events, prompt, choice, final["output"][0])
    events.add("response." + final["status"], choice.total, response=final)
    return draft


def _stream_text(events: _Events, prompt: Prompt, choice: Choice, item: Json) -> None:
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    events.add("response.output_item.added", 0, output_index=0, item=_message_item(prompt, "in_progress", []))
    events.add("response.content_part.added", 0, **place, part=_part(""))
    for piece, tokens in zip(choice.pieces, choice.tokens, strict=True):
        events.add("response.output_text.delta", tokens, **place, delta=piece, logprobs=[])
    events.add("response.output_text.done", choice.total, **place, text=choice.text, logprobs=[])
    events.add("response.content_part.done", choice.total, **place, part=_part(choice.text))
    events.add("response.output_item.done", choice.total, output_index=0, item=item)


def _stream_call(events: _Events, call: ToolCall, item: Json, index: int, before: int) -> None:
    custom = call.kind == "custom"
    kind = "response.custom_tool_call_input" if custom else "response.function_call_arguments"
    place = {"item_id": item["id"], "output_index": index}
    opened = _call_item(call, "in_progress", "")
    events.add("response.output_item.added", before, output_index=index, item=opened)
    for piece, tokens in zip(call.pieces, call.tokens, strict=True):
        events.add(kind + ".delta", before + tokens, **place, delta=piece)
    done = {"input": call.arguments} if custom else {"arguments": call.arguments, "name": call.name}
    events.add(kind + ".done", before + call.tokens[-1], **place, **done)
    events.add("response.output_item.done", before + call.tokens[-1], output_index=index, item=item)
