"""The fleet's record of one circuit: who says what, who has the probe, and when it is next due. Pure.

The same table as a process's circuit. Half open is an open record with a live lease. `circuits.lua` does the same in
Redis, step by step: what changes here changes there, and `tests/conformance` runs both side by side.

`now` is the store's clock in milliseconds. Numbers and generations are readings of it, or one more than the last: so
they rise even over a store that lost everything.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from proxy.fault_tolerance.base import (
    EARLY_MS,
    KEPT_MS,
    Action,
    Granted,
    Outcome,
    Place,
    View,
    Vote,
)
from proxy.fault_tolerance.breaker import FLAPS_SECONDS, Happening, State, after, grown

STEPS_MS: Final = 1000


class Record:
    """Begins closed, as of `generation`."""

    __slots__ = (
        "by_hand",
        "changed",
        "closed_at",
        "due",
        "generation",
        "last_probe",
        "number",
        "owner",
        "place",
        "probe_generation",
        "probe_until",
        "reopened",
        "state",
        "votes",
        "why",
    )

    def __init__(self, place: Place, generation: int) -> None:
        self.place = place
        self.generation = generation
        self.state: State = "closed"
        self.changed = 0
        self.due = 0
        self.reopened = 0
        self.closed_at = -1
        """-1: never, or by a reset."""
        self.by_hand = False
        self.why: dict[str, str] = {}
        self.votes: dict[str, str] = {}
        self.owner = ""
        self.number = 0
        self.probe_until = 0
        self.probe_generation = 0
        self.last_probe = 0

    # -- votes -------------------------------------------------------------------------------------------------------

    def restore(self, vote: Vote, process: str, now: int) -> None:
        """What a process remembers of a record that the store lost."""
        self.by_hand = vote.restores == "hand"
        self._move("open" if self.by_hand else "vote", now)
        self.generation = vote.generation  # not news: who remembers it need not hear it again
        self.due = now + vote.open_ms
        self.why = {process: vote.why}

    def vote(self, process: str, vote: Vote | None, live: Container[str], quorum: int, now: int) -> None:
        """What `process` says; None: nothing, any more. Votes of processes that do not live any more count no more."""
        before = dict(self.votes)
        if vote is not None:
            self._catch_up(vote.generation)
        self.votes = {who: why for who, why in self.votes.items() if who in live and who != process}
        if vote is not None and vote.generation == self.generation and self.state == "closed":
            self.votes[process] = vote.why
            if len(self.votes) >= quorum:
                recent = self.closed_at >= 0 and now - self.closed_at < FLAPS_SECONDS * 1000
                self.reopened = self.reopened + 1 if recent else 0
                self.due = now + grown(vote.open_ms, self.reopened)
                self.why, self.votes = self.votes, {}
                self._move("vote", now)
        if self.votes != before:
            self.changed = now

    # -- the probe ---------------------------------------------------------------------------------------------------

    def lease(self, process: str, generation: int, lease_ms: int, now: int, *, early: bool) -> Granted | None:
        """The probe, if nobody has it, it is due, and the process knows the record as it is."""
        self.expire(now)
        self._catch_up(generation)
        # Asked again by its owner: the answer was lost, or the news of its end is still on the way, and comes too late
        # for a number that is new.
        mine = self.owner == process
        if (self.owner and not mine) or self.by_hand or generation != self.generation:
            return None
        if (now < self.last_probe + EARLY_MS and not mine) if early else self.state == "open" and now < self.due:
            return None
        self.owner, self.number = process, max(self.number + 1, now)
        self.probe_until, self.probe_generation, self.last_probe = now + lease_ms, self.generation, now
        self._step("granted", now)
        return Granted(self.number)

    def renew(self, process: str, number: int, lease_ms: int, now: int) -> bool:
        if self.owner != process or self.number != number:
            return False
        self.probe_until = now + lease_ms
        return True

    def conclude(self, process: str, number: int, outcome: Outcome, open_ms: int, generation: int, now: int) -> None:
        if number == 0:
            if outcome == "success" and generation == self.generation and self.state != "closed" and not self.by_hand:
                self._close(now)
            return
        if self.owner != process or self.number != number:
            return  # it was somebody else's by then
        self.owner, self.changed = "", now
        if self.probe_generation != self.generation or self.state == "closed":
            return  # sent to a provider in another state; or about a process's own circuit alone
        if outcome == "success":
            self._close(now)
        elif outcome == "failure" and now >= self.due:
            self.reopened += 1
            self.due = now + grown(open_ms, self.reopened)
            self._step("failure", now)
        else:  # given back, or before its time: the next is due when it was
            self._step("lost", now)

    def expire(self, now: int) -> None:
        if now < self.changed - STEPS_MS:
            # The store's clock went back: what was to last for seconds must not last for as long as it went back.
            self.probe_until = self.due = self.last_probe = 0
            self.changed = now
        if self.owner and now >= self.probe_until:
            self.owner = ""
            self._step("time", now)

    # -- operators ---------------------------------------------------------------------------------------------------

    def command(self, action: Action, who: str, now: int) -> None:
        opened = action == "open"
        self.votes = {}
        self.why = {who: "by hand"}
        self.due, self.reopened, self.closed_at = now, 0, -1
        self._move(action, now)
        self.by_hand = opened

    def _catch_up(self, generation: int) -> None:
        """The store lost the record, and somebody who knew less than this process began it anew."""
        if self.state == "closed" and generation > self.generation:
            self.generation = generation

    # -- the rest ----------------------------------------------------------------------------------------------------

    def concerns(self, since: int) -> bool:
        """Whether a process that last looked at `since` must hear of it."""
        return self.changed >= since or self.state != "closed" or bool(self.votes or self.owner)

    def idle(self, now: int) -> bool:
        return self.state == "closed" and not self.votes and not self.owner and now - self.changed > KEPT_MS

    def view(self, now: int) -> View:
        return View(
            self.place,
            self.state != "closed",
            self.generation,
            self.due - now,
            self.reopened,
            self.by_hand,
            tuple(sorted(self.why.items())),
            tuple(sorted(self.votes.items())),
            self.owner,
            self.probe_until - now if self.owner else 0,
        )

    def _close(self, now: int) -> None:
        self._move("success" if self.state == "half_open" else "healed", now)
        self.votes, self.why, self.closed_at = {}, {}, now

    def _move(self, happening: Happening, now: int) -> None:
        """A change that every process hears of."""
        self.generation = max(self.generation + 1, now)
        self._step(happening, now)

    def _step(self, happening: Happening, now: int) -> None:
        self.state = after(self.state, happening)
        self.changed = now
