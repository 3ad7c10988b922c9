"""The circuit of the store's server."""

from __future__ import annotations

from proxy.store.circuit import Circuit


def opened() -> Circuit:
    circuit = Circuit()
    assert [circuit.failed(10.0) for _ in range(5)] == [False, False, False, False, True]
    return circuit


def test_five_failures_in_a_row_open_it() -> None:
    circuit = opened()
    assert circuit.is_open
    assert not circuit.allows(10.0)


def test_a_success_between_begins_the_count_anew() -> None:
    circuit = Circuit()
    for _ in range(20):
        assert not any(circuit.failed(10.0) for _ in range(4))
        assert circuit.troubled
        assert not circuit.succeeded(), "it was not open"
        assert not circuit.troubled
    assert circuit.allows(10.0)


def test_after_its_time_one_call_may_try_and_no_other() -> None:
    circuit = opened()
    assert not circuit.allows(10.999)
    assert circuit.allows(11.0)
    assert not circuit.allows(11.0)
    assert not circuit.allows(11.5)
    assert circuit.succeeded()
    assert circuit.allows(11.5)
    assert circuit.allows(11.5)


def test_a_try_whose_caller_left_does_not_keep_it_open_for_ever() -> None:
    circuit = opened()
    assert circuit.allows(11.0)
    assert not circuit.allows(11.999)
    assert circuit.allows(12.0)


def test_each_try_that_fails_doubles_the_time_up_to_ten_seconds() -> None:
    circuit, now, waits = opened(), 10.0, []
    for _ in range(6):
        wait = next(tenths / 10 for tenths in range(200) if circuit.allows(now + tenths / 10))
        waits.append(wait)
        now += wait
        assert not circuit.failed(now), "it was open already"
    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert circuit.succeeded()
    circuit = opened()
    assert circuit.allows(11.0), "and a success begins at one second again"


def test_answers_to_what_was_sent_before_it_opened_do_not_lengthen_it() -> None:
    circuit = opened()
    for _ in range(50):
        assert not circuit.failed(10.5)
    assert circuit.allows(11.0)
