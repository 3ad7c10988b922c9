"""Where a conversation is cut. Pure: a replay over the whole array, so that the same array is always cut the same."""

from __future__ import annotations

import msgspec


class Cut(msgspec.Struct, frozen=True, gc=False):
    """What is removed. Token counts are raw counts, and those of the whole prompt."""

    stages: tuple[tuple[int, ...], ...]
    """For each time that the cut moved: the positions of the atoms that were removed then, ascending."""
    masked: tuple[int, ...]
    """Positions of the messages whose content is masked, ascending; none of them is in a removed atom."""
    before: int
    after: int
    """What is left, the note in place of what was removed included."""
    pinned: int
    """What must stay whatever happens, the newest atom included."""
    newest: int
    """Of that, the newest atom."""
    fits: bool
    """`after` is within the limit."""
