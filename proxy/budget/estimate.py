"""How much a request will take, before it is sent. Pure, and the same for the same replies in the same order.

Input is counted. Output is unknown, so two figures stand for it: the *expected* output, the 95th percentile of what
this tenant's replies from this model took, and the *most* a reply can have. Their difference is what is *at risk* while
the request runs. `adaptive` reserves the expected output as long as the sum at risk fits under the limit, and the most
as soon as it does not: so many parallel surprises cannot overspend by more than the bound (see `Exposure`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final

import msgspec

SAMPLES: Final = 20
"""Replies that must be known before their percentile is believed."""
FIRST_GUESS: Final = 1024
"""Output tokens expected of a model that nobody knows yet."""
DEFAULT_MOST: Final = 4096
"""Output tokens that a reply can have where neither the client nor the configuration says."""

PAIRS: Final = 1024
"""(tenant, model) pairs that are remembered; the one that was silent longest goes first."""
FORGET_AT: Final = 1000
"""Samples in a sketch at which all its counts are halved: so it follows a change of habit, and stays small."""

_EXACT: Final = 64
_HALF: Final = 32
_LARGEST: Final = 2**31 - 1


def bucket_of(value: int) -> int:
    """The bucket of a count: exact up to 63, then 32 buckets for each doubling."""
    if value < _EXACT:
        return value
    shift = value.bit_length() - 6
    return shift * _HALF + (value >> shift)


def top_of(bucket: int) -> int:
    """The largest count in a bucket: at most 1/32 above any other in it."""
    if bucket < _EXACT:
        return bucket
    shift = (bucket - _HALF) // _HALF
    return ((bucket - shift * _HALF + 1) << shift) - 1


_BUCKETS: Final = bucket_of(_LARGEST) + 1


class Sketch:
    """The 95th percentile of a stream of counts, never below the true one and at most 1/32 above it.

    (Of the last 500 to 1000 counts, older ones weighing less.) Fixed size, about 2 KB; adding one moves a pointer by a
    few buckets.
    """

    __slots__ = ("_above", "_at", "_counts", "samples")

    def __init__(self) -> None:
        self._counts = array("H", bytes(2 * _BUCKETS))
        self._at = 0
        self._above = 0
        """Samples in buckets beyond `_at`."""
        self.samples = 0

    def add(self, value: int) -> None:
        bucket = bucket_of(min(max(value, 0), _LARGEST))
        self._counts[bucket] += 1
        self.samples += 1
        if bucket > self._at:
            self._above += 1
        if self.samples >= FORGET_AT:
            self._halve()
        self._settle()

    def p95(self) -> int:
        """The smallest count, rounded up to the end of its bucket, that at least 95 % of the samples do not exceed."""
        return top_of(self._at)

    def _settle(self) -> None:
        beyond = self.samples // 20
        while self._above > beyond:
            self._at += 1
            self._above -= self._counts[self._at]
        while self._at and self._above + self._counts[self._at] <= beyond:
            self._above += self._counts[self._at]
            self._at -= 1

    def _halve(self) -> None:
        # What is odd is carried down to the next bucket: so rare large replies are neither forgotten nor kept for ever.
        carry = 0
        for bucket in range(_BUCKETS - 1, -1, -1):
            count = self._counts[bucket] + carry
            self._counts[bucket] = count >> 1
            carry = count & 1
        self.samples = sum(self._counts)
        self._above = sum(self._counts[self._at + 1 :])


class Expectations:
    """What replies took, by tenant and model. Not shared between processes: each sees enough for itself."""

    def __init__(self, pairs: int = PAIRS) -> None:
        self._pairs = pairs
        self._sketches: OrderedDict[tuple[str, str], Sketch] = OrderedDict()

    def saw(self, tenant: str, model: str, output_tokens: int) -> None:
        """A complete reply's output, of one choice. `model` is the configured name or glob: a closed set."""
        key = (tenant, model)
        sketch = self._sketches.get(key)
        if sketch is None:
            if len(self._sketches) >= self._pairs:
                self._sketches.popitem(last=False)
            sketch = self._sketches[key] = Sketch()
        else:
            self._sketches.move_to_end(key)
        sketch.add(output_tokens)

    def output(self, tenant: str, model: str, most: int | None) -> int:
        """Output tokens to expect of one choice, of which the client allows `most` (None: it does not say)."""
        sketch = self._sketches.get((tenant, model))
        if sketch is None or sketch.samples < SAMPLES:
            return min(most or FIRST_GUESS, FIRST_GUESS)
        expected = sketch.p95()
        return expected if most is None else min(most, expected)


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one attempt."""

    input: int
    expected: int
    """Output, all choices together."""
    most: int
    """Output, all choices together. Never below `expected`."""


def estimate(
    *,
    input_tokens: int,
    asked: int | None,
    choices: int,
    expected: int,
    max_output_tokens: int | None,
    context_window: int | None,
    generates: bool = True,
) -> Estimate:
    """The figures of one request at one target. `asked` is the client's own maximum for one choice.

    A choice can never have more than the window leaves beside the input.
    """
    if not generates:
        return Estimate(input_tokens, 0, 0)
    most = asked or max_output_tokens or DEFAULT_MOST
    if context_window is not None:
        most = min(most, max(context_window - input_tokens, 0))
    return Estimate(input_tokens, min(expected, most) * choices, most * choices)


class Exposure:
    """What is at risk in one process and one scope: by how much its running requests could outgrow their reservations.

    `share` is this process's part of the limit. A request's risk fits while the sum stays within the share; a single
    one may be larger than that, if it is alone. So the sum is never above `max(share, the largest risk)`, and that,
    over all processes, is the published bound of overshoot. Both dimensions are held, each to its own limit.
    """

    __slots__ = ("largest_nano_usd", "largest_tokens", "nano_usd", "running", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.nano_usd = 0
        self.running = 0
        """Requests that carry a risk."""
        self.largest_tokens = 0
        self.largest_nano_usd = 0

    def fits(self, tokens: int, nano_usd: int, share_tokens: int | None, share_nano_usd: int | None) -> bool:
        """Whether one more may run on its expectation. A share of None is no limit."""
        if not self.running:
            return True
        return (share_tokens is None or self.tokens + tokens <= share_tokens) and (
            share_nano_usd is None or self.nano_usd + nano_usd <= share_nano_usd
        )

    def add(self, tokens: int, nano_usd: int) -> None:
        self.tokens += tokens
        self.nano_usd += nano_usd
        self.running += 1
        self.largest_tokens = max(self.largest_tokens, tokens)
        self.largest_nano_usd = max(self.largest_nano_usd, nano_usd)

    def drop(self, tokens: int, nano_usd: int) -> None:
        self.tokens -= tokens
        self.nano_usd -= nano_usd
        self.running -= 1
