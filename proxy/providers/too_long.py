"""A prompt that is too long, in the words of those who refuse it. Pure.

No vendor has a field for what would help: how many tokens the window holds, and how many were asked for. Nearly all say
it in a sentence, each in its own. A sentence that is not known here is no evidence: a parameter that exceeds what the
model can write, or a rate limit that is counted in tokens, speaks of lengths as well.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.types import TooLong

_NUMBER: Final = r"(\d{1,3}(?:[,_'\u00a0\u202f]\d{3}){1,4}|\d{1,15})(?!\d)"
_LONGEST_TEXT: Final = 4096


def _rule(text: str, *parts: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    return re.compile(text.replace("#", _NUMBER)), parts


# Of each group the first sentence that is found decides. `#` is a number, and stands for the part named behind it.
_WINDOW: Final = (
    _rule(r"prompt is too long: # tokens > # maximum", "asked", "window"),
    _rule(r"prompt is too long: #, model maximum context length: #", "asked", "window"),
    _rule(r"exceed context limit: # \+ # > #", "input", "output", "window"),
    _rule(r"exceeds the maximum number of tokens allowed \(?#", "window"),
    _rule(r"too large for model with # maximum context length", "window"),
    _rule(r"longer than the maximum model length of #", "window"),
    _rule(r"maximum prompt length is #", "window"),
    _rule(r"tokens in the prompt cannot exceed #", "window"),
    _rule(r"`max_new_tokens` must be <= #", "window"),
    _rule(r"context (?:length|window|size)(?: limit)?(?: is| of|:)?(?: only)? \(?#", "window"),
)
_ASKED: Final = (
    _rule(r"passed # input tokens and requested # output tokens", "input", "output"),
    _rule(r"given: # `inputs` tokens and # `max_new_tokens`", "input", "output"),
    _rule(r"resulted in # tokens", "asked"),
    _rule(r"requested (?:about |a total of )?# tokens", "asked"),
    _rule(r"input token count \(#\)", "asked"),
    _rule(r"prompt contains # tokens", "asked"),
    _rule(r"prompt \(length #\)", "asked"),
    _rule(r"\binput \(# tokens\)", "asked"),
    _rule(r"request contains # tokens", "asked"),
    _rule(r"request \(# tokens\)", "asked"),
    _rule(r"your request has # input tokens", "input"),
    _rule(r"cannot exceed # - received #", "window", "asked"),
)
_OUTPUT: Final = (
    _rule(r"# (?:tokens )?(?:in|for) the (?:completion|output)", "output"),
    _rule(r"`?max_(?:completion_)?tokens`?'? is too large: #", "output"),
)
_SAID: Final = re.compile(
    r"maximum context length"
    r"|context length is only"
    r"|longer than the model's context length"
    r"|exceeds? (?:the |this model's |the model's )?(?:available )?context (?:window|length|size|limit)"
    r"|exceed context limit"
    r"|(?:prompt|input) is too long"
    r"|input token count .{0,24}exceeds the maximum"
    r"|longer than the maximum model length"
    r"|maximum prompt length is"
    r"|please reduce the length of the (?:messages|prompt|input)"
    r"|too many tokens: total number of tokens in the prompt"
    r"|`inputs` tokens \+ `max_new_tokens` must be"
)
_OUTPUT_PARAMETERS: Final = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens"})


def says_too_long(text: str, param: object) -> bool:
    """Whether an error's text says so. `param` is the parameter that the error blames: where that is the length of the
    reply, the prompt is to blame only if its tokens are told as well."""
    text = _plain(text)
    if _SAID.search(text) is None:
        return False
    return param not in _OUTPUT_PARAMETERS or "input" in _first(text, _ASKED) or "asked" in _first(text, _ASKED)


def figures_in(text: str) -> TooLong:
    """The numbers in such a text."""
    text = _plain(text)
    found = _first(text, _OUTPUT) | _first(text, _ASKED) | _first(text, _WINDOW)
    output, asked = found.get("output"), found.get("asked")
    if "input" in found:
        asked = found["input"] + (output or 0)
    if asked is None or (output is not None and output > asked):
        output = None
    return TooLong(found.get("window"), asked, output)


def _plain(text: str) -> str:
    return text[:_LONGEST_TEXT].lower().replace("\u2019", "'")


def _first(text: str, rules: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]) -> dict[str, int]:
    for pattern, parts in rules:
        match = pattern.search(text)
        if match is not None:
            numbers = (int(re.sub(r"\D", "", number)) for number in match.groups())
            return dict(zip(parts, numbers, strict=True))
    return {}
