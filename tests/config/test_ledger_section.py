"""Where the ledger is written: what cannot be written is named with its line, and so is what a restart forgets."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import MINIMAL, File

from proxy.config.advice import FORGETS
from proxy.config.schema import json_schema


def sinks(*files: str) -> str:
    return MINIMAL + "ledger:\n  sinks:\n" + "".join(f"    - file: {file}\n" for file in files)


def test_a_file_need_not_be_there_and_starts_at_the_directory_of_the_configuration(config: File) -> None:
    (sink,) = config.load(sinks("ledger.jsonl")).settings.ledger.sinks
    assert (sink.file, sink.max_bytes, sink.keep) == (config.directory / "ledger.jsonl", 104_857_600, 10)
    (sink,) = config.load(sinks(f"{config.directory}/other")).settings.ledger.sinks
    assert sink.file == config.directory / "other"
    assert not sink.file.exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (sinks("no/where.jsonl"), "4:13: ledger.sinks[0].file: its directory does not exist: make it first"),
        (sinks("."), "4:13: ledger.sinks[0].file: is a directory: expected the path of a file"),
        (sinks("a" * 300 + "/b"), "4:13: ledger.sinks[0].file: its directory does not exist: make it first"),
        (sinks('""'), "4:13: ledger.sinks[0].file: expected the path of a file, got an empty text"),
        (sinks("7"), "4:13: ledger.sinks[0].file: expected the path of a file, got a whole number: put it in quotes"),
        (sinks("null"), "4:13: ledger.sinks[0].file: expected the path of a file, got nothing"),
        (
            sinks("a", "b", "../" + "{}/a"),
            "6:13: ledger.sinks[2].file: ledger.sinks[0].file writes this file, or renames its own to it",
        ),
        (
            sinks("a.3", "a"),
            "5:13: ledger.sinks[1].file: ledger.sinks[0].file writes this file, or renames its own to it",
        ),
        (
            MINIMAL + "ledger:\n  sinks: [{path: a}]\n",
            "3:12: ledger.sinks[0].path: unknown key: known here: file, max_bytes, keep",
        ),
        (MINIMAL + "ledger:\n  sinks: [{file: a, keep: 0}]\n", "3:27: ledger.sinks[0].keep: must be at least 1"),
        (
            MINIMAL + "ledger:\n  sinks: [{file: a, max_bytes: 1}]\n",
            "3:32: ledger.sinks[0].max_bytes: must be at least 65536",
        ),
    ],
)
def test_what_cannot_be_written_is_named_with_its_line(config: File, text: str, error: str) -> None:
    found = config.errors(text.replace("{}", config.directory.name))
    assert f"config.yaml:{error}" in found


def test_the_schema_shows_the_section() -> None:
    assert set(json_schema()["$defs"]["SinkSettings"]["properties"]) == {"file", "max_bytes", "keep"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("budget: {usd_per_day: 5}\n", "budget.usd_per_day"),
        ("budget: {usd_per_hour: 5, usd_per_month: 9}\n", "budget.usd_per_hour"),
        ("global_budget: {usd_per_month: 5}\n", "global_budget.usd_per_month"),
        ("tenants: [{name: a, keys: [0123456789abcdef], budget: {usd_per_day: 1}}]\n", "tenants[0].budget.usd_per_day"),
        ("budget: {usd_per_minute: 5, tokens_per_minute: 3, max_concurrent: 2}\n", None),
        ("budget: {mode: off, usd_per_day: 5}\n", None),
        ("", None),
        ("state: redis://localhost\nbudget: {usd_per_day: 5}\n", None),
        ("ledger: {sinks: [{file: l}]}\nbudget: {usd_per_day: 5}\n", None),
    ],
)
def test_a_window_that_a_restart_forgets_is_warned_of(config: File, text: str, path: str | None) -> None:
    warnings = config.load("providers: {a: {kind: mock}}\n" + text).warnings
    assert [(one.path, one.message) for one in warnings] == ([(path, FORGETS)] if path else [])
    assert all(one.line > 0 for one in warnings)


def test_an_account_is_warned_of_too(config: File) -> None:
    (one,) = config.load("providers:\n  a: {kind: mock, limits: {usd_per_day: 1}}\n").warnings
    assert (one.line, one.path) == (2, "providers.a.limits.usd_per_day")


def test_what_was_made_later_is_seen(config: File, tmp_path: Path) -> None:
    text = sinks("late/ledger.jsonl")
    config.errors(text)
    (tmp_path / "late").mkdir()
    assert config.load(text).settings.ledger.sinks
