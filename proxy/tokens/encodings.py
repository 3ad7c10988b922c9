"""Which encoding a model's text is counted in. Pure.

Prefixes, so that next month's version needs no release of ours; the longest one wins. What is unknown, other vendors'
models among them, is counted as `o200k_base`: close for English and code, and the only guess there is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

DEFAULT: Final = "o200k_base"

_PREFIXES: Final = {
    "gpt-oss": "o200k_harmony",
    "gpt-4": "cl100k_base",
    "gpt-4o": "o200k_base",
    "gpt-4.": "o200k_base",  # 4.1, 4.5
    "gpt-3.5": "cl100k_base",
    "gpt-35": "cl100k_base",  # Azure's spelling
    "text-embedding-ada-002": "cl100k_base",
    "text-embedding-3-": "cl100k_base",
    "davinci-002": "cl100k_base",
    "babbage-002": "cl100k_base",
}
_BY_LENGTH: Final = tuple(sorted(_PREFIXES.items(), key=lambda item: -len(item[0])))


@lru_cache(1024)
def encoding_of(model: str) -> str:
    """The name of an encoding, never an error: `encoding_of("openai/gpt-4-32k")` is `"cl100k_base"`.

    Of `vendor/model` the last part counts; of a fine-tuned model (`ft:gpt-4o:org::id`) its base model.
    """
    name = model[:256].rpartition("/")[2].lower()
    if name.startswith("ft:"):
        name = name[3:]
    for prefix, encoding in _BY_LENGTH:
        if name.startswith(prefix):
            return encoding
    return DEFAULT
