"""The attempts of one client request, one after the other, until one of them has something to forward. The shell.

    async with failover.open(…) as reply:      its head read, its first event with content at hand
        …                                      from here on nothing is tried again: what breaks is the client's to see

For each attempt, in this order: is a credential ready, does the circuit admit it, does the budget cover it, is it sent.
What comes after a failure is decided in `retry`, what is said in the end in `verdict`. A client that leaves cancels the
task wherever it waits: the permit is given back, the reply closed, and the attempt billed by what is known of it.

A request that is served at once pays for this object and two look-ups.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from proxy.context.base import View, Whole
from proxy.errors import InternalError, InvalidRequest, ProxyError, StreamInterrupted, UpstreamError
from proxy.fault_tolerance.backoff import RetryBudget
from proxy.fault_tolerance.permits import Charge, Guard, Permit
from proxy.fault_tolerance.retry import OPEN, Bounds, Course, RetryPolicy, Step
from proxy.fault_tolerance.sharing import Sharing
from proxy.fault_tolerance.trail import Trail, again_or_elsewhere
from proxy.fault_tolerance.verdict import CREDENTIAL, RATE, REFUSALS, TargetRefused, entry, listed, reason_of, verdict
from proxy.observability.events import Notice
from proxy.providers.base import Provider
from proxy.types import Ask, Call, Record, Reply, Target, TooLong

TIMEOUT_HEADER: Final = "x-breakwater-timeout-ms"
_WHOLE: Final = re.compile(rb"[0-9]{1,10}")


class Failover:
    """One for the process. `clock` is monotonic and fine, for records; `now` is the event loop's, for deadlines."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        circuits: Guard,
        policy: RetryPolicy,
        *,
        deadline: float,
        max_calls: int,
        clock: Callable[[], float],
        now: Callable[[], float],
        random: Callable[[], float],
        emit: Callable[[Notice], None],
        heeds_rests: bool = True,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        """`deadline`: seconds of a whole request; `max_calls`: of it and all its children. `heeds_rests` False: a
        target is asked although its credentials rest."""
        self.providers = providers
        self.circuits = circuits
        self.policy = policy
        self.repeats = policy.max_attempts > 1
        self.budgets = {name: RetryBudget(now) for name in providers}
        self.sharing = Sharing(random)
        self.order = self.sharing.order
        """The targets of a request, in the order in which they are tried."""
        self.clock = clock
        self.now = now
        self.random = random
        self.emit = emit
        self.heeds_rests = heeds_rests
        self.sleep = sleep
        self._deadline = deadline
        self._max_calls = max_calls

    def bounds(self, call: Call) -> Bounds:
        """What the request may take from now on. Raises InvalidRequest for a header that is no time."""
        seconds = whole = self._deadline
        wanted = call.timeout_ms
        if wanted is not None:
            if not _WHOLE.fullmatch(wanted) or not int(wanted):
                raise InvalidRequest(f"{TIMEOUT_HEADER} must be a whole number of milliseconds, at least 1.")
            seconds = min(seconds, int(wanted) / 1000)
        return Bounds(self.now() + seconds, self._max_calls, whole if seconds == whole else 0.0)

    def open(
        self,
        ask: Ask,
        targets: Sequence[Target],
        charge: Charge,
        record: Record,
        bounds: Bounds,
        view: View | None = None,
    ) -> Opening:
        """An async context manager over the reply. Entering it raises ProxyError: the final one, which lists the
        attempts, or what the budget refuses the request for. `view`: what of `ask` each target gets; None: all."""
        return Opening(self, ask, targets, charge, record, bounds, view or Whole(ask))


class Opening:
    """See `Failover.open`. One task uses it, once."""

    __slots__ = ("_ask", "_at", "_bounds", "_charge", "_failover", "_permit", "_record", "_reply", "_targets",
                 "_trail", "_view")  # fmt: skip

    def __init__(
        self,
        failover: Failover,
        ask: Ask,
        targets: Sequence[Target],
        charge: Charge,
        record: Record,
        bounds: Bounds,
        view: View,
    ) -> None:
        self._failover = failover
        self._ask = ask
        self._view = view
        self._targets = targets
        self._charge = charge
        self._record = record
        self._bounds = bounds
        self._at = 0
        """The position of the target at hand."""
        self._permit: Permit | None = None
        self._reply: Reply | None = None
        self._trail: Trail | None = None

    @property
    def target(self) -> Target:
        """The one at hand; within the `async with`, the one that answers."""
        return self._targets[self._at]

    async def __aenter__(self) -> Reply:
        bounds = self._bounds
        if bounds.calls <= 0 or self._failover.now() >= bounds.deadline:
            raise self._final()
        step: Step | None = None
        while True:
            target = self._targets[self._at]
            if self._is_ready(target):
                self._permit = self._failover.circuits.admit(target.provider, target.label)
                if self._permit is None:
                    self._permit = await self._probe_of(target)
                if self._permit is not None:
                    try:
                        return await self._attempt(target, step)
                    except UpstreamError as error:
                        self._note(target, error)
                    except REFUSALS as refused:
                        self._note_refused(target, refused)
            step = self._next()
            if step is None:
                return await self._last_resort()
            self._at = step.position
            if step.wait:
                await self._failover.sleep(step.wait)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        record, reply, permit = self._record, self._reply, self._permit
        record.upstream_ended = self._failover.clock()
        assert reply is not None
        assert permit is not None
        try:
            if error is None:
                if reply.failed:
                    permit.failed(StreamInterrupted("The provider's reply ended with an error of its own."))
                elif reply.status < 400:
                    permit.succeeded()
                else:
                    permit.ignored()
            elif isinstance(error, UpstreamError):
                permit.failed(error)
                self._charge.failed(error)
                if not record.first_event:
                    target = self._targets[self._at]
                    self._list(target, error, self._seconds())
                    listed(error, self._failures().listed, repeats=self._failover.repeats)
            else:
                self._ours(permit, error)
        finally:
            if len(self._targets) > 1:
                self._failover.sharing.ended(self._targets[self._at])
            await reply.aclose()

    async def _last_resort(self) -> Reply:
        """Nothing else is left: an open circuit that may be probed, or the final error."""
        course = self._failures().course
        places = course.open_positions(self._failover.now())
        if places:
            targets = [self._targets[position] for position in places]
            found = await self._failover.circuits.probe(
                [(target.provider, target.label) for target in targets], all_open=course.is_exhausted
            )
            if found is not None:
                self._at = places[found[0]]
                self._permit = found[1]
                target = self._targets[self._at]
                try:
                    return await self._attempt(target, Step(self._at))
                except UpstreamError as error:
                    self._note(target, error)
                except REFUSALS as refused:
                    self._note_refused(target, refused)
        raise self._final()

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _is_ready(self, target: Target) -> bool:
        """Whether a credential is: one that rests costs no call."""
        failover = self._failover
        rest = failover.providers[target.provider].resting(target.model)
        if rest is not None and failover.heeds_rests:
            self._skip(target, RATE if rest.why == "rate" else CREDENTIAL, rest.seconds if rest.why == "rate" else None)
            return False
        return True

    async def _probe_of(self, target: Target) -> Permit | None:
        """Of a target that is not admitted: leave to find out whether it serves again, if that is this request's turn.

        A model with one target leaves that to the last resort."""
        if len(self._targets) > 1:
            found = await self._failover.circuits.probe([(target.provider, target.label)], all_open=False)
            if found is not None:
                return found[1]
        self._skip(target, OPEN, None)
        return None

    async def _attempt(self, target: Target, step: Step | None) -> Reply:
        failover, record, charge, permit = self._failover, self._record, self._charge, self._permit
        assert permit is not None
        shares = len(self._targets) > 1
        begun = False
        ask = await self._fitted(target, permit) if self._view.needed else self._ask
        try:
            await charge.cover(target)
            if step is None:
                failover.budgets[target.provider].deposit()
            else:
                self._begin_again(target, step)
            if shares:
                failover.sharing.begun(target)
            begun = True
            reply = await self._send(target, ask)
            if reply.status >= 400 and (refusal := reply.too_long) is not None:
                reply = await self._send_less(target, reply, refusal)
        except BaseException as error:  # cancelled as well as failed: the permit is told in every case
            if begun:
                record.upstream_ended = failover.clock()
                if shares:
                    failover.sharing.ended(target)
            if isinstance(error, UpstreamError):
                self._failed(permit, error)
            else:
                self._ours(permit, error)
            raise
        if reply.stream and reply.status < 400:  # what is no stream has ended already
            permit.answered()
        self._reply = reply
        return reply

    async def _fitted(self, target: Target, permit: Permit) -> Ask:
        """What `target` gets. Raises ContextExceeded, which the charge is not told of: it knows of no attempt yet."""
        try:
            return await self._view.fit(target)
        except BaseException:  # cancelled as well as refused: the permit is given back in every case
            permit.ignored()
            raise

    async def _send(self, target: Target, ask: Ask) -> Reply:
        failover, record = self._failover, self._record
        self._bounds.calls -= 1
        record.attempts += 1
        record.provider, record.upstream_model = target.provider, target.model
        record.upstream_started = failover.clock()
        reply = await failover.providers[target.provider].open(
            ask, target.model, output_cap=self._charge.output_cap, deadline=self._bounds.deadline
        )
        record.upstream_ended = failover.clock()
        record.upstream_status = reply.status
        record.upstream_request_id = reply.upstream_request_id
        self._charge.answered(reply.status)
        return reply

    async def _send_less(self, target: Target, reply: Reply, refusal: TooLong) -> Reply:
        """Once more, shorter, where the provider has found the prompt too long and something can go; else `reply`."""
        if self._bounds.calls <= 0 or self._bounds.over(self._failover.now()):
            return reply
        less = await self._view.refit(target, refusal)
        if less is None:
            return reply
        await reply.aclose()
        record = self._record
        await self._charge.cover(target)
        record.elsewhere += self._failover.clock() - record.upstream_started
        return await self._send(target, less)

    def _failed(self, permit: Permit, error: UpstreamError) -> None:
        """What the deadline of the request cut short is no evidence against anybody."""
        if self._bounds.cut_short(self._failover.now(), self._seconds()):
            permit.ignored()
        else:
            permit.failed(error)
        self._charge.failed(error)

    def _ours(self, permit: Permit, error: BaseException) -> None:
        """Not the provider's doing: a cancellation, a budget, a fault of ours."""
        permit.ignored()
        if isinstance(error, ProxyError):
            self._charge.failed(error)
        elif isinstance(error, Exception):  # where no answer had begun, nothing is known to have been used
            self._charge.failed(InternalError())

    # -- between attempts --------------------------------------------------------------------------------------------

    def _failures(self) -> Trail:
        if self._trail is None:
            failover, ask = self._failover, self._ask
            self._trail = Trail(
                Course(failover.policy, self._targets, self._bounds, failover.random, replayable=ask.replayable)
            )
        return self._trail

    def _note(self, target: Target, error: UpstreamError) -> None:
        trail = self._failures()
        trail.course.failed(self._at, error, self._failover.now())
        trail.source = (target, error.reason)
        self._list(target, error, self._seconds())

    def _note_refused(self, target: Target, refused: TargetRefused) -> None:
        self._failures().refused.append(refused)
        self._skip(target, reason_of(refused), None)

    def _skip(self, target: Target, reason: str, seconds: float | None) -> None:
        trail = self._failures()
        trail.course.skipped(self._at, reason, self._failover.now(), seconds)
        trail.source = trail.source or (target, reason)
        trail.listed.append(entry(target, reason))

    def _list(self, target: Target, error: UpstreamError, seconds: float) -> None:
        record = self._record
        status = error.details.pop("upstream_status", None)
        record.upstream_status = status or 0
        record.upstream_request_id = error.details.pop("upstream_request_id", "")
        self._failures().listed.append(entry(target, error.reason, status, seconds))

    def _seconds(self) -> float:
        record = self._record
        return max(record.upstream_ended - record.upstream_started, 0.0)

    def _next(self) -> Step | None:
        """The next step that the retry budget of its provider covers."""
        course, failover = self._failures().course, self._failover
        while (step := course.next(failover.now())) is not None:
            if not step.draws or failover.budgets[self._targets[step.position].provider].withdraw():
                return step
            course.denied(step.position)
        return None

    def _final(self) -> ProxyError:
        failover, trail = self._failover, self._failures()
        now = failover.now()
        late = self._bounds.over(now)
        return verdict(
            trail.course.standings, trail.refused, trail.listed, now=now, late=late, repeats=failover.repeats
        )

    def _begin_again(self, target: Target, step: Step) -> None:
        """An attempt that is not the first choice. What was tried before at the same place is a retry."""
        trail = self._failures()
        assert trail.source is not None
        record, call = self._record, self._ask.call
        source, reason = trail.source
        again = trail.course.standings[step.position]
        # The provider of a first send is credited for it, whichever choice it was.
        if again.error is None and not step.draws:
            self._failover.budgets[target.provider].deposit()
        record.elsewhere += self._failover.clock() - record.upstream_started if record.attempts else step.wait
        notice = again_or_elsewhere(source, target, reason, again.error, step.wait, call, record)
        if notice is not None:
            self._failover.emit(notice)
        trail.source = None
