"""How large the input of a request is, counted with the vocabulary of its target."""

from __future__ import annotations

from typing import Final

from proxy.budget.plan import Want
from proxy.tokens.count import Counter
from proxy.tokens.encodings import encoding_of
from proxy.tokens.media import media_of
from proxy.tokens.prompts import size_of
from proxy.types import Target

FRAME_TOKENS: Final = 64
"""What a provider may add around the texts of a prompt, beyond what their JSON takes in bytes."""
BYTES_PER_TOKEN: Final = 4
"""Fewer bytes than this make no token: good enough to watch by, and to know when to measure."""


async def count(counter: Counter, want: Want, target: Target) -> None:
    """Counts the input of what `target` is sent. Raises ContextExceeded."""
    ask = want.ask
    if want.view is not None and want.view.needed:
        sent = await want.view.size(target)
        if sent.tokens:
            want.input_tokens, want.input_bound = sent.tokens, sent.most + FRAME_TOKENS
            return
        ask = sent.ask
    elif want.input_bound:
        return
    if not ask.fields:
        return
    media = media_of(ask.dialect, ask.fields, target.model)
    counted = await counter.count_prompt(ask.dialect, ask.fields, encoding_of(target.model))
    want.input_tokens = counted + media.tokens
    written = max(size_of(ask.dialect, ask.fields) - media.bytes, 0)
    want.input_bound = max(written + media.tokens + FRAME_TOKENS, want.input_tokens)
