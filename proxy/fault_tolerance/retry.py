"""What comes after a failed attempt: the same target again, the next one, or the end. Pure.

    the client's own fault, not replayable, or out of attempts, calls or time    the end
    another credential of the same provider is ready                             the same target, at once
    a target that was not tried yet                                              that one, at once
    one that may be tried again                                                  that one, after a wait
    else                                                                         the end

So a healthy target never waits, and a wait is only ever for a place that has failed already. Of those, the one that
may be asked first is asked first; how long the wait is, is in `backoff`. What may be tried again where is said by the
attributes of the error (`errors.UpstreamError`), and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy.errors import UpstreamError
from proxy.fault_tolerance import backoff
from proxy.types import Target

OPEN: Final = "circuit_open"
"""Why a target was not tried."""


CLOCK_SLACK: Final = 0.002
"""Seconds by which the loop's timers, which know milliseconds only, may come before their time."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Delays are seconds; see `settings.RetrySettings`."""

    max_attempts: int = 4
    base_delay: float = 1.0
    max_delay: float = 30.0
    jitter: bool = True
    on_timeout: bool = False


class Bounds:
    """What one client request may take altogether, its repairs and other children included."""

    __slots__ = ("calls", "deadline", "whole")

    def __init__(self, deadline: float, calls: int, whole: float = 0.0) -> None:
        self.deadline = deadline
        """On the loop's clock: plain replies end before it, streams begin before it."""
        self.calls = calls
        """Calls to providers that are left."""
        self.whole = whole
        """Seconds from the beginning to the deadline, where that is the configuration's own; 0: the client's."""

    def over(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return now >= self.deadline - CLOCK_SLACK

    def cut_short(self, now: float, seconds: float) -> bool:
        """Whether the deadline ended an attempt of so many `seconds`, which says nothing of the provider then. One that
        had most of the time that the operator gives to a whole request was not cut short: it did not answer."""
        return self.over(now) and not (self.whole and seconds >= self.whole / 2)


class Step(NamedTuple):
    """The next attempt: the position of its target, the seconds before it, and whether it draws on the retry budget
    of its provider."""

    position: int
    wait: float = 0.0
    draws: bool = False


class Standing:
    """What is known of one target."""

    __slots__ = ("asked", "at", "error", "failures", "out", "skipped")

    def __init__(self) -> None:
        self.failures = 0
        self.error: UpstreamError | None = None
        """Of its last attempt."""
        self.skipped = ""
        """Why it was not tried the last time."""
        self.at = 0.0
        self.asked: float | None = None
        """Seconds from `at` in which it wants to be left alone."""
        self.out = False
        """It is not tried any more."""


class Course:
    """One client request's way over its targets. `random` is uniform in [0, 1); times are the loop's seconds.

    Made when something has gone wrong for the first time: a request that is served at once needs none.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        targets: Sequence[Target],
        bounds: Bounds,
        random: Callable[[], float],
        *,
        replayable: bool,
    ) -> None:
        """`replayable`: serving the request twice has no effect beyond its price."""
        self.standings = [Standing() for _ in targets]
        self._policy = policy
        self._targets = targets
        self._bounds = bounds
        self._random = random
        self._replayable = replayable
        self._fresh = 1
        """The first target that was not looked at yet."""
        self._attempts = 0
        self._waits = 0
        self._ended = False
        self._at_once: int | None = None

    def failed(self, position: int, error: UpstreamError, now: float) -> None:
        """An attempt at a target failed, before anything of its answer was forwarded."""
        standing = self.standings[position]
        self._attempts += 1
        standing.failures += 1
        standing.error, standing.skipped, standing.at, standing.asked = error, "", now, error.asked
        standing.out = not self._may_return(error)
        self._ended = not error.failover or (error.sent and not self._replayable)
        self._at_once = position if error.other_key else None

    def skipped(self, position: int, reason: str, now: float, seconds: float | None = None) -> None:
        """A target was not tried. `seconds`: after which it may be; None: not for this request."""
        standing = self.standings[position]
        standing.skipped, standing.at, standing.asked = reason, now, seconds
        standing.out = seconds is None

    def denied(self, position: int) -> None:
        """The retry budget does not cover a step."""
        self.standings[position].out = True

    def next(self, now: float) -> Step | None:
        """The next attempt; None: there is none."""
        at_once, self._at_once = self._at_once, None
        if self._spent(now):
            return None
        if at_once is not None:
            return Step(at_once)
        if self._fresh < len(self._targets):
            position = self._fresh
            self._fresh += 1
            return Step(position, draws=self._draws(position))
        return self._return(now)

    def open_positions(self, now: float) -> list[int]:
        """Targets whose circuits were open, where an attempt is still possible: one of them may be worth a probe."""
        if self._spent(now):
            return []
        return [position for position, one in enumerate(self.standings) if one.skipped == OPEN]

    @property
    def is_exhausted(self) -> bool:
        """Every target has failed this request, or its circuit is open."""
        return all(one.skipped == OPEN or (one.error is not None and not one.skipped) for one in self.standings)

    def _spent(self, now: float) -> bool:
        attempts = self._attempts >= self._policy.max_attempts
        return self._ended or attempts or self._bounds.calls <= 0 or self._bounds.over(now)

    def _may_return(self, error: UpstreamError) -> bool:
        return error.retryable or (error.timed_out and self._policy.on_timeout)

    def _return(self, now: float) -> Step | None:
        """To a target that was tried before, or that had to be left alone for a while."""
        left = self._bounds.deadline - now
        found: tuple[float, int, int] | None = None
        for position, standing in enumerate(self.standings):
            if standing.out:
                continue
            asked = standing.asked
            if asked is not None and not backoff.fits(asked, self._policy.max_delay, left):
                continue
            due = 0.0 if asked is None else max(standing.at + asked - now, 0.0)
            if found is None or (due, standing.failures, position) < found:
                found = (due, standing.failures, position)
        # A target that rests again after each wait must not keep a request for ever.
        if found is None or self._waits >= self._policy.max_attempts:
            return None
        wait = self._wait(self.standings[found[2]], found[0])
        if wait >= left:
            return None
        self._waits += 1
        return Step(found[2], wait, self._draws(found[2]))

    def _wait(self, standing: Standing, due: float) -> float:
        policy = self._policy
        if standing.asked is None:
            tried = max(standing.failures - 1, 0)
            return backoff.delay(tried, policy.base_delay, policy.max_delay, self._random, jitter=policy.jitter)
        return backoff.wait(due, policy.base_delay, self._random) if policy.jitter else due

    def _draws(self, position: int) -> bool:
        """Whether the provider of a target has failed this request in a way that more load makes worse."""
        provider = self._targets[position].provider
        return any(
            standing.error is not None and _burdens(standing.error) and self._targets[other].provider == provider
            for other, standing in enumerate(self.standings)
        )


def _burdens(error: UpstreamError) -> bool:
    """A connect error, a 5xx, a timeout; and a 429 that does not say when to come back. A credential is no burden."""
    return error.cools is None or (error.cools == "rate" and error.asked is None)
