"""The objects of a pod that belong to a container: records, objects that processes hold, and the
decision.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from protos import criu_pb2, nri_pb2
from shim.contract.errors import NotCapturable
from shim.criu import ipcobjects
from shim.criu.images import DamagedImage
from shim.daemon.company import Company
from shim.kernel import cgroup, mounts, sysvipc
from shim.kernel.stopping import Stop
from shim.kernel.sysvipc import Object
from shim.source import belongings, record
from shim.source.belongings import Belongings
from shim.source.record import PodRecord
from tests.node.kernel import CLONE_NEWIPC, CLONE_NEWNS
from tests.unit import rootfs_trees as trees

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.daemon.registry import Registry
    from shim.source.source import Source

OWN, OTHER = "c" * 64, "d" * 64
in_the_pod: set[int] = set()
"""Processes in the pod's cgroup; the others of a test share its IPC namespace."""


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    """Yields a pod's /dev/shm."""
    with trees.own_mounts(tmp_path):
        (path,) = trees.make_dirs(tmp_path, "shm")
        mounts.mount("shm", path, "tmpfs", 0, "mode=1777")
        yield Path(path)


@pytest.fixture(autouse=True)
def containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the directory of our records about two containers."""
    place = tmp_path / "containers"
    for name in (OWN, OTHER):
        (place / name).mkdir(parents=True)
    monkeypatch.setattr(record, "CONTAINERS", str(place))
    monkeypatch.setattr(belongings, "siblings", lambda _: set(in_the_pod))
    return place


def _of(shm: Path, pids: set[int], **records: PodRecord) -> Belongings:
    for name, each in records.items():
        record.write(OWN, {"before": record.BEFORE, "others": record.OTHERS}[name], each)
    source = SimpleNamespace(container=OWN, pid=os.getpid(), shm=str(shm))
    own = Belongings(cast("Source", source))
    own.looked_at(pids)
    return own


def _inode(*paths: Path) -> frozenset[int]:
    return frozenset(path.stat().st_ino for path in paths)


def _whole(*paths: Path, objects: frozenset[str] = frozenset()) -> PodRecord:
    return PodRecord(_inode(*paths), objects, is_whole=True)


def test_single_container_owns_everything_but_objects_there_before_it(shm: Path) -> None:
    for name in ("before", "made"):
        (shm / name).write_bytes(b"")
    own = _of(shm, set(), before=_whole(shm / "before"))
    assert own.file((shm / "made").stat(), "made")
    assert own.early((shm / "made").stat())
    assert not own.file((shm / "before").stat(), "before")


def test_single_container_owns_opened_left_overs_of_its_earlier_attempt(shm: Path) -> None:
    (shm / "before").write_bytes(b"")
    with (shm / "before").open("rb"):
        own = _of(shm, {os.getpid()}, before=_whole(shm / "before"))
        assert own.file((shm / "before").stat(), "before")


@pytest.fixture
def theirs(shm: Path) -> Iterator[Path]:
    """Yields a file that only a process of another container has mapped."""
    path = shm / "theirs"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); m = mmap.mmap(file.fileno(), 0); "
        "file.close(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        yield path
        child.kill()


def test_in_a_pod_of_several_the_holder_owns_an_object(shm: Path, theirs: Path) -> None:
    for name in ("before", "made", "open", "later"):
        (shm / name).write_bytes(b"")
    (shm / "d").mkdir()
    with (shm / "open").open("rb"):
        own = _of(
            shm, {os.getpid()}, before=_whole(shm / "before"),
            others=_whole(shm / "before", shm / "made"),
        )  # fmt: skip
        taken = {
            name: own.file((shm / name).stat(), name)
            for name in ("before", "made", "open", "theirs")
        }
        assert taken == {"before": False, "made": True, "open": True, "theirs": False}
        with pytest.raises(NotCapturable, match="another container of the pod made /dev/shm/later"):
            own.file((shm / "later").stat(), "later")
        with pytest.raises(NotCapturable, match="/dev/shm/d"):
            own.directory((shm / "d").stat(), "d", is_empty=True)
        assert not own.directory((shm / "d").stat(), "d", is_empty=False)


def test_holder_in_an_ipc_namespace_of_its_own_is_known_by_the_pods_cgroup(shm: Path) -> None:
    path = shm / "theirs"
    path.write_bytes(b"x")
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    argv = ["unshare", "--ipc", sys.executable, "-c", code, str(path)]
    with (
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
        path.open("rb"),
    ):
        assert child.stdout
        child.stdout.readline()
        in_the_pod.add(child.pid)
        own = _of(shm, {os.getpid()}, before=_whole(), others=_whole())
        with pytest.raises(NotCapturable, match="theirs is in use in this container, and is in"):
            own.file(path.stat(), "theirs")
        in_the_pod.clear()
        child.kill()


def test_processes_of_the_cgroup_around_are_siblings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("pod", "pod/own", "pod/other", "pod/other/deep", "another")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text(f"{number}\n{number + 10}\n")
    (tmp_path / "pod" / "gone").mkdir()
    own = cgroup.Freezer(str(tmp_path / "pod" / "own"))
    monkeypatch.setattr(cgroup.Freezer, "of", lambda _: own)
    assert cgroup.siblings(1) == {0, 10, 1, 11, 2, 12, 3, 13}
    own = cgroup.Freezer(str(tmp_path / "pod"))
    assert cgroup.siblings(1) == {0, 10, 1, 11, 2, 12, 3, 13}, "around it is no cgroup"


def test_object_that_both_containers_hold_is_refused(shm: Path, theirs: Path) -> None:
    (shm / "before").write_bytes(b"")
    with theirs.open("rb"), (shm / "before").open("rb"):
        nobody = record.NOTHING_KNOWN
        own = _of(shm, {os.getpid()}, before=_whole(shm / "before"), others=nobody)
        with pytest.raises(NotCapturable, match="theirs is in use in this container, and is in"):
            own.file(theirs.stat(), "theirs")
        with pytest.raises(NotCapturable, match="before is in use in this container, and was"):
            own.file((shm / "before").stat(), "before")
    made = _of(shm, {os.getpid()}, before=_whole(), others=_whole(theirs))
    with pytest.raises(NotCapturable, match="this container made /dev/shm/theirs, and another"):
        made.file(theirs.stat(), "theirs")


def test_without_a_record_no_object_counts_as_made_by_a_container(shm: Path) -> None:
    (shm / "f").write_bytes(b"")
    with pytest.raises(NotCapturable, match="nobody can tell"):
        _of(shm, set()).file((shm / "f").stat(), "f")


def test_inode_numbers_on_a_disk_prove_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    source = SimpleNamespace(container=OWN, pid=os.getpid(), shm=str(disk))
    record.write(OWN, record.BEFORE, _whole())
    belongings.checked(cast("Source", source))
    record.write(OWN, record.OTHERS, record.NOTHING_KNOWN)
    with pytest.raises(NotCapturable, match="no tmpfs"):
        belongings.checked(cast("Source", source))


# Records


def test_record_is_bounded(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (shm / str(number)).write_bytes(b"")
    (shm / "d" / "e").mkdir(parents=True)
    (shm / "link").symlink_to("/")
    found = record.take(str(shm), "")
    assert found.is_whole
    assert len(found.inodes) == 13
    monkeypatch.setattr(record, "_MOST_ENTRIES", 12)
    assert record.take(str(shm), "") == record.NOTHING_KNOWN
    assert record.take("/nowhere", "") == record.NOTHING_KNOWN


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}', "\xff"])
def test_damaged_record_is_an_error(containers: Path, text: str) -> None:
    (containers / OWN / record.BEFORE).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"."):
        record.read(OWN, record.BEFORE)


# Containers that are present


def _container(name: str, number: str, shm: str = "") -> nri_pb2.Container:
    found = nri_pb2.Container(id=number, pod_sandbox_id="s", name=name)
    found.state = 3  # type: ignore[assignment]  # running: generated names are unknown to mypy
    if shm:
        found.mounts.append(nri_pb2.Mount(destination="/dev/shm", source=shm))
    return found


def _company(*tracked: str) -> Company:
    found: list[Any] = [
        SimpleNamespace(container=each, pod=SimpleNamespace(sandbox="s")) for each in tracked
    ]
    return Company(cast("Registry", found))


def test_first_other_container_is_recorded(shm: Path) -> None:
    company = _company(OWN)
    arrived = company.arrives(_container("main", OWN, str(shm)), is_ours=True)
    arrived.tell(OWN)
    assert not record.has(OWN, record.OTHERS)
    (shm / "made").write_bytes(b"")
    company.arrives(_container("other", "o", str(shm)), is_ours=False)
    assert record.read(OWN, record.OTHERS) == _whole(shm / "made")
    (shm / "later").write_bytes(b"")
    company.arrives(_container("third", "t", str(shm)), is_ours=False)
    assert record.read(OWN, record.OTHERS) == _whole(shm / "made")


def test_container_created_second_counts_as_never_alone(shm: Path) -> None:
    company = _company()
    company.arrives(_container("other", "o", str(shm)), is_ours=False)
    (shm / "theirs").write_bytes(b"")
    company.arrives(_container("main", OWN, str(shm)), is_ours=True).tell(OWN)
    assert record.read(OWN, record.BEFORE) == _whole(shm / "theirs")
    assert record.read(OWN, record.OTHERS) == record.NOTHING_KNOWN


def test_ended_container_does_not_count_as_present(shm: Path) -> None:
    company = _company()
    company.arrives(_container("init", "i", str(shm)), is_ours=False)
    company.leaves(_container("init", "i"))
    company.arrives(_container("main", "m", str(shm)), is_ours=True)
    company.arrives(_container("main", OWN, str(shm)), is_ours=True).tell(OWN)
    assert not record.has(OWN, record.OTHERS), "its own earlier attempt is nobody, too"


def test_container_that_came_while_daemon_was_down_makes_owners_unknown() -> None:
    company = _company(OWN, OTHER)
    company.replace_all([_container("main", OWN), _container("other", OTHER)])
    for each in (OWN, OTHER):
        assert record.read(each, record.OTHERS) == record.NOTHING_KNOWN


# System V objects


def _in_new_ipc_namespace(code: str) -> list[Object]:
    unshared = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare({CLONE_NEWIPC | CLONE_NEWNS}) == 0
{code}
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", unshared], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        found = sysvipc.objects(f"/proc/{child.pid}/ns/ipc")
        assert [each.creator for each in found if each.kind == "shm"] == [child.pid]
        child.kill()
    return found


def test_listing_another_ipc_namespace_leaves_our_own_unchanged() -> None:
    here = os.readlink("/proc/thread-self/ns/ipc")
    found = _in_new_ipc_namespace(
        "libc.shmget(0x7e, 4096, 0o1600); libc.semget(0x7d, 2, 0o1600); libc.msgget(0x7c, 0o1600)"
    )
    kinds = [(each.kind, each.key) for each in found]
    assert kinds == [("shm", 0x7E), ("sem", 0x7D), ("msg", 0x7C)]
    assert os.readlink("/proc/thread-self/ns/ipc") == here
    assert str(found[0]).startswith("System V shared memory segment")
    assert found[0].name == f"shm:{found[0].number}"


def test_list_of_objects_is_read_no_further_than_its_limit() -> None:
    def many() -> Iterator[str]:
        yield "key semid perms"
        for number in range(100):
            assert number <= 7, "it reads on"
            yield f"0 {number} 600"

    assert len(list(sysvipc.listed("sem", islice(many(), 4), 7))) == 3
    with pytest.raises(ValueError, match="too many"):
        list(sysvipc.listed("sem", many(), 7))


def test_attached_segment_counts_as_held() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(0, 4096, 0o1600)
    address = libc.shmat(number, None, 0)
    try:
        held = belongings._Held()
        own = object.__new__(Belongings)
        own._device, own._stop = 0, Stop()
        own._look_at(os.getpid(), held)
        assert number in held.segments
    finally:
        libc.shmdt(ctypes.c_void_p(address))
        libc.shmctl(number, 0, None)


MAGIC = struct.pack("<II", 0x54564319, 0x1234)


def _entry(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return struct.pack("<I", len(raw)) + raw


def _desc(number: int) -> criu_pb2.IpcDesc:
    return criu_pb2.IpcDesc(id=number)


def _sem(number: int, count: int) -> bytes:
    values = bytes(-(-count * 2 // 8) * 8)
    return _entry(criu_pb2.IpcSem(desc=_desc(number), nsems=count)) + values


def _queue(number: int, *texts: bytes) -> bytes:
    out = _entry(criu_pb2.IpcMsgQueue(desc=_desc(number), qnum=len(texts)))
    for text in texts:
        out += _entry(criu_pb2.IpcMsg(msize=len(text))) + text + bytes(-len(text) % 8)
    return out


def test_objects_of_others_are_removed_from_images_with_all_their_data(tmp_path: Path) -> None:
    shm, sem, msg = (tmp_path / f"ipcns-{kind}-10.img" for kind in sysvipc.KINDS)
    segments = [_entry(criu_pb2.IpcShm(desc=_desc(n), size=4096, in_pagemaps=True)) for n in (0, 5)]
    shm.write_bytes(MAGIC + b"".join(segments))
    sem.write_bytes(MAGIC + _sem(0, 3) + _sem(1, 5) + _sem(32768, 4))
    msg.write_bytes(MAGIC + _queue(7, b"theirs", b"secret" * 9) + _queue(8, b"own"))
    for number in (0, 5):
        (tmp_path / f"pagemap-shmem-{number}.img").write_bytes(b"")
    gone = [Object("shm", 5, 1, 0), Object("sem", 1, 1, 0), Object("msg", 7, 1, 0)]
    ipcobjects.leave_out(tmp_path, gone)
    assert shm.read_bytes() == MAGIC + segments[0]
    assert sem.read_bytes() == MAGIC + _sem(0, 3) + _sem(32768, 4)
    assert msg.read_bytes() == MAGIC + _queue(8, b"own")
    assert [path.name for path in tmp_path.glob("pagemap-*")] == ["pagemap-shmem-0.img"]
    ipcobjects.leave_out(tmp_path, [])
    assert shm.read_bytes() == MAGIC + segments[0]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_damaged_image_of_ipc_objects_is_reported(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ipcns-msg-10.img"
    path.write_bytes((MAGIC + _queue(7, b"theirs", b"secret" * 9))[:-cut])
    with pytest.raises(DamagedImage):
        ipcobjects.leave_out(tmp_path, [Object("msg", 9, 1, 0)])
