"""What the metrics count, and the page that a scrape gets, read with the client library's own parser."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from proxy.observability.events import ConnectionRefused, InternalFault, RequestFinished, RequestRefused, ServerDraining
from proxy.observability.metrics import CONTENT_TYPE, Metrics
from proxy.observability.series import Histogram, Snapshot
from proxy.observability.upstream_events import CircuitClosed, CircuitHalfOpen, CircuitOpened
from proxy.types import Usage

CHAT = {"route": "/v1/chat/completions", "model": "gpt-4o*", "provider": "openai"}


def made(**options: Any) -> Metrics:
    return Metrics(
        **{"version": "1.2.3", "config_hash": "abc", "in_flight": lambda: 7, "lines_dropped": lambda: 0} | options
    )


def finished(**fields: Any) -> RequestFinished:
    return RequestFinished(
        **{"request_id": "r", "trace_id": "t", "tenant": "acme", "status": 200, "duration": 0.3, **CHAT} | fields
    )


class Page:
    """A parsed page: `page("name", label="value")` is one sample's value, or None."""

    def __init__(self, text: bytes) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text.decode())}
        self._samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self._samples, key
                self._samples[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._samples.get((f"breakwater_{name}", frozenset(labels.items())))

    def series(self, name: str) -> int:
        return sum(1 for key in self._samples if key[0].startswith(f"breakwater_{name}"))


def scrape(metrics: Metrics) -> Page:
    return Page(asyncio.run(metrics.render()))


def test_a_finished_request_is_counted_everywhere() -> None:
    metrics = made()
    metrics(
        finished(
            stream=True, overhead=0.0004, upstream_duration=0.25, time_to_first_token=0.1,
            usage=Usage(100, 20, cache_read=60, cache_write=30, reasoning=5),
        )
    )  # fmt: skip
    page = scrape(metrics)
    assert page("requests_total", tenant="acme", status="200", **CHAT) == 1
    for name, total in (
        ("request_duration_seconds", 0.3), ("overhead_seconds", 0.0004), ("upstream_duration_seconds", 0.25),
        ("time_to_first_token_seconds", 0.1),
    ):  # fmt: skip
        assert page(f"{name}_count", **CHAT) == 1, name
        assert page(f"{name}_sum", **CHAT) == total, name
    assert page("overhead_seconds_bucket", le="0.0002", **CHAT) == 0
    assert page("overhead_seconds_bucket", le="0.0005", **CHAT) == 1
    assert page("overhead_seconds_bucket", le="+Inf", **CHAT) == 1
    kinds = {kind: page("tokens_total", model="gpt-4o*", tenant="acme", kind=kind) for kind in
             ("input", "output", "cache_read", "cache_write", "reasoning")}  # fmt: skip
    assert kinds == {"input": 100, "output": 20, "cache_read": 60, "cache_write": 30, "reasoning": 5}
    assert page("client_disconnects_total", **CHAT) == 0
    assert page("stream_interruptions_total", **CHAT) == 0


def test_what_does_not_apply_is_not_observed() -> None:
    metrics = made()
    metrics(finished(time_to_first_token=0.1))  # not a stream
    page = scrape(metrics)
    for name in ("overhead_seconds", "upstream_duration_seconds", "time_to_first_token_seconds"):
        assert page(f"{name}_count", **CHAT) == 0
    assert page("tokens_total", model="gpt-4o*", tenant="acme", kind="input") == 0


def test_a_client_that_left_and_a_stream_that_broke() -> None:
    metrics = made()
    metrics(finished(status=499, disconnected=True))
    metrics(finished(interrupted=True))
    page = scrape(metrics)
    assert page("requests_total", tenant="acme", status="499", **CHAT) == 1
    assert page("client_disconnects_total", **CHAT) == 1
    assert page("stream_interruptions_total", **CHAT) == 1


def test_a_refusal_counts_without_a_provider() -> None:
    metrics = made()
    for _ in range(2):
        metrics(
            RequestRefused(
                request_id="r", trace_id="t", route="unmatched", tenant="other", model="other", status=404,
                code="unknown_url", duration=0.001,
            )
        )  # fmt: skip
    metrics(ConnectionRefused(status=431, code="header_too_large"))
    page = scrape(metrics)
    labels = {"route": "unmatched", "model": "other", "provider": ""}
    assert page("requests_total", tenant="other", status="404", **labels) == 2
    assert page("request_duration_seconds_count", **labels) == 2
    assert page("connections_refused_total", code="header_too_large") == 1


def test_events_without_a_metric_pass() -> None:
    metrics = made()
    metrics(ServerDraining(in_flight=1))
    metrics(InternalFault(where="x", exc=ValueError()))
    assert scrape(metrics).series("requests_total") == 0


def test_what_others_own_is_read_at_the_scrape() -> None:
    now = [1.0]
    in_flight = [3]
    metrics = made(in_flight=lambda: in_flight[0], lines_dropped=lambda: 5, clock=lambda: now[0])
    page = scrape(metrics)
    assert page("in_flight_requests") == 3
    assert page("log_lines_dropped_total") == 5
    assert page("config_info", hash="abc") == 1
    assert page("build_info", version="1.2.3") == 1
    in_flight[0] = 4
    now[0] += 1.0
    assert scrape(metrics)("in_flight_requests") == 4


def test_circuits() -> None:
    states = {("openai", "gpt-4o"): 2.0}
    metrics = made(circuits=lambda: states)
    opened = {"provider": "openai", "model": "gpt-4o", "mode": "enforce", "why": (), "open_ms": 1}
    for was, scope in (("closed", "process"), ("open", "fleet"), ("half_open", "fleet")):
        metrics(CircuitOpened(was=was, scope=scope, **opened))
    metrics(CircuitHalfOpen(provider="openai", model="gpt-4o", mode="enforce", was="open"))
    metrics(
        CircuitClosed(
            provider="openai", model="gpt-4o", mode="enforce", was="half_open", cause="success", open_seconds=1.0
        )
    )
    page = scrape(metrics)
    place = {"provider": "openai", "model": "gpt-4o"}
    assert page("circuit_state", **place) == 2
    assert page("circuit_transitions_total", to="open", **place) == 2, "open for another reason is no transition"
    assert page("circuit_transitions_total", to="half_open", **place) == 1
    assert page("circuit_transitions_total", to="closed", **place) == 1


def test_every_family_is_declared_once_with_its_type_and_the_process_is_there() -> None:
    metrics = made()
    metrics(finished())
    metrics(ConnectionRefused(status=400, code="x"))
    text = asyncio.run(metrics.render()).decode()
    families = Page(text.encode()).families
    assert {name: family.type for name, family in families.items() if name.startswith("breakwater_")} == {
        "breakwater_requests": "counter",
        "breakwater_request_duration_seconds": "histogram",
        "breakwater_overhead_seconds": "histogram",
        "breakwater_upstream_duration_seconds": "histogram",
        "breakwater_time_to_first_token_seconds": "histogram",
        "breakwater_tokens": "counter",
        "breakwater_in_flight_requests": "gauge",
        "breakwater_stream_interruptions": "counter",
        "breakwater_client_disconnects": "counter",
        "breakwater_connections_refused": "counter",
        "breakwater_cost_usd": "counter",
        "breakwater_cost_unknown": "counter",
        "breakwater_budget_refusals": "counter",
        "breakwater_store_errors": "counter",
        "breakwater_retries": "counter",
        "breakwater_failovers": "counter",
        "breakwater_budget_used_ratio": "gauge",
        "breakwater_budget_reserved": "gauge",
        "breakwater_estimate_error_ratio": "histogram",
        "breakwater_context_trims": "counter",
        "breakwater_context_tokens_trimmed": "counter",
        "breakwater_context_estimate_error_ratio": "histogram",
        "breakwater_degraded": "gauge",
        "breakwater_circuit_state": "gauge",
        "breakwater_circuit_transitions": "counter",
        "breakwater_config_info": "gauge",
        "breakwater_build_info": "gauge",
        "breakwater_log_lines_dropped": "counter",
    }
    assert all(family.documentation for family in families.values())
    assert "process_resident_memory_bytes" in families
    assert "python_gc_collections" in families
    declared = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    assert text.endswith("\n")
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say() -> None:
    metrics = made()
    metrics(finished(stream=True, time_to_first_token=1.0, overhead=0.1, usage=Usage(1, 2)))
    metrics(ConnectionRefused(status=400, code="x"))
    page = asyncio.run(metrics.render())
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@given(st.lists(st.floats(0, 1000), max_size=50))
@settings(max_examples=60, deadline=None)
def test_buckets_hold_what_is_at_most_their_bound(values: list[float]) -> None:
    bounds = (0.1, 1.0, 10.0, 100.0)
    histogram = Histogram("x", "y", ("a",), bounds)
    cell = histogram.child("b")
    for value in values:
        cell.observe(value)
    rendered = Snapshot([], [histogram]).render()
    (family,) = text_string_to_metric_families(rendered)
    by_bound = {sample.labels.get("le"): sample.value for sample in family.samples if sample.name == "x_bucket"}
    for bound in bounds:
        assert by_bound[str(bound)] == sum(value <= bound for value in values)
    assert by_bound["+Inf"] == len(values)


def test_histograms_agree_with_the_client_library() -> None:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client import Histogram as Theirs

    bounds = (0.001, 0.01, 0.5, 2.0)
    registry = CollectorRegistry()
    theirs = Theirs("h", "text", ("a",), registry=registry, buckets=bounds).labels("x")
    ours = Histogram("h", "text", ("a",), bounds)
    source = random.Random(3)
    for _ in range(500):
        value = source.choice([*bounds, source.expovariate(1)])
        theirs.observe(value)
        ours.child("x").observe(value)

    def samples(text: str) -> dict[Any, float]:
        families = text_string_to_metric_families(text)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    assert samples(Snapshot([], [ours]).render()) == samples(generate_latest(registry).decode())


NASTY = ['a"b', "a\\b", "a\nb", "a}b{", 'x="1",y="2', "ü🎉", "\ud800", "", "\r\n# TYPE evil counter\nevil 1"]


def test_no_label_breaks_the_page() -> None:
    metrics = made()
    for value in NASTY:
        metrics(finished(model=value, tenant=value, provider=value, route=value))
    text = asyncio.run(metrics.render())
    page = Page(text)
    assert page.series("requests_total") == len(NASTY)
    assert "evil" not in page.families
    for value in NASTY:
        expected = value.encode("utf-8", "replace").decode()
        labels = dict.fromkeys(("model", "tenant", "provider", "route"), expected)
        assert page("requests_total", status="200", **labels) == 1, value


def test_a_bomb_of_labels_is_counted_under_other() -> None:
    metrics = made(max_series=500)
    for n in range(3000):
        metrics(finished(model=f"model-{n}", status=200 + n % 300))
    page = scrape(metrics)
    total = sum(page.series(name) for name in ("requests_total", "request_", "overhead", "upstream", "time_", "tokens"))
    assert total < 800
    assert len(metrics._bound) < 20
    other = {"route": "other", "model": "other", "provider": "other"}
    kept = len(metrics._bound)
    assert page("requests_total", tenant="other", status="other", **other) == 3000 - kept
    assert page("request_duration_seconds_count", **other) == 3000 - kept


def test_what_was_known_before_the_bomb_is_still_counted_under_its_name() -> None:
    metrics = made(max_series=200)
    metrics(finished())
    for n in range(100):
        metrics(finished(model=f"model-{n}"))
    metrics(finished())
    assert scrape(metrics)("requests_total", tenant="acme", status="200", **CHAT) == 2


# -- the scrape ------------------------------------------------------------------------------------------------------


class Slow:
    """A reading that tells how often it was read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> int:
        self.reads += 1
        return self.reads


def test_many_scrapes_at_once_are_one_rendering() -> None:
    async def main() -> None:
        reading = Slow()
        metrics = made(in_flight=reading)
        pages = await asyncio.gather(*[metrics.render() for _ in range(50)])
        assert reading.reads == 1
        assert len(set(pages)) == 1

    asyncio.run(main())


def test_a_page_is_kept_for_its_second_and_no_longer() -> None:
    async def main() -> None:
        now = [10.0]
        reading = Slow()
        metrics = made(in_flight=reading, clock=lambda: now[0])
        first = await metrics.render()
        now[0] = 10.9
        metrics(finished())
        assert await metrics.render() is first
        now[0] = 11.0
        assert Page(await metrics.render())("requests_total", tenant="acme", status="200", **CHAT) == 1
        assert reading.reads == 2

    asyncio.run(main())


def test_a_scraper_that_leaves_takes_nothing_from_the_others() -> None:
    async def main() -> None:
        metrics = made()
        release = threading.Event()
        metrics._executor.submit(release.wait)  # the rendering waits behind this
        first = asyncio.create_task(metrics.render())
        second = asyncio.create_task(metrics.render())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
        release.set()
        assert b"breakwater_in_flight_requests 7" in await second

    asyncio.run(main())


def test_the_loop_runs_on_while_a_page_is_rendered() -> None:
    async def main() -> None:
        metrics = made()
        release = threading.Event()
        metrics._executor.submit(release.wait)
        scraping = asyncio.create_task(metrics.render())
        for _ in range(100):
            metrics(finished())
            await asyncio.sleep(0)
        assert not scraping.done()
        release.set()
        page = Page(await scraping)
        # As of the moment it was asked for: the numbers of one page belong together.
        assert (page("requests_total", tenant="acme", status="200", **CHAT) or 0) < 5

    asyncio.run(main())


def test_a_rendering_that_fails_is_told_to_its_scrapers_and_not_kept() -> None:
    async def main() -> None:
        broken = [True]

        def reading() -> int:
            if broken[0]:
                raise RuntimeError("not now")
            return 1

        metrics = made(in_flight=reading)
        for result in await asyncio.gather(metrics.render(), metrics.render(), return_exceptions=True):
            assert isinstance(result, RuntimeError)
        broken[0] = False
        assert b"breakwater_in_flight_requests 1" in await metrics.render()

    asyncio.run(main())


def test_the_same_metrics_serve_a_second_loop() -> None:
    metrics = made(cache_seconds=0.0)
    scrape(metrics)
    metrics(finished())
    assert scrape(metrics)("requests_total", tenant="acme", status="200", **CHAT) == 1


def test_closing_lets_the_thread_go() -> None:
    def count() -> int:
        return sum(thread.name.startswith("metrics") for thread in threading.enumerate())

    before = count()
    metrics = made()
    scrape(metrics)
    assert count() == before + 1
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("metrics")]
    metrics.close()
    for thread in threads[before:]:
        thread.join(10)
    assert count() == before


def test_two_are_independent() -> None:
    one, other = made(), made()
    one(finished())
    assert scrape(other).series("requests_total") == 0
