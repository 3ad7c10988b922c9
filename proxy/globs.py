"""One kind of pattern, for model names and paths: `*` is anything, also nothing and slashes; all else is itself."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(maxsize=4096)
def compiled(glob: str) -> re.Pattern[str]:
    """A pattern for `fullmatch`. Its first group is what the first `*` stands for."""
    first, star, rest = glob.partition("*")
    if not star:
        return re.compile(re.escape(glob), re.DOTALL)
    return re.compile(re.escape(first) + "(.*)" + re.escape(rest).replace(r"\*", ".*"), re.DOTALL)


def matches(glob: str, text: str) -> bool:
    return compiled(glob).fullmatch(text) is not None
