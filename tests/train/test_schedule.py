"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from train.schedule import Schedule


def test_warm_up_rises_and_the_cosine_ends_at_its_floor() -> None:
    schedule = Schedule(warmup=0.1, shape="cosine", floor=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.001)


def test_warmup_stable_decay_is_flat_then_linear() -> None:
    schedule = Schedule(warmup=5, shape="wsd", floor=0.0, decay=0.2)
    factors = [schedule.factor(step, 50) for step in range(50)]
    assert factors[5:40] == [1.0] * 35
    assert factors[40:] == pytest.approx([1 - (n + 1) / 10 for n in range(10)])


def test_a_constant_schedule_stays_after_warm_up() -> None:
    schedule = Schedule(warmup=0, shape="constant")
    assert {schedule.factor(step, 9) for step in range(9)} == {1.0}
