"""Left-overs of a killed CRIU in /tmp."""

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.criu import mntns


@pytest.fixture
def left() -> Iterator[Path]:
    directory = Path(f"/tmp/.criu.mntns.{secrets.token_hex(3)}")
    directory.mkdir()
    yield directory
    if directory.exists():
        directory.rmdir()


def log_with(directory: Path, text: str) -> str:
    log = directory / "restore.log"
    log.write_text(f"(00.020910) cg: Set 1 is root one\n{text}")
    return str(log)


def test_the_directory_that_the_log_names_is_removed(tmp_path: Path, left: Path) -> None:
    log = log_with(tmp_path, f"(00.020913) mnt: \t\tWill mount 339 @ {left}/mnt-0000000339 /sys\n")
    mntns.remove(log, str(tmp_path / "state"))
    assert not left.exists()
    mntns.remove(log, str(tmp_path / "state"))


def test_other_directories_stay(tmp_path: Path, left: Path) -> None:
    mntns.remove(log_with(tmp_path, f"{left}\n{left}x/mnt-0\n/x{left}-mnt-0\n"), "/none")
    mntns.remove(str(tmp_path / "none"), "/none")
    assert left.exists()


def test_unnamed_directory_is_removed_only_for_a_brief_log_and_if_unused(
    tmp_path: Path, left: Path
) -> None:
    log = tmp_path / "restore.log"
    log.touch()
    holds = f"mount -t tmpfs used {left} && echo mounted && read line"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"mounted\n"
        mntns.remove(str(log), "/none", is_brief=True)
        assert left.exists(), "another restore is in the middle of it"
    mntns.remove(str(log), "/none")
    assert left.exists(), "a log with notes would have named it"
    mntns.remove(str(log), "/none", is_brief=True)
    assert not left.exists()


def test_mount_root_of_the_runtime_is_removed_and_its_state_stays(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "criu-root").mkdir(parents=True)
    (state / "state.json").touch()
    mntns.remove(str(tmp_path / "none"), str(state))
    assert [path.name for path in state.iterdir()] == ["state.json"]


def test_cgroup_view_is_removed_from_the_work_directory(tmp_path: Path) -> None:
    for name in (".criu.cgyard.a1B2c3", ".criu.cgmounts.d4E5f6"):
        (tmp_path / name).mkdir()
    (tmp_path / "dump.log").touch()
    mntns.remove(str(tmp_path / "restore.log"), "/none")
    assert [path.name for path in tmp_path.iterdir()] == ["dump.log"]
