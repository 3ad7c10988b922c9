"""How targets that share the load of a model are ordered for one request. Pure, but for the counts that it keeps.

Requests that belong together (one agent run, or one `prompt_cache_key`) go to the same target as long as it serves:
its prompt cache is warm for them. All others go where the fewest are in flight. A target that drops out moves only
its own requests: each key ranks all targets by a hash of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

from proxy.types import Ask, Groups, Target


def together(ask: Ask) -> bytes:
    """What a request has in common with those that it belongs to; b"": nothing."""
    run = ask.call.header(b"x-breakwater-run-id")
    if run:
        return run
    key = ask.fields.get("prompt_cache_key")
    return b"" if key is None or (text := bytes(key)) in (b"null", b'""') else text


class Sharing:
    """One for the process. `random` is uniform in [0, 1)."""

    __slots__ = ("_in_flight", "_random")

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._in_flight: dict[tuple[str, str], int] = {}

    def order(self, groups: Groups, ask: Ask) -> Sequence[Target]:
        """All targets, in the order in which they are tried."""
        if len(groups) == 1 and len(groups[0]) == 1:
            return groups[0]
        key: bytes | None = None
        ordered: list[Target] = []
        for group in groups:
            if len(group) == 1:
                ordered.append(group[0])
                continue
            if key is None:
                key = together(ask)
            ordered += self._sticky(group, key) if key else self._least(group)
        return ordered

    def begun(self, target: Target) -> None:
        """An attempt at a target that may share."""
        place = (target.provider, target.model)
        self._in_flight[place] = self._in_flight.get(place, 0) + 1

    def ended(self, target: Target) -> None:
        place = (target.provider, target.model)
        left = self._in_flight[place] - 1
        if left:
            self._in_flight[place] = left
        else:  # under a glob clients choose the names: nothing is kept of those that are idle
            del self._in_flight[place]

    def in_flight(self, target: Target) -> int:
        return self._in_flight.get((target.provider, target.model), 0)

    def _least(self, group: Sequence[Target]) -> list[Target]:
        return sorted(group, key=lambda target: (self.in_flight(target), self._random()))

    def _sticky(self, group: Sequence[Target], key: bytes) -> list[Target]:
        return sorted(group, key=lambda target: _weight(key, target), reverse=True)


def _weight(key: bytes, target: Target) -> bytes:
    return blake2b(b"%b\0%b/%b" % (key, target.provider.encode(), target.model.encode()), digest_size=8).digest()
