"""The sequence takes all steps of a swap in their order, or none."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shim.contract import journal
from shim.contract.errors import Blame, SwapFailed, SwapTooLate, blame_of
from shim.contract.paths import GPU_PAYLOAD
from shim.kernel.steps import durations
from shim.restore import sequence
from shim.restore.sequence import Step
from shim.restore.steps import Swap
from tests.unit.restore.swaps import a_swap

ARCHITECTURE = Path(__file__).parents[3] / "docs" / "architecture.md"
Take = Callable[[Swap], None]


class Trail:
    """The steps that were taken, undone and released, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]) -> None:
        self.passed: list[str] = []
        self._patch, self._facts = monkeypatch, facts
        self.replace()

    def replace(self, **bodies: Take) -> None:
        """Have every step leave its trail, and do only what `bodies` has for its name."""

        def step(old: Step) -> Step:
            def take(swap: Swap) -> None:
                swap.undo.callback(self.passed.append, f"undo {old.name}")
                if old.name == "turn":
                    swap.turn.callback(self.passed.append, "the next has the turn")
                if old.name == "check":
                    swap.captured = found
                self.passed.append(old.name)
                if body := bodies.get(old.name):
                    body(swap)

            return Step(old.name, take, for_gpus=old.for_gpus, of_snapshot=old.of_snapshot)

        found: Any = SimpleNamespace(facts=self._facts)
        self._patch.setattr(sequence, "TURN", step(sequence.TURN))
        self._patch.setattr(sequence, "IN_TURN", tuple(map(step, sequence.IN_TURN)))
        self._patch.setattr(sequence, "RESUME", step(sequence.RESUME))


class Server:
    """A page server that the swap keeps."""

    kept = False

    def keep(self) -> None:
        self.kept = True


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> Trail:
    return Trail(monkeypatch, {})


def swap_with(place: Path, server: object = None, **changes: object) -> Swap:
    swap = a_swap(place, time.monotonic() + 60, **changes)
    own: Any = server or Server()
    swap.server = own
    return swap


def test_steps_have_the_names_of_the_documented_table() -> None:
    section = ARCHITECTURE.read_text().partition("| step | action |")[2].partition("\n\n")[0]
    rows = re.findall(r"^ *\| (`[^|]*`) \|", section, re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert documented == [step.name for step in sequence.STEPS]


def test_only_steps_without_pod_and_node_blame_the_snapshot_for_lateness() -> None:
    found = [step.name for step in sequence.STEPS if step.of_snapshot]
    assert found == ["hash", "criu", "gpu_fill", "gpu"]


def test_all_steps_are_taken_and_kept(tmp_path: Path, trail: Trail) -> None:
    server = Server()
    swap = swap_with(tmp_path, server)
    sequence.run(swap)
    names = [step.name for step in sequence.IN_TURN if not step.for_gpus]
    assert trail.passed == ["turn", *names, "the next has the turn", "resume"]
    assert list(durations(swap.seconds)) == ["turn", *names, "resume"]
    assert server.kept
    assert list(journal.changes(f"{swap.private}/journal")) == [(journal.DONE, None)]


def test_gpu_steps_are_taken_for_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = Trail(monkeypatch, {GPU_PAYLOAD: "{}"})
    swap = swap_with(tmp_path)
    sequence.run(swap)
    assert list(durations(swap.seconds)) == [step.name for step in sequence.STEPS]
    assert trail.passed[-2:] == ["the next has the turn", "resume"]


@pytest.mark.parametrize("name", [step.name for step in sequence.STEPS if not step.for_gpus])
def test_failed_step_undoes_all_steps_in_reverse(tmp_path: Path, trail: Trail, name: str) -> None:
    def fails(_: Swap) -> None:
        raise OSError("no more")

    trail.replace(**{name: fails})
    swap = swap_with(tmp_path)
    with pytest.raises(SwapFailed, match=rf"failed in step {name} \[abc\]: OSError: no more"):
        sequence.run(swap)
    taken = [each for each in trail.passed if each in {step.name for step in sequence.STEPS}]
    assert taken[-1] == name
    undone = [each for each in trail.passed if each.startswith("undo ")]
    assert undone == [f"undo {each}" for each in reversed(taken)]
    assert not journal.is_locked(swap.private)


def test_error_of_quickthaw_stays_as_it_is(tmp_path: Path, trail: Trail) -> None:
    error = SwapFailed("as it was", about="abc", why="so", do="Look.")
    error.blame = Blame.OTHER

    def fails(_: Swap) -> None:
        raise error

    trail.replace(memory=fails)
    with pytest.raises(SwapFailed) as caught:
        sequence.run(swap_with(tmp_path))
    assert caught.value is error


@pytest.mark.parametrize(
    ("name", "blame"),
    [("shm", Blame.OTHER), ("criu", Blame.RESTORE), ("resume", Blame.OTHER)],
)
def test_step_beyond_the_deadline_fails_the_swap(
    tmp_path: Path, trail: Trail, name: str, blame: str
) -> None:
    def hangs(_: Swap) -> None:
        time.sleep(60)

    trail.replace(**{name: hangs})
    swap = swap_with(tmp_path)
    swap.until = time.monotonic() + 0.2
    with pytest.raises(SwapTooLate, match=f"deadline passed in step {name}") as caught:
        sequence.run(swap)
    assert blame_of(caught.value) == blame


def test_turn_has_a_shorter_deadline_than_the_resume_call(tmp_path: Path, trail: Trail) -> None:
    lefts = {}

    def notes(name: str) -> Take:
        def take(swap: Swap) -> None:
            lefts[name] = swap.until - time.monotonic()

        return take

    trail.replace(memory=notes("memory"), resume=notes("resume"))
    sequence.run(swap_with(tmp_path, turn_hold_s=7.0))
    assert lefts["memory"] <= 7 < lefts["resume"]
