"""What comes between counting a prompt and answering it: the window of its model, and the prompt cache."""

from __future__ import annotations

import re
from typing import Final

from proxy.providers.mock.ask import Prompt
from proxy.providers.mock.refusal import invalid
from proxy.providers.mock.text import Count

_WINDOW: Final = re.compile(r"window-(\d{1,9})")


def admit(prompt: Prompt, count: Count, param: str) -> None:
    """`param` is the member that holds the prompt. Raises Refusal for a prompt beyond the window of `window-N`; notes
    how much of it is cached. The last thing before the answer: what is refused was never sent as far as a cache knows.
    """
    window = _WINDOW.fullmatch(prompt.name)
    if window and prompt.prompt_tokens > int(window[1]):
        message = (
            f"This model's maximum context length is {window[1]} tokens. However, your messages resulted in "
            f"{prompt.prompt_tokens} tokens. Please reduce the length of the messages."
        )
        raise invalid(message, param, "context_length_exceeded")
    if prompt.prefixes is not None:
        prompt.cached_tokens = prompt.prefixes.cached(prompt.owner, prompt.units, count)
