"""The most tokens that a prompt can count, out of sizes in bytes alone. Pure.

No text has more tokens than bytes in UTF-8, and JSON writes no text in fewer bytes than it has. What is counted beside
texts has to be paid by the bytes around them, construct by construct (`walks`, `tools`):

    a message         3 tokens: its braces and the comma behind it; texts, names and calls pay with their keys
    a definition      at most 9 tokens beside its texts: `"name":""` and its comma
    a property        `: any`, its line end and its indent: quotes, colon and comma, but up to 5 tokens more
    an option         ` | any`, ` | 1`, ` | 1000000000000000.0`: at worst 5 tokens more than `1e15,` has bytes
    frames            the reply's opening, a bare string's role, the headings of tools and of a schema: constants

So each comma in the definitions of tools is worth a few tokens more than itself. What has no bytes to speak of are
media: a link of 40 bytes is a thousand tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from proxy.tokens.media import NONE, Media, standing_in
from proxy.tokens.prompts import size_of
from proxy.tokens.walks import Raw
from proxy.types import Dialect

FRAME_TOKENS: Final = 64
"""What stands around the texts of a prompt, beyond what their JSON takes in bytes."""
COMMA_TOKENS: Final = 6
"""What a comma in the definitions of tools can stand for, beside itself."""
_DEFINITIONS: Final = ("tools", "functions")


def most_of(dialect: Dialect, fields: Mapping[str, Raw], within: int | None = None) -> int | None:
    """At least what `Counter.measure` finds, whatever the model: `fixed + sum(each)`, and `total`, too.

    None where bytes say nothing: media may stand in the prompt, or there is none in this dialect. Also, without a look
    at anything else, when the bound exceeds `within`. Takes about 3 us, and 0.7 us for each KiB that is within it, or
    2 us where tools are called.
    """
    if dialect in ("models", "passthrough"):
        return None
    most = most_with(dialect, fields, NONE)
    if (within is not None and most > within) or standing_in(dialect, fields):
        return None
    return most


def most_with(dialect: Dialect, fields: Mapping[str, Raw], media: Media) -> int:
    """The same where it is known what media stand in the prompt: `Measured.media`."""
    texts = size_of(dialect, fields) - media.bytes
    if dialect in ("chat", "responses"):
        for name in _DEFINITIONS:
            if name in fields:
                texts += COMMA_TOKENS * bytes(fields[name]).count(b",")
    return texts + media.tokens + FRAME_TOKENS
