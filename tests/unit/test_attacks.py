"""The table of `make attacks` says "held" for nothing but tests that passed in every phase."""

from typing import Literal

import pytest

from tests.attacks import Attack, Attacks


def report(
    when: Literal["setup", "call", "teardown"], outcome: Literal["passed", "failed", "skipped"]
) -> pytest.TestReport:
    return pytest.TestReport(
        "test_x", ("test_x.py", 1, "test_x"), {}, outcome, "the mode changed", when, duration=0.5
    )


@pytest.mark.parametrize("phase", ["setup", "call", "teardown"])
def test_an_attack_that_fails_in_any_phase_is_not_held(phase: str) -> None:
    attacks = Attacks()
    attacks.found["test_x"] = Attack("A pod tries", "", "test_x")
    for when in ("setup", "call", "teardown"):
        attacks.pytest_runtest_logreport(report(when, "failed" if when == phase else "passed"))
    (attack,) = attacks.ran()
    assert (attack.held, attack.why_not) == (False, f"{phase}: the mode changed")


def test_a_skipped_attack_is_not_held() -> None:
    attacks = Attacks()
    attacks.found["test_x"] = Attack("A pod tries", "", "test_x")
    attacks.pytest_runtest_logreport(report("setup", "skipped"))
    assert [each.held for each in attacks.ran()] == [False]


def test_an_attack_that_passes_is_held() -> None:
    attacks = Attacks()
    attacks.found["test_x"] = Attack("A pod tries", "", "test_x")
    for when in ("setup", "call", "teardown"):
        attacks.pytest_runtest_logreport(report(when, "passed"))
    assert [(each.held, each.seconds) for each in attacks.ran()] == [(True, 1.5)]
