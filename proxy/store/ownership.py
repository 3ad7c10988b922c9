"""Whose the objects are that providers keep (responses, conversations): the port, and what it speaks in.

Providers keep them by account, and tenants share an account. So whoever made an object is remembered here, and where it
lives, for as long as OpenAI keeps a response. The first claim wins: no later one of another tenant changes anything.

An id is a provider's text, of which nothing is known. Stores use its digest alone, so that no id, whatever it holds,
can form the key of anything else or take more room than another.
"""

from __future__ import annotations

import hashlib
from typing import Final, Protocol

import msgspec

KEPT_MS: Final = 30 * 24 * 3_600_000
"""From the last claim on."""
MOST_ID_CHARS: Final = 512
"""A longer id is nobody's: it is neither claimed nor looked up."""


class Owner(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """`tenant` made the object, at `provider`. All four are names of this gateway's configuration, but for `model`."""

    tenant: str
    provider: str
    model: str = ""
    """The provider's name of the model; empty where the object has none."""
    asked: str = ""
    """The name that the client used for it."""


class Ownership(Protocol):
    """Both verbs raise StoreUnavailable of `store.base`."""

    async def claim(self, object_id: str, owner: Owner) -> Owner:
        """Whose the object is from now on: `owner`, unless another tenant claimed it before. Repeating it is safe."""

    async def owner(self, object_id: str) -> Owner | None:
        """None: nobody has claimed it, or not within `KEPT_MS`."""


def digest_of(object_id: str) -> bytes:
    """32 bytes that stand for the id."""
    return hashlib.sha256(object_id.encode("utf-8", "surrogatepass")).digest()
