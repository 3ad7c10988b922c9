"""Where a conversation is cut. Pure: a replay over the whole array, so that the same array is always cut the same.

The replay lets the conversation grow atom by atom, as it did. Whenever it is over `high`, the oldest atoms go until it
is at most `low`; then it may grow to `high` again. A client that only appends sends the same beginning every time, so
the replay makes the same cuts every time, and between two of them the prompt only grows at its end: the provider's
prefix cache stays warm, and nothing need be stored.

    tokens   high ........./|......../|......../|....
                         /  |      /  |      /  |   /
             low  ....../...|..../....|..../....|./...
                                                        atoms

So what is removed from the start of a conversation (up to any atom) is also removed from the whole of it, stage by
stage. It follows, too, that what was too large once stays removed: an atom that overflowed the limit when it was the
newest has cost all that was older, and goes next, however short the conversation is without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import msgspec

from proxy.context.atoms import Atom

KEPT_OUTPUTS: Final = 3
"""The newest outputs of tools are never masked: an agent that cannot see them calls the tools again."""


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


def trim(
    atoms: Sequence[Atom],
    each: Sequence[int],
    *,
    fixed: int,
    high: int,
    low: int,
    reserve: int,
    masks: Sequence[int] | None = None,
) -> Cut:
    """Cuts a conversation to at most `low` tokens each time that it outgrows `high`. Linear in the number of atoms.

    `atoms` as of `atoms_of`; `each` the tokens of each message; `fixed` those of all else in the prompt; `reserve`
    those of the note, which count from the first removal on, so that what fits without one is let be. `masks` are the
    tokens that masking each message saves (0: it cannot be masked), or None to mask nothing. All counts are of one
    prompt, in tokens, not negative; `low` is at most `high`.

    At a crossing outputs of tools are masked first, oldest first, but neither one of the newest three, nor what lies
    within the newest `low / 2` tokens (of what the client sent), nor in the newest atom, nor in a pinned one. Then
    atoms are dropped, oldest first, but neither pinned ones, nor the first or the latest of the user's, nor the newest.

    `fits` speaks of the end only. An atom that was too large when it was the newest is no refusal later: then it can
    go. The request that ended with it was refused; those before and after it are cut alike all the same.
    """
    replay = _Replay(atoms, each, low=low, reserve=reserve, masks=masks)
    costs = replay.costs
    replay.total = fixed
    for n, atom in enumerate(atoms):
        replay.total += costs[n]
        if atom.user:
            replay.last_user = n
            if replay.first_user < 0:
                replay.first_user = n
        if masks is not None:
            replay.outputs += [(n, at) for at in atom.outputs]
        if replay.total > high:
            if masks is not None:
                replay.mask(n, masks)
            replay.drop(n)
    return replay.cut(fixed, sum(each), high)


class _Replay:
    """Of one conversation, up to the atom `n` that was last added."""

    __slots__ = (
        "atoms", "costs", "cursor", "dropped", "first_user", "last_user", "low", "masked", "next_output", "outputs",
        "passed", "reserve", "stages", "sums", "total",
    )  # fmt: skip

    def __init__(
        self, atoms: Sequence[Atom], each: Sequence[int], *, low: int, reserve: int, masks: Sequence[int] | None
    ) -> None:
        self.atoms = atoms
        self.low = low
        self.reserve = reserve
        self.costs = [
            each[atom.start] if atom.end - atom.start == 1 else sum(each[atom.start : atom.end]) for atom in atoms
        ]
        """Tokens of each atom, less what is masked in it."""
        self.total = 0
        self.first_user = self.last_user = -1
        self.cursor = 0
        """All atoms before it are gone for good, or stay for good, or are `passed`."""
        self.passed = -1
        """The user's latest atom when the cursor came by; there is never a second one to wait for."""
        self.dropped = [False] * len(atoms)
        self.stages: list[tuple[int, ...]] = []
        self.outputs: list[tuple[int, int]] = []
        """(atom, position) of the outputs of tools so far."""
        self.next_output = 0
        self.masked: list[tuple[int, int]] = []
        self.sums = list(accumulate(each, initial=0)) if masks is not None else []
        """Tokens of all messages before each position."""

    def mask(self, n: int, masks: Sequence[int]) -> None:
        candidates = len(self.outputs) - KEPT_OUTPUTS
        edge = self.sums[self.atoms[n].end] - self.low // 2
        while self.total > self.low and self.next_output < candidates:
            k, at = self.outputs[self.next_output]
            if k == n or self.sums[at + 1] > edge:
                return
            self.next_output += 1
            if masks[at] > 0 and not self.dropped[k] and not self.atoms[k].pinned:
                self.masked.append((k, at))
                self.costs[k] -= masks[at]
                self.total -= masks[at]

    def drop(self, n: int) -> None:
        gone: list[int] = []
        if self.total > self.low and self.passed not in (-1, self.last_user):
            self._remove(self.passed, gone)
            self.passed = -1
        while self.total > self.low and self.cursor < n:
            k = self.cursor
            self.cursor += 1
            if k == self.last_user and k != self.first_user and not self.atoms[k].pinned:
                self.passed = k
            elif k != self.first_user and not self.atoms[k].pinned:
                self._remove(k, gone)
        if gone:
            self.stages.append(tuple(gone))

    def _remove(self, k: int, gone: list[int]) -> None:
        if not self.stages and not gone:
            self.total += self.reserve
        self.total -= self.costs[k]
        self.dropped[k] = True
        gone.append(k)

    def cut(self, fixed: int, messages: int, high: int) -> Cut:
        staying = {self.first_user, self.last_user, len(self.atoms) - 1} - {-1}
        pinned = fixed + sum(self.costs[k] for k, atom in enumerate(self.atoms) if atom.pinned or k in staying)
        return Cut(
            stages=tuple(self.stages),
            masked=tuple(at for k, at in self.masked if not self.dropped[k]),
            before=fixed + messages,
            after=self.total,
            pinned=pinned + (self.reserve if self.stages else 0),
            newest=self.costs[-1] if self.costs else 0,
            fits=self.total <= high,
        )
