"""What has gone wrong on the way of one request, and what is told of its next attempt."""

from __future__ import annotations

from typing import Any

from proxy.errors import UpstreamError
from proxy.fault_tolerance.retry import Course
from proxy.fault_tolerance.verdict import TargetRefused
from proxy.observability.upstream_events import UpstreamFailedOver, UpstreamRetried
from proxy.types import Call, Record, Target


class Trail:
    """What has gone wrong so far. Of most requests there is none."""

    __slots__ = ("course", "listed", "refused", "source")

    def __init__(self, course: Course) -> None:
        self.course = course
        self.listed: list[dict[str, Any]] = []
        self.refused: list[TargetRefused] = []
        self.source: tuple[Target, str] | None = None
        """Where the request comes from when it goes on elsewhere, and why."""


def again_or_elsewhere(
    source: Target, target: Target, reason: str, failed: UpstreamError | None, wait: float, call: Call, record: Record
) -> UpstreamRetried | UpstreamFailedOver | None:
    """The event of an attempt at `target` that is not the first choice. `failed`: what went wrong there before; with
    it, the attempt is a retry. None: the same place, where nothing was sent yet."""
    about: dict[str, Any] = {
        "request_id": call.request_id,
        "trace_id": call.traceparent[3:35],
        "tenant": record.tenant,
        "model": record.model,
        "attempt": record.attempts + 1,
    }
    place = f"{target.provider}/{target.model}"
    if failed is not None:
        return UpstreamRetried(**about, provider=target.provider, target=place, reason=failed.reason, wait=wait)
    if source is target:
        return None
    return UpstreamFailedOver(
        **about,
        from_provider=source.provider,
        to_provider=target.provider,
        source=f"{source.provider}/{source.model}",
        target=place,
        reason=reason,
    )
