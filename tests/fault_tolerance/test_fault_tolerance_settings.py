from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from proxy.config.loader import load
from proxy.config.problems import ConfigErrors
from proxy.fault_tolerance.settings import FaultToleranceSettings


def test_unwritten_it_is_on_with_the_defaults_that_are_promised() -> None:
    unwritten = FaultToleranceSettings()
    assert unwritten.model_dump() == {
        "mode": "enforce",
        "retry": {
            "max_attempts": 4, "base_delay_ms": 1000, "max_delay_ms": 30_000, "jitter": True, "on_timeout": False,
        },
        "circuit_breaker": {"mode": "enforce", "failure_threshold": 5, "recovery_timeout_ms": 60_000},
        "fallback_provider": None,
        "deadline_ms": 900_000,
        "max_upstream_calls": 6,
    }  # fmt: skip
    assert (unwritten.acts, unwritten.breaker) == (True, "enforce")


@pytest.mark.parametrize(
    ("text", "acts", "breaker"),
    [
        ("", True, "enforce"),
        ("fault_tolerance: false", False, "off"),
        ("fault_tolerance: {mode: observe}", False, "observe"),
        ("fault_tolerance: {circuit_breaker: false}", True, "off"),
        ("fault_tolerance: {circuit_breaker: {mode: observe}}", True, "observe"),
        ("fault_tolerance: {mode: observe, circuit_breaker: false}", False, "off"),
    ],
)
def test_how_it_is_switched(text: str, acts: bool, breaker: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"providers: {{up: {{kind: mock}}}}\n{text}\n")
    section = load(file, {}).settings.fault_tolerance
    assert (section.acts, section.breaker) == (acts, breaker)


@pytest.mark.parametrize(
    "given",
    [
        {"retry": {"max_attempts": 0}},
        {"retry": {"max_attempts": 21}},
        {"retry": {"base_delay_ms": 0}},
        {"retry": {"base_delay_ms": 40_000}},
        {"circuit_breaker": {"failure_threshold": 0}},
        {"circuit_breaker": {"recovery_timeout_ms": 0}},
        {"fallback_provider": ""},
        {"fallback_provider": "backup/"},
        {"fallback_provider": "/model"},
        {"fallback_provider": "backup/*"},
        {"deadline_ms": 0},
        {"max_upstream_calls": 0},
        {"max_upstream_calls": 101},
        {"circuit_breaker": {"treshold": 1}},
    ],
)
def test_bounds(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FaultToleranceSettings.model_validate(given)


@pytest.mark.parametrize("given", ["backup", "backup/claude-haiku-4-5", "backup/meta/llama"])
def test_fallbacks(given: str) -> None:
    assert FaultToleranceSettings(fallback_provider=given).fallback_provider == given


def test_an_error_names_its_place(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("providers: {up: {kind: mock}}\nfault_tolerance:\n  retry: {max_attempts: many}\n")
    with pytest.raises(ConfigErrors) as caught:
        load(file, {})
    assert "config.yaml:3:25: fault_tolerance.retry.max_attempts" in str(caught.value)
