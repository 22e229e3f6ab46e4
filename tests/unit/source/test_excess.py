"""Refuses a captured process with more power than its spec gives, and other ways around the
spec.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from shim.gate import volumes
from shim.kernel.capabilities import NAMES, mask_of, names_of
from shim.oci.spec import Spec
from shim.restore import oom
from shim.source import excess as within
from tests.unit.specs import spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

GIVEN = mask_of(["CAP_KILL", "CAP_CHOWN"])
STATUS = {
    "State": "S (sleeping)", "CapInh": "0", "CapPrm": f"{GIVEN:x}", "CapEff": "0",
    "CapBnd": f"{GIVEN:x}", "CapAmb": "0", "NoNewPrivs": "1", "Seccomp": "2",
}  # fmt: skip
SYS_ADMIN = f"{GIVEN | mask_of(['CAP_SYS_ADMIN']):x}"


class FakeProc:
    """A /proc with the files that are looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def process(
        self, pid: int, children: str = "", *, thread: int = 0, label: str = "pod (enforce)",
        namespaces: dict[str, str] | None = None, **status: str,
    ) -> None:  # fmt: skip
        for place in (self.root / str(pid), self.root / f"{pid}/task/{thread or pid}"):
            (place / "ns").mkdir(parents=True, exist_ok=True)
            (place / "attr").mkdir(exist_ok=True)
            text = "".join(f"{name}:\t{value}\n" for name, value in (STATUS | status).items())
            (place / "status").write_text(text)
            (place / "children").write_text(children if place.name == str(pid) else "")
            (place / "attr" / "current").write_text(label)
            kinds = dict.fromkeys(("mnt", "user", "net", "pid"), "1") | (namespaces or {})
            for name, inode in kinds.items():
                (place / "ns" / name).unlink(missing_ok=True)
                (place / "ns" / name).symlink_to(f"{name}:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    found = FakeProc(tmp_path)
    found.process(1, "2 3")
    found.process(2)
    found.process(3)
    return found


def excess(
    proc: FakeProc, given: dict[str, Any] | None = None, pids: tuple[int, ...] = (1, 2, 3)
) -> str:
    return within.excess(Spec(given or spec("1")), 1, set(pids), proc=str(proc.root))


def test_power_that_the_spec_gives_is_no_excess(proc: FakeProc) -> None:
    assert excess(proc) == ""


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"CapBnd": SYS_ADMIN}, "has CAP_SYS_ADMIN, which its spec does not give"),
        ({"CapEff": SYS_ADMIN}, "CAP_SYS_ADMIN"),
        ({"CapPrm": SYS_ADMIN}, "CAP_SYS_ADMIN"),
        ({"CapInh": SYS_ADMIN}, "CAP_SYS_ADMIN"),
        ({"CapAmb": SYS_ADMIN}, "CAP_SYS_ADMIN"),
        ({"CapBnd": f"{1 << 63:x}"}, "has 63, which"),
        ({"NoNewPrivs": "0"}, "can gain privileges"),
        ({"Seccomp": "0"}, "no system call filter"),
        ({"namespaces": {"user": "2"}}, "another user namespace"),
        ({"namespaces": {"mnt": "2"}}, "another mnt namespace"),
        ({"namespaces": {"time": "2"}}, "another time namespace"),
        ({"label": "unconfined"}, "another security label"),
    ],
)
@pytest.mark.parametrize("thread", [0, 30])
def test_each_excess_is_reported_also_of_a_single_thread(
    proc: FakeProc, more: dict[str, Any], told: str, thread: int
) -> None:
    proc.process(3, thread=thread, **more)
    assert told in excess(proc)
    assert excess(proc).startswith("process 3 ")


def test_a_process_of_the_tree_in_another_cgroup_is_a_stranger(proc: FakeProc) -> None:
    assert excess(proc, pids=(1, 2)) == "process 3 of its tree is in another cgroup"
    proc.process(3, State="Z (zombie)")
    assert excess(proc, pids=(1, 2)) == "", "no cgroup lists a zombie"


def test_a_privileged_spec_gives_more(proc: FakeProc) -> None:
    given = spec("1")
    given["process"]["capabilities"]["bounding"] = NAMES
    given["process"]["noNewPrivileges"] = False
    del given["linux"]["seccomp"]
    proc.process(3, CapBnd=f"{mask_of(NAMES):x}", NoNewPrivs="0", Seccomp="0")
    assert excess(proc, given) == ""


def test_this_process_is_within_a_spec_that_gives_all() -> None:
    given = {"process": {"capabilities": {"bounding": NAMES}}}
    assert within.excess(Spec(given), os.getpid(), {os.getpid()}) == ""


def test_capabilities_have_their_numbers() -> None:
    assert (NAMES[0], NAMES[21], NAMES[40]) == (
        "CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"
    )  # fmt: skip
    assert names_of(mask_of(["CAP_KILL", "cap_kill", "CAP_NONSENSE"])) == ["CAP_KILL"]


# Volumes


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    root = tmp_path / "volume"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").write_text("own")
    (root / "link").symlink_to("/etc/shadow")
    (root / "inner").symlink_to("sub/file")
    (root / "dir").symlink_to("sub")
    return root


def recorded(volume: Path, path: str, **changes: Any) -> dict[str, Any]:
    """Returns the record of the present file of this volume."""
    try:
        status = (volume / path.removeprefix("/data/")).lstat()
    except FileNotFoundError:
        status = volume.lstat()
    return {
        "path": path, "mode": status.st_mode, "uid": status.st_uid, "gid": status.st_gid,
        "rdev": status.st_rdev, "gone": False, "at": [[1, "fd/5"]],
    } | changes  # fmt: skip


def changed(volume: Path, *files: dict[str, Any], sockets_in: Sequence[str] = ()) -> list[str]:
    """Returns the files that the swap finds changed."""
    mounts = [
        {"destination": "/data", "type": "bind", "source": str(volume), "options": ["rbind"]},
        {"destination": "/data/tmp", "type": "tmpfs", "source": "tmpfs"},
    ]
    fact = {"files": [*files], "made": [], "sockets_in": [*sockets_in]}
    return volumes.changed(Spec({"mounts": mounts}), fact)


def test_link_in_a_volume_is_found(volume: Path) -> None:
    paths = ["/data/link", "/data/inner", "/data/dir/file", "/data/../../etc/shadow"]
    found = changed(volume, *(recorded(volume, path) for path in paths))
    assert found == [f"{path} leads over a link" for path in paths]
    assert changed(volume, sockets_in=["/data/sub", "/data/dir", "/data/gone"]) == [
        "/data/dir leads over a link"
    ]


def test_unchanged_or_missing_file_is_not_reported(volume: Path) -> None:
    same = [recorded(volume, path) for path in ("/data/sub/file", "/data/sub", "/data/gone")]
    assert changed(volume, *same) == []
    assert changed(volume, recorded(volume, "/data/link", gone=True)) == []
    place = recorded(volume, "/data", uid=5, mode=0o40700)
    assert changed(volume, place) == [], "the volume's own directory is the new pod's"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mode": 0o10644}, "is of another type"),
        ({"mode": 0o100600}, "has mode"),
        ({"uid": 1234}, "belongs to"),
        ({"gid": 1234}, "belongs to"),
        ({"rdev": 0x103}, "is another device"),
    ],
)
def test_other_file_in_the_same_place_is_reported(
    volume: Path, change: dict[str, Any], told: str
) -> None:
    (volume / "sub/file").chmod(0o644)
    (found,) = changed(volume, recorded(volume, "/data/sub/file", **change))
    assert told in found


def test_fifo_in_the_same_place_is_reported_without_blocking(volume: Path) -> None:
    record = recorded(volume, "/data/sub/file")
    (volume / "sub/file").unlink()
    os.mkfifo(volume / "sub/file")
    assert "is of another type" in changed(volume, record)[0]


def test_unreadable_file_in_a_volume_is_reported(volume: Path) -> None:
    """As one of a server that does not answer; here a name is too long."""
    path = f"/data/{'x' * 300}"
    record = recorded(volume, "/data/sub/file") | {"path": path}
    told = f"{path} cannot be looked at: File name too long"
    assert changed(volume, record, sockets_in=[path]) == [told, told]


def test_mount_inside_of_a_volume_does_not_belong_to_the_volume(volume: Path) -> None:
    (volume / "tmp").symlink_to("/etc")
    record = recorded(volume, "/data/tmp/passwd")
    assert changed(volume, record) == ["/data/tmp/passwd is in no volume of this pod"]


def test_a_fact_of_another_version_fits_no_container() -> None:
    facts: list[object] = [
        ["/data/f"],
        {"files": []},
        {"files": [{"path": "/f"}], "made": [], "sockets_in": []},
        {"files": [], "made": 7, "sockets_in": []},
        7,
    ]
    for fact in facts:
        with pytest.raises(ValueError, match="volume_files"):
            volumes.changed(Spec({}), fact)


@pytest.mark.parametrize(
    ("uid", "has", "mode", "write", "may"),
    [
        (0, [], 0o600, True, True), (7, [], 0o600, False, False), (7, [], 0o644, False, True),
        (7, [], 0o644, True, False), (7, ["CAP_DAC_READ_SEARCH"], 0o600, False, True),
        (7, ["CAP_DAC_READ_SEARCH"], 0o600, True, False), (7, ["CAP_CHOWN"], 0o600, True, True),
        (7, [], 0o666, True, True),
    ],
)  # fmt: skip
def test_only_files_that_the_containers_user_can_open_are_accepted(
    volume: Path, uid: int, has: list[str], mode: int, write: bool, may: bool
) -> None:
    file = volume / "sub/file"
    file.chmod(mode)
    spec = Spec({"process": {"user": {"uid": uid, "gid": 7}}})
    assert volumes.may_open(spec, mask_of(has), file.stat(), write=write) == may
    user = {"uid": uid, "gid": 7, "additionalGids": [file.stat().st_gid]}
    group = Spec({"process": {"user": user}})
    file.chmod(0o660)
    assert volumes.may_open(group, 0, file.stat(), write=True)


# The OOM killer's score


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
