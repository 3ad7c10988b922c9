"""What one process has seen of one target lately: failures in a row, and their part of the last ten seconds. Pure.

Each failure is of one of two origins. *Local* ones (name resolution, connecting, TLS) may be this process's own
trouble: they count for its own circuit, and never as a vote in the fleet.
"""

from __future__ import annotations

from typing import Final

BUCKETS: Final = 10
"""Of one second each."""
MIN_ATTEMPTS: Final = 20
"""Fewer attempts in the window have no failure rate."""
_TOTAL, _FAILED, _SHARED = 0, 1, 2


class Evidence:
    """`now` is monotonic, in seconds. `threshold`: failures in a row that are enough."""

    __slots__ = ("_counts", "_second", "_sums", "_threshold", "row", "shared_row")

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self.row = 0
        """Failures in a row, of whatever origin."""
        self.shared_row = 0
        """Those of them that are not of local origin."""
        self._second = 0
        self._counts = [[0, 0, 0] for _ in range(BUCKETS)]
        self._sums = [0, 0, 0]

    def clear(self) -> None:
        self.__init__(self._threshold)  # type: ignore[misc]  # begins anew, under the same threshold

    def success(self, now: float) -> None:
        self.row = self.shared_row = 0
        second = int(now)
        if second != self._second:
            self._turn(second)
        self._counts[second % BUCKETS][_TOTAL] += 1
        self._sums[_TOTAL] += 1

    def failure(self, now: float, *, local: bool) -> bool:
        """Notes a failure. True where it is one too many."""
        second = int(now)
        if second != self._second:
            self._turn(second)
        counts, sums = self._counts[second % BUCKETS], self._sums
        kinds = (_TOTAL, _FAILED) if local else (_TOTAL, _FAILED, _SHARED)
        for kind in kinds:
            counts[kind] += 1
            sums[kind] += 1
        self.row += 1
        if not local:
            self.shared_row += 1
        return self.row >= self._threshold or self._too_many(_FAILED)

    @property
    def counts_for_the_fleet(self) -> bool:
        """What is not of local origin would have been enough alone."""
        return self.shared_row >= self._threshold or self._too_many(_SHARED)

    def rate(self, now: float) -> tuple[int, int]:
        """Attempts of the last ten seconds, and those of them that failed."""
        if int(now) != self._second:
            self._turn(int(now))
        return self._sums[_TOTAL], self._sums[_FAILED]

    def _too_many(self, kind: int) -> bool:
        return self._sums[_TOTAL] >= MIN_ATTEMPTS and 2 * self._sums[kind] >= self._sums[_TOTAL]

    def _turn(self, second: int) -> None:
        """Empties the buckets that are older than the window."""
        if second < self._second:
            return  # a clock that stepped back: what it says belongs to the newest bucket soon enough
        for passed in range(self._second + 1, min(second, self._second + BUCKETS) + 1):
            counts = self._counts[passed % BUCKETS]
            for kind in (_TOTAL, _FAILED, _SHARED):
                self._sums[kind] -= counts[kind]
                counts[kind] = 0
        self._second = second
