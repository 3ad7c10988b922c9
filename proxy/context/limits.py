"""How many tokens of a prompt one target gets. Pure.

    limit = min(context.max_tokens, window - output - margin, tokens_per_minute - output * choices)

`output` is the request's own maximum, for each of its choices. One that leaves no room at all is wrong by itself, and
the provider says so: it is left out. What nobody knows is no limit.
"""

from __future__ import annotations

from typing import Final

from proxy.types import TooLong

MARGIN_PERCENT: Final = 1
"""Of the window: counts are ours, and the provider's differ a little."""
_AGAIN_PERCENT: Final = 98
"""Of what a provider has room for by its own figures."""
_STEPS: Final = 20
_BLIND_PERCENT: Final = 90
"""Of what was refused, where it gives no figures."""


def limit_of(
    max_tokens: int | None, window: int | None, tokens_per_minute: int | None, output: int, choices: int = 1
) -> int | None:
    """Tokens of the prompt; None: no limit. `tokens_per_minute`: the smallest that is enforced on the caller."""
    least = max_tokens
    if window is not None:
        room = _less(window - margin(window), output)
        least = room if least is None or room < least else least
    if tokens_per_minute is not None:
        room = _less(tokens_per_minute, output * choices)
        least = room if least is None or room < least else least
    return least


def margin(window: int) -> int:
    return -(-window * MARGIN_PERCENT // 100)


def _less(room: int, output: int) -> int:
    return max(room - output if output < room else room, 1)


def believed(window: int, sent: int, refusal: TooLong, output: int) -> int:
    """The window to go by after a refusal that names it, in our own count, of which `sent` tokens were refused.

    Where the provider counts more than we do, it will do so again: less of the window is ours then. In steps of a
    twentieth, because each change moves the cuts of every conversation; and never less than half, which would be
    another kind of difference.
    """
    theirs = 0 if refusal.asked is None else refusal.asked - (output if refusal.output is None else refusal.output)
    if theirs * 100 <= sent * (100 + MARGIN_PERCENT):
        return window
    return window * max(_STEPS * sent // theirs, _STEPS // 2) // _STEPS


def corrected(sent: int, refusal: TooLong, output: int) -> int:
    """The limit for a second try, in our own count: `sent` tokens of ours were too many. Below `sent`."""
    window, asked = refusal.window, refusal.asked
    if window is None:
        found = sent * _BLIND_PERCENT // 100
    else:
        room = _less(window, output)
        theirs = sent if asked is None else max(asked - (refusal.output or 0), 1)
        # Their figure for what we counted as `sent`: what they have room for is as much less in our count.
        found = sent * room * _AGAIN_PERCENT // (max(theirs, room + 1) * 100)
    return max(min(found, sent - 1), 1)
