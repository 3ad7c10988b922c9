"""How large the input of a request is, counted with the vocabulary of its target."""

from __future__ import annotations

from typing import Final

from proxy.budget.plan import Want
from proxy.tokens.bound import most_of, most_with
from proxy.tokens.count import Counter
from proxy.tokens.encodings import encoding_of
from proxy.types import Target

BYTES_PER_TOKEN: Final = 4
"""Fewer bytes than this make no token: good enough to watch by, and to know when to measure."""


async def count(counter: Counter, want: Want, target: Target) -> None:
    """Counts the input of what `target` is sent. Raises ContextExceeded."""
    ask = want.ask
    if want.view is not None and want.view.needed:
        sent = await want.view.size(target)
        if sent.tokens:
            want.input_tokens, want.input_bound, want.counted = sent.tokens, sent.most, True
            return
        ask = sent.ask
    elif want.counted:
        return
    if not ask.fields:
        return
    measured = await counter.measure(ask.dialect, ask.fields, encoding_of(target.model), target.model)
    want.input_tokens = measured.total
    want.input_bound = max(most_with(ask.dialect, ask.fields, measured.media), measured.total)
    want.counted = True


def bounded(want: Want, within: int | None) -> bool:
    """Takes a proven bound for the input, if it is `within` so many tokens and nothing has been counted. False: there
    is none, or it is larger."""
    view = want.view
    if want.counted or not want.ask.fields or (view is not None and view.needed):
        return False
    most = None if view is None else view.most
    if most is None:
        most = most_of(want.ask.dialect, want.ask.fields, within)
    if most is None or (within is not None and most > within):
        return False
    want.input_tokens = want.input_bound = most
    return True
