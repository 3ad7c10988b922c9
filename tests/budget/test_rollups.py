"""What was used, as it is asked for and shown: exact sums, the dearest first, and no cell that a sheet would run."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budget.rollups import FIGURES, as_csv, as_table, document, query_of
from proxy.errors import InvalidRequest
from proxy.store.base import DIMENSIONS, Tally, UsageRow

NOW = 1_768_480_205_123
counts = st.integers(0, 2**40)
tallies = st.builds(Tally, *[counts] * len(Tally.__struct_fields__))
rows = st.lists(st.builds(UsageRow, st.tuples(st.text(max_size=12), st.text(max_size=12)), tallies), max_size=8)
QUERY = query_of("24h", "tenant,tags", NOW)


def test_a_question_is_whole_hours_and_a_list_in_its_own_order() -> None:
    query = query_of("90m", "tags,tenant", NOW)
    assert query.by == ("tags", "tenant")
    assert query.since_ms % 3_600_000 == 0
    assert NOW - query.since_ms >= 90 * 60_000
    assert NOW - query.since_ms < 90 * 60_000 + 3_600_000
    assert query.until_ms > NOW
    assert query_of("999999d", "tenant", NOW).since_ms == 0


@pytest.mark.parametrize("since", ["", "24", "h", "0h", "-1h", "1.5h", "1w", "24H", "1h ", "٣h", "9999999h"])
def test_what_is_no_span_is_refused(since: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        query_of(since, "tenant", NOW)
    assert caught.value.param == "since"


@pytest.mark.parametrize("by", ["", "colour", "tenant,tenant", "tenant,", "tenant, model", "Tenant"])
def test_what_is_no_dimension_is_refused(by: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        query_of("1h", by, NOW)
    assert caught.value.param == "by"
    assert ", ".join(DIMENSIONS) in caught.value.message


@given(rows)
def test_rows_add_up_to_the_total_and_the_dearest_stands_first(found: list[UsageRow]) -> None:
    told = json.loads(json.dumps(document(QUERY, found)))
    assert told["from"] == "2026-01-14T12:00:00.000Z"
    for name in FIGURES:
        assert sum(Decimal(row[name]) for row in told["rows"]) == Decimal(told["total"][name])
    costs = [Decimal(row["cost_usd"]) for row in told["rows"]]
    assert costs == sorted(costs, reverse=True)


@given(rows)
def test_a_sheet_reads_back_every_figure_and_runs_nothing(found: list[UsageRow]) -> None:
    told = document(QUERY, found)
    head, *read = csv.reader(io.StringIO(as_csv(told), newline=""))
    assert head == ["tenant", "tags", *FIGURES]
    assert len(read) == len(told["rows"])
    for cells, row in zip(read, told["rows"], strict=True):
        for name, cell in zip(head, cells, strict=True):
            plain = "".join(one if one.isprintable() else "?" for one in str(row[name]))
            assert cell in (plain, f"'{plain}")
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://x","y")'])
def test_a_formula_becomes_a_text(text: str) -> None:
    told = document(QUERY, [UsageRow(("t", text), Tally(1))])
    assert next(csv.reader([as_csv(told).split("\n", 1)[1]]))[1] == f"'{text}"


@given(rows)
def test_a_table_is_aligned_and_obeys_nothing(found: list[UsageRow]) -> None:
    told = document(QUERY, found)
    lines = as_table(told).splitlines()
    assert lines[0].split()[:2] == ["tenant", "tags"]
    assert lines[-1].split() == ["total", *(str(told["total"][name]) for name in FIGURES)]
    assert len(lines) == len(found) + (4 if found else 3)
    assert all(line.isprintable() for line in lines)
    assert lines[-1].split()[-1] == told["total"]["cost_usd"]


def test_a_table_as_it_looks() -> None:
    told = document(
        QUERY,
        [UsageRow(("acme", ""), Tally(2, 30, 7, 4, 0, 1, 1_500_000, 1)), UsageRow(("b\x1b[2J", "x"), Tally(1, 1))],
    )
    assert as_table(told) == (
        "tenant  tags  requests  input  output  cache_read  cache_write  reasoning  cost_unknown  cost_usd\n"
        "------  ----  --------  -----  ------  ----------  -----------  ---------  ------------  --------\n"
        "acme    -            2     30       7           4            0          1             1    0.0015\n"
        "b?[2J   x            1      1       0           0            0          0             0         0\n"
        "------  ----  --------  -----  ------  ----------  -----------  ---------  ------------  --------\n"
        "total                3     31       7           4            0          1             1    0.0015\n"
    )
