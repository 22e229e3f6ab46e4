"""Beside a burst of faults nothing is filled, and never for long."""

from hypothesis import given
from hypothesis import strategies as st

from shim.memory.serve.bursts import ASIDE_S, BURST_S, LATELY_S, Bursts


def test_filling_pauses_until_a_request_stops_faulting_for_a_moment() -> None:
    bursts = Bursts()
    assert not bursts.stands_aside(0.0, goes_on=False)
    for now in (10.0, 10.0005, 10.001):
        bursts.asked(now)
        assert bursts.stands_aside(now, goes_on=True)
        assert bursts.stands_aside(now, goes_on=False)
    assert not bursts.stands_aside(10.001 + ASIDE_S * 1.1, goes_on=False)
    assert bursts.is_lately(10.001 + ASIDE_S * 1.1)
    assert not bursts.is_lately(10.001 + LATELY_S * 1.1)


@given(st.lists(st.floats(0, 1.9), min_size=1, max_size=60))
def test_single_thread_goes_on_filling_during_endless_faults(gaps: list[float]) -> None:
    """gaps: as parts of the gap that ends a burst."""
    bursts, now, stood_since = Bursts(), 0.0, 0.0
    for gap in gaps:
        if not bursts.stands_aside(now + gap * ASIDE_S, goes_on=True):
            stood_since = now + gap * ASIDE_S
        now += gap * ASIDE_S
        bursts.asked(now)
        if bursts.stands_aside(now, goes_on=True):
            assert now - stood_since < BURST_S
            assert bursts.stands_aside(now, goes_on=False)
