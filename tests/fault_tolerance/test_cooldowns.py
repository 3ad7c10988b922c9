from __future__ import annotations

from proxy.fault_tolerance.cooldowns import Cooldowns


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_credential_rests_as_long_as_the_provider_asks() -> None:
    clock = Clock()
    cooldowns = Cooldowns(clock, lambda: 0.5)
    assert cooldowns.left("openai") == 0.0
    assert cooldowns.refused("openai", 7.0) == 7.0
    assert cooldowns.left("backup") == 0.0
    clock.now += 5
    assert cooldowns.left("openai") == 2.0
    assert cooldowns.refused("openai", 1.0) == 2.0, "a shorter wish does not cut a longer one"
    clock.now += 2
    assert cooldowns.left("openai") == 0.0
    assert cooldowns.refused("openai", 86_400.0) == 3600.0


def test_without_a_wish_the_rest_doubles_with_each_refusal_and_has_an_end() -> None:
    clock = Clock()
    cooldowns = Cooldowns(clock, lambda: 1.0, base=1.0, cap=8.0)
    rests = []
    for _ in range(6):
        rests.append(cooldowns.refused(("openai", 1)))
        clock.now += rests[-1]
    assert rests == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    cooldowns.served(("openai", 1))
    assert cooldowns.refused(("openai", 1)) == 1.0


def test_a_burst_of_refusals_is_one() -> None:
    clock = Clock()
    cooldowns = Cooldowns(clock, lambda: 1.0)
    assert [cooldowns.refused("openai") for _ in range(50)] == [1.0] * 50
    clock.now += 1.0
    assert cooldowns.refused("openai") == 2.0


def test_after_a_while_the_next_refusal_is_a_first_one() -> None:
    clock = Clock()
    cooldowns = Cooldowns(clock, lambda: 1.0)
    for _ in range(3):
        clock.now += cooldowns.refused("openai")
    clock.now += 300.0
    assert cooldowns.refused("openai") == 1.0


def test_no_rest_is_nearly_nothing() -> None:
    assert Cooldowns(Clock(), lambda: 0.0).refused("openai") == 1.0


def test_an_answer_does_not_end_a_rest_that_goes_on() -> None:
    clock = Clock()
    cooldowns = Cooldowns(clock, lambda: 1.0)
    cooldowns.refused("openai", 5.0)
    cooldowns.served("openai")
    assert cooldowns.left("openai") == 5.0
    cooldowns.rest("openai", 60.0)
    cooldowns.rest("openai", 1.0)
    assert cooldowns.left("openai") == 60.0
