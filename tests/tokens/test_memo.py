"""The memo: bounded, the recently used stay, and threads may share it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.tokens.memo import Memo

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


def key(number: int) -> bytes:
    return number.to_bytes(4)


def test_what_is_put_is_got() -> None:
    memo: Memo[int] = Memo(10)
    assert memo.get(b"a") is None
    memo.put(b"a", 0)
    assert memo.get(b"a") == 0


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    memo: Memo[int] = Memo(10)
    memo.put(b"used", 1)
    memo.put(b"unused", 2)
    for number in range(100):
        memo.put(key(number), number)
        assert memo.get(b"used") == 1
    assert memo.get(b"unused") is None


@settings(RELAXED)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=300), st.integers(2, 20))
def test_never_larger_than_its_bound_and_never_wrong(steps: list[tuple[bool, int]], entries: int) -> None:
    memo: Memo[int] = Memo(entries)
    for put, number in steps:
        if put:
            memo.put(key(number), number)
            assert memo.get(key(number)) == number
        else:
            assert memo.get(key(number)) in (None, number)
        assert len(memo) <= entries


@settings(RELAXED)
@given(st.lists(st.integers(0, 30), max_size=60), st.lists(st.integers(0, 30), max_size=60), st.integers(2, 40))
def test_all_at_once_is_one_after_the_other(known: list[int], asked: list[int], entries: int) -> None:
    together, alone = Memo[int](entries), Memo[int](entries)
    for number in known:
        together.put(key(number), number)
        alone.put(key(number), number)
    found = together.get_all([key(number) for number in asked])
    assert all(value in (None, number) for value, number in zip(found, asked, strict=True))
    assert len(together) <= entries
    if len(known) < entries // 2:  # nothing was forgotten meanwhile
        assert found == [alone.get(key(number)) for number in asked]


def test_all_at_once_keeps_what_is_used() -> None:
    memo = Memo[int](10)
    memo.put(b"used", 1)
    for number in range(100):
        memo.put(key(number), number)
        assert memo.get_all([b"used", b"never"]) == [1, None]


def test_a_bound_below_two_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        Memo(1)


def test_threads_never_see_another_keys_value() -> None:
    memo: Memo[int] = Memo(64)
    wrong: list[object] = []

    def work(offset: int) -> None:
        for number in range(20_000):
            place = (number * 7 + offset) % 200
            memo.put(key(place), place)
            found = memo.get(key(199 - place))
            if found not in (None, 199 - place):
                wrong.append((place, found))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(memo) <= 64 + len(threads)
