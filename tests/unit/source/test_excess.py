"""Refuses a captured process with more power than its spec gives, and other ways around the
spec.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from shim.kernel.capabilities import NAMES, mask_of, names_of
from shim.oci.spec import Spec
from shim.source import excess as within
from tests.unit.specs import spec

if TYPE_CHECKING:
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
        self,
        pid: int,
        children: str = "",
        *,
        thread: int = 0,
        label: str = "pod (enforce)",
        namespaces: dict[str, str] | None = None,
        **status: str,
    ) -> None:
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
