"""docs/budgets.md against the settings and the figures that it speaks of."""

from __future__ import annotations

import re
from pathlib import Path

from proxy.budget.access import QUEUED
from proxy.budget.estimate import DEFAULT_MOST, FIRST_GUESS, SAMPLES
from proxy.budget.fleet import BEAT_SECONDS, LIFE_SECONDS
from proxy.budget.settings import REFERENCE_TOKENS_PER_MINUTE, BudgetSettings, LimitSettings
from proxy.budget.tender import EXTEND_SECONDS, LEASE_MS
from proxy.budget.waiting import WAITING
from proxy.budget.windows import RING_SECONDS
from proxy.store.base import SEED_MS

TEXT = (Path(__file__).parents[2] / "docs/budgets.md").read_text()
WORDS = " ".join(TEXT.split())


def rows(heading: str) -> list[list[str]]:
    """The cells of all table rows of a section, without the heads."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0].startswith("`")]


def test_every_key_is_explained_with_its_default() -> None:
    told = {row[0].strip("`"): row[1].strip("`") for row in rows("The keys")}
    assert told.keys() == BudgetSettings.model_fields.keys()
    for name, field in BudgetSettings.model_fields.items():
        if name not in LimitSettings.model_fields:
            assert told[name] == str(field.default), name


def test_the_figures_are_those_of_the_code() -> None:
    for said in (
        f"a lease of {LEASE_MS // 1000} seconds",
        f"every {EXTEND_SECONDS:.0f} seconds, in one call",
        f"Up to {QUEUED:,} settlements wait",
        f"{RING_SECONDS} buckets of one second",
        f"before there are {SAMPLES} of them, the client's maximum or {FIRST_GUESS} tokens",
        f"else {DEFAULT_MOST};",
        f"and {WAITING} at most",
        f"observes {REFERENCE_TOKENS_PER_MINUTE:,} tokens",
    ):
        assert said in WORDS, said
    assert (BEAT_SECONDS, LIFE_SECONDS) == (1.0, 10.0)
    assert "each process beats once a second, is given up after ten seconds of silence" in WORDS
    assert SEED_MS == 2000
    assert "the store opens after two seconds" in WORDS


def test_every_other_name_in_the_tables_is_a_key() -> None:
    named = {re.sub(r"^.*[.\]]", "", row[0].strip("`")) for row in rows("Who is held to what")}
    assert named == {"limits", "global_budget", "budget", "breakwater keys create --budget"}
