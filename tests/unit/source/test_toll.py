"""A capture whose source the OOM killer has visited is not published."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shim.contract.errors import CriuDumpFailed, SourceHarmed
from shim.criu.log import Cut
from shim.kernel import cgroup
from shim.kernel.cgroup import Freezer, OomKills
from shim.source import toll as tolls
from shim.source.toll import Toll, outlives_criu

if TYPE_CHECKING:
    from pathlib import Path


def v2(directory: Path, kills: int) -> None:
    (directory / "memory.events").write_text(f"low 0\noom 3\noom_kill {kills}\noom_group_kill 0\n")


def v1(directory: Path, kills: int) -> None:
    text = f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
    (directory / "memory.oom_control").write_text(text)


def test_kills_are_counted_in_both_versions(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    beneath = other / "beneath"
    for each in (one, beneath):
        each.mkdir(parents=True)
    v2(one, 7)
    assert OomKills(str(one)).count() == 7
    v1(other, 2)
    v1(beneath, 3)
    assert OomKills(str(other)).count() == 5, "version 1 counts each cgroup by itself"


def test_kernel_without_a_kill_count_gives_none(tmp_path: Path) -> None:
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n")
    assert OomKills(str(tmp_path)).count() == 0


def test_kill_count_of_a_removed_cgroup_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OomKills(str(tmp_path / "gone")).count()


def test_own_memory_is_charged_to_a_cgroup() -> None:
    assert cgroup.memory_used(os.getpid()) > 0


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a source whose cgroup is a directory, and whose processes are a list."""
    pids = [1, 2, 3]
    directory = tmp_path / "cri-abc.scope"
    directory.mkdir()
    v2(directory, 4)
    freezer = SimpleNamespace(path=str(directory), pids=lambda: list(pids))
    monkeypatch.setattr(Freezer, "of", lambda _: freezer)
    monkeypatch.setattr(OomKills, "of", lambda _: OomKills(str(directory)))
    return SimpleNamespace(container="abc", pid=1, pids=pids, cgroup=directory)


def test_processes_may_come_and_go_without_a_report(source: Any) -> None:
    toll = Toll(source)
    source.pids[:] = [1, 4]
    toll.check()


def test_killed_process_is_reported(source: Any) -> None:
    toll = Toll(source)
    v2(source.cgroup, 6)
    source.pids[:] = [1]
    with pytest.raises(SourceHarmed, match=r"killed 2 processes .* \(2 of 3 that there were"):
        toll.check()


def test_ended_container_is_reported(source: Any) -> None:
    toll = Toll(source)
    (source.cgroup / "memory.events").unlink()
    source.cgroup.rmdir()
    with pytest.raises(SourceHarmed, match="the container ended during its capture"):
        toll.check()


def test_pid_that_belongs_to_another_container_now_is_refused(source: Any) -> None:
    source.container = "other"
    with pytest.raises(ValueError, match="ended"):
        Toll(source)


def dump_that_fails(source: Any, left: list[int], cause: Exception | None) -> None:
    """Fails a dump of the source's processes, of which `left` are left then."""
    with outlives_criu(source) as pids:
        pids += source.pids
        source.pids[:] = left
        error = CriuDumpFailed("cannot dump", about="abc", why="it hung", do="")
        raise error from cause


@pytest.mark.parametrize(
    ("left", "told"),
    [([1, 3], "process 2 of the node"), ([2, 3], "the container ended during its capture")],
)
def test_process_that_ends_with_a_criu_that_was_cut_is_harm(
    source: Any, left: list[int], told: str
) -> None:
    with pytest.raises(SourceHarmed, match=f"{told}.*it hung"):
        dump_that_fails(source, left, Cut())


def test_whole_cgroup_that_ends_with_criu_is_harm(source: Any) -> None:
    def gone() -> list[int]:
        raise FileNotFoundError

    Freezer.of(1).pids = gone  # type: ignore[method-assign]
    with pytest.raises(SourceHarmed, match="the container ended"):
        dump_that_fails(source, [], Cut())


@pytest.mark.parametrize(
    ("left", "cause"), [([1], None), ([1, 2, 3, 4], Cut())], ids=["not cut", "all there"]
)
def test_failed_dump_that_harms_nobody_stays_a_failed_dump(
    source: Any, monkeypatch: pytest.MonkeyPatch, left: list[int], cause: Exception | None
) -> None:
    """Without a cut, processes that end do so by themselves."""
    monkeypatch.setattr(tolls, "_FALLS_WITHIN_S", 0.1)
    with pytest.raises(CriuDumpFailed, match="it hung"):
        dump_that_fails(source, left, cause)
