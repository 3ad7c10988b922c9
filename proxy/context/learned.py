"""What providers let on about their windows when they refuse. Remembered by one process, for an hour.

All of it is the tenant's alone that was refused: a refusal may quote what its client wrote, and what a provider makes
of a text depends on the text. So nobody shrinks the windows of others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.context.limits import believed
from proxy.types import Target, Tenant, TooLong

ENTRIES: Final = 1024
SECONDS: Final = 3600.0
"""Behind some names stand several servers, and they are exchanged."""
_CREDIBLE: Final = 1.5
"""Room that is smaller than what was refused by more than this tells of an odd prompt, not of the next one."""

_Place = tuple[str, str, str]


class Learned:
    """`clock` is monotonic (seconds)."""

    __slots__ = ("_clock", "_found")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: dict[_Place, tuple[int, float]] = {}
        """By tenant, provider and model: tokens of input and output together, and until when they are believed."""

    def window(self, tenant: Tenant, target: Target, known: int | None) -> int | None:
        """The window of a target in tokens, by our own count. `known`: what is written of it."""
        if not self._found:
            return known
        place = (tenant.name, target.provider, target.model)
        found = self._found.get(place)
        if found is None:
            return known
        if found[1] <= self._clock():
            del self._found[place]
            return known
        return found[0] if known is None else min(found[0], known)

    def refused(
        self,
        tenant: Tenant,
        target: Target,
        known: int | None,
        refusal: TooLong,
        *,
        sent: int = 0,
        room: int = 0,
        output: int = 0,
    ) -> None:
        """A prompt of `sent` tokens was refused (0: they tell nothing of how the provider counts texts), and `room` are
        what its second try may have. `output`: the request's own maximum."""
        window = self.window(tenant, target, known)
        named = refusal.window
        if named is not None and sent:
            named = believed(named, sent, refusal, output)
        if named is not None and (window is None or named < window):
            self._keep(tenant, target, named)
        elif sent and room * _CREDIBLE >= sent:  # it has not said how much, but certainly less
            self._keep(tenant, target, room + output)

    def _keep(self, tenant: Tenant, target: Target, tokens: int) -> None:
        place = (tenant.name, target.provider, target.model)
        self._found.pop(place, None)
        if len(self._found) >= ENTRIES:
            del self._found[next(iter(self._found))]
        self._found[place] = (tokens, self._clock() + SECONDS)
