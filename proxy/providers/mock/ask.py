"""What a request to the mock asks for: parsed, and refused where a provider would refuse it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import orjson

from proxy.providers.mock.prefixes import Prefixes, Unit
from proxy.providers.mock.refusal import invalid
from proxy.providers.mock.text import Count

Json = dict[str, Any]

_PREFIX: Final = "mock/"
_VOLATILE: Final = ("stream", "stream_options")
"""Members that change how an answer travels, not what it says: plain and streamed answers hold the same text."""

_CREATED: Final = 1_790_000_000
_SPREAD: Final = 8_000_000


@dataclass(slots=True)
class Prompt:
    """The parts of a request that every generating route shares, in one shape."""

    body: Json
    model: str
    """As received: the answer echoes it."""
    name: str
    """Without the `mock/` prefix: what the behaviour goes by."""
    digest: bytes
    """Of seed, path and content: every id, time and word of the answer is made from it."""
    stream: bool = False
    wants_usage: bool = False
    limit: int | None = None
    """Most tokens of the answer."""
    choices: int = 1
    stop: list[str] = field(default_factory=list)
    last_user: str = ""
    answers_tool: bool = False
    """The conversation ends with a tool's result."""
    tools: list[Json] = field(default_factory=list)
    """Flat: {kind: function|custom, name, parameters}."""
    forced: str | None = None
    """A tool that must be called, or "" for any."""
    may_call: bool = False
    parallel: bool = True
    schema: Any = None
    """JSON Schema of a structured answer; {} for any JSON object; None for text."""
    prompt_tokens: int = 0
    texts: list[str] = field(default_factory=list)
    """What the messages say, in order."""
    prefixes: Prefixes | None = None
    """The prompt cache; None: there is none."""
    owner: bytes = b""
    """Whose prompts share a cache."""
    units: list[Unit] = field(default_factory=list)
    """The prompt for the cache, where there is one."""
    cached_tokens: int = 0

    @property
    def ident(self) -> str:
        return self.digest.hex()[:24]

    @property
    def created(self) -> int:
        """Seconds since the epoch, from the content and not from a clock."""
        return _CREATED + int.from_bytes(self.digest[:4], "big") % _SPREAD

    def random(self, choice: int = 0) -> Random:
        return Random(int.from_bytes(self.digest, "big") + choice)  # noqa: S311 (words, not secrets)


def parse(seed: bytes, path: str, body: bytes) -> Prompt:
    """Raises Refusal (400)."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise invalid("The body of your request is not valid JSON.") from None
    if not isinstance(parsed, dict):
        raise invalid("The body of your request must be a JSON object.")
    model = parsed.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("You must provide a model parameter.", "model", "missing_required_parameter")
    name = model.removeprefix(_PREFIX)
    said = {key: value for key, value in parsed.items() if key not in _VOLATILE} | {"model": name}
    digest = hashlib.blake2b(path.encode(), digest_size=16, key=seed)
    digest.update(orjson.dumps(said, option=orjson.OPT_SORT_KEYS))
    prompt = Prompt(parsed, model, name, digest.digest())
    prompt.stream = flag(parsed, "stream")
    options = parsed.get("stream_options")
    if options is not None:
        if not isinstance(options, dict):
            raise invalid("'stream_options' must be an object.", "stream_options", "invalid_type")
        if not prompt.stream:
            raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
        prompt.wants_usage = flag(options, "include_usage")
    return prompt


def flag(body: Json, name: str, otherwise: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, bool):
        raise invalid(f"'{name}' must be a boolean.", name, "invalid_type")
    return value


def whole(body: Json, name: str, low: int, high: int) -> int | None:
    """An optional integer within bounds. Raises Refusal (400)."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(f"'{name}' must be an integer.", name, "invalid_type")
    if not low <= value <= high:
        raise invalid(f"'{name}' must be from {low} to {high}.", name, "invalid_value")
    return value


def stops(body: Json) -> list[str]:
    value = body.get("stop")
    if value is None:
        return []
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or len(words) > 4 or not all(isinstance(w, str) for w in words):
        raise invalid("'stop' must be a string or at most four strings.", "stop", "invalid_type")
    return [word for word in words if word]


def tool_list(body: Json, *, nested: bool) -> list[Json]:
    """The request's own tools, flat. `nested`: chat keeps a tool's members one level deeper than responses does."""
    value = body.get("tools")
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid("'tools' must be an array.", "tools", "invalid_type")
    out: list[Json] = []
    for i, tool in enumerate(value):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            if nested or kind is None:
                raise invalid("A tool's 'type' must be 'function' or 'custom'.", f"tools[{i}].type", "invalid_value")
            continue  # a hosted tool of the responses API: the mock runs none
        inner = tool.get(kind) if nested else tool
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(name, str) or not name:
            raise invalid("A tool must have a name.", f"tools[{i}]", "missing_required_parameter")
        out.append({"kind": kind, "name": name, "parameters": inner.get("parameters")})
    return out


def add_tools(prompt: Prompt, count: Count) -> None:
    """The definitions of tools stand before everything else."""
    text = orjson.dumps(prompt.body["tools"]).decode()
    tokens = count(text) + 9
    prompt.prompt_tokens += tokens
    if prompt.prefixes is not None:
        prompt.units.insert(0, Unit.of(prompt.body["tools"], tokens, "tools", 0, text))


def choose(prompt: Prompt) -> None:
    """Reads `tool_choice` and `parallel_tool_calls`: whether the answer is a call, and of which tool."""
    prompt.parallel = flag(prompt.body, "parallel_tool_calls", True)
    choice = prompt.body.get("tool_choice")
    if not prompt.tools:
        if choice not in (None, "auto", "none"):
            raise invalid("'tool_choice' is only allowed when 'tools' are given.", "tool_choice")
        return
    if choice in (None, "auto", "none", "required"):
        prompt.may_call = choice != "none" and not prompt.answers_tool
        prompt.forced = "" if choice == "required" else None
        return
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        _allow(prompt, choice)
        return
    named = choice.get(kind, choice) if kind in ("function", "custom") else None
    name = named.get("name") if isinstance(named, dict) else None
    if not any(tool["name"] == name for tool in prompt.tools):
        raise invalid("'tool_choice' names no tool of this request.", "tool_choice", "invalid_value")
    prompt.forced = name


def _allow(prompt: Prompt, choice: Json) -> None:
    inner = choice.get("allowed_tools", choice)
    tools = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(tools, list):
        raise invalid("'allowed_tools' must list tools.", "tool_choice", "invalid_type")
    names = [_tool_name(tool) for tool in tools]
    prompt.tools = [tool for tool in prompt.tools if tool["name"] in names]
    prompt.may_call = bool(prompt.tools) and not prompt.answers_tool
    prompt.forced = "" if inner.get("mode") == "required" and prompt.tools else None


def _tool_name(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return None
    inner = tool.get("custom") if tool.get("type") == "custom" else tool.get("function")
    return inner.get("name") if isinstance(inner, dict) else tool.get("name")
