"""Restored processes get the OOM scores of the new pod."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from shim.oci.spec import Spec
from shim.restore import oom

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def tree() -> Iterator[tuple[int, int]]:
    """Yields a process and its child, which run until the test ends."""
    code = "import os, time; print(os.fork() or os.getppid(), flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-ISE", "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        numbers = {int(parent.stdout.readline()) for _ in range(2)}
        (child,) = numbers - {parent.pid}
        yield parent.pid, child
        os.kill(child, 9)
        parent.kill()


def score(pid: int, value: int | None = None) -> int:
    with open(f"/proc/{pid}/oom_score_adj", "r+") as file:
        if value is not None:
            file.write(str(value))
            file.flush()
            file.seek(0)
        return int(file.read())


def test_whole_process_tree_gets_the_oom_score_of_the_new_pod(tree: tuple[int, int]) -> None:
    for pid in tree:
        score(pid, 500)
    oom.rescore(Spec({"process": {"oomScoreAdj": 900}}), tree[0])
    assert [score(pid) for pid in tree] == [900, 900]


def test_higher_oom_score_that_a_process_chose_stays(tree: tuple[int, int]) -> None:
    score(tree[0], 500)
    score(tree[1], 1000)
    oom.rescore(Spec({"process": {"oomScoreAdj": 900}}), tree[0])
    assert [score(pid) for pid in tree] == [900, 1000]


@pytest.mark.parametrize("given", [{}, {"process": {}}, {"process": {"oomScoreAdj": None}}])
def test_without_a_score_in_the_spec_nothing_is_changed(
    given: dict[str, Any], tree: tuple[int, int]
) -> None:
    score(tree[0], 500)
    oom.rescore(Spec(given), tree[0])
    assert score(tree[0]) == 500


def test_a_process_that_has_ended_is_no_error() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    oom.rescore(Spec({"process": {"oomScoreAdj": 900}}), ended.pid)
