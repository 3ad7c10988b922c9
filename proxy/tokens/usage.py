"""A provider's `usage` object, in whatever dialect, as our `Usage`. Pure.

    where                          input               output              details
    OpenAI chat, completions,      prompt_tokens       completion_tokens   prompt_tokens_details.cached_tokens,
      embeddings, compatibles                                              .cache_write_tokens, .audio_tokens,
                                                                           completion_tokens_details.reasoning_tokens,
                                                                           .audio_tokens
    OpenAI Responses               input_tokens        output_tokens       input_tokens_details, output_tokens_details
    Anthropic                      input_tokens + both cache members       cache_read_input_tokens,
                                                                           cache_creation_input_tokens
    DeepSeek                       prompt_tokens                           prompt_cache_hit_tokens
    Moonshot                       prompt_tokens                           cached_tokens
    Groq, a chunk's `x_groq`       {"usage": {…}}: opened

Rules for what is doubtful, each on the side of not inventing tokens:

- A count is an integer from 0 to 2^53, or a float of the same value (`12.0`). Anything else (negative, larger, text,
  true, null) counts as not said.
- Neither input nor output nor total said: there is no usage (None), and the caller estimates. Zeros are said.
- Only a total: it is the input (embeddings). One of input and output alone: the other is what the total leaves, or 0.
- A total above the sum of input and output holds thinking that the provider leaves out of its output (xAI, Gemini):
  the surplus is output.
- Details are subsets: never added (but Anthropic's), and cut to what contains them.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from proxy.types import Usage

LARGEST: Final = 2**53
"""Larger integers are not exact in JSON."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None
    cache_write_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None
    audio_tokens: _Count | None = None


class _Wire(msgspec.Struct):
    """The members that we read. Members of any other name are skipped without being decoded."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    total_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    prompt_cache_hit_tokens: _Count | None = None
    cached_tokens: _Count | None = None
    usage: _Wire | None = None


_COUNTS: Final = tuple(
    name for name in _Wire.__struct_fields__ if name.endswith("_tokens")
)  # the objects end in _details or are `usage`
_decode_wire = msgspec.json.Decoder(_Wire).decode
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def usage_of(body_member: bytes | msgspec.Raw) -> Usage | None:
    """The usage that the bytes of a `usage` member (or of Groq's `x_groq`) state; None if they state none.

    Never raises, whatever the bytes.
    """
    try:
        wire = _decode_wire(body_member)
    except _NOT_JSON:
        tolerated = _tolerate(body_member)
        if tolerated is None:
            return None
        wire = tolerated
    if wire.usage is not None and wire.prompt_tokens is None and wire.input_tokens is None:
        wire = wire.usage
    return _normalise(wire)


def _normalise(wire: _Wire) -> Usage | None:
    given = wire.input_tokens if wire.prompt_tokens is None else wire.prompt_tokens
    made = wire.output_tokens if wire.completion_tokens is None else wire.completion_tokens
    total = wire.total_tokens
    inner = wire.prompt_tokens_details or wire.input_tokens_details or _NO_DETAILS
    outer = wire.completion_tokens_details or wire.output_tokens_details or _NO_DETAILS
    read, write = inner.cached_tokens, inner.cache_write_tokens or 0
    if read is None:
        read = _first(wire.cache_read_input_tokens, wire.prompt_cache_hit_tokens, wire.cached_tokens)
    if inner.cache_write_tokens is None:
        write = wire.cache_creation_input_tokens or 0
    if wire.prompt_tokens is None and given is not None and inner is _NO_DETAILS:
        # Anthropic's input leaves out what the cache served or stored; the others do not have these members.
        given += (wire.cache_read_input_tokens or 0) + (wire.cache_creation_input_tokens or 0)
    if given is None:
        if made is None and total is None:
            return None
        given = max((total or 0) - (made or 0), 0)
    if made is None:
        made = max((total or 0) - given, 0)
    elif total is not None and total > given + made:
        made = total - given
    reasoning, heard, spoken = outer.reasoning_tokens or 0, inner.audio_tokens or 0, outer.audio_tokens or 0
    if not (read or write or reasoning or heard or spoken):
        return Usage(given, made)
    read = min(read, given)
    return Usage(
        given,
        made,
        read,
        min(write, given - read),
        min(reasoning, made),
        input_audio=min(heard, given),
        output_audio=min(spoken, made),
    )


_NO_DETAILS: Final = _Details()


def _first(*counts: int | None) -> int:
    """The first one that was said; 0: none was."""
    for count in counts:
        if count is not None:
            return count
    return 0


def _tolerate(raw: bytes | msgspec.Raw) -> _Wire | None:
    """The same members out of an object in which some have the wrong type."""
    try:
        value = msgspec.json.decode(raw)
    except _NOT_JSON:
        return None
    return _wire(value) if isinstance(value, dict) else None


def _wire(value: dict[str, Any], depth: int = 0) -> _Wire:
    wire = _Wire()
    for name in _COUNTS:
        setattr(wire, name, _integer(value.get(name)))
    for name in ("prompt_tokens_details", "completion_tokens_details", "input_tokens_details", "output_tokens_details"):
        details = value.get(name)
        if isinstance(details, dict):
            counts = {member: _integer(details.get(member)) for member in _Details.__struct_fields__}
            setattr(wire, name, _Details(**counts))
    nested = value.get("usage")
    if isinstance(nested, dict) and depth == 0:
        wire.usage = _wire(nested, depth + 1)
    return wire


def _integer(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
        return None
    return value
