"""A restored container gets the cgroup mounts that the runtime's `create` would have made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shim.contract.errors import Blame, SwapFailed
from shim.criu import options
from shim.oci.spec import Spec
from shim.restore import cgroups

if TYPE_CHECKING:
    from pathlib import Path

ID = "f" * 64
PLACE = "/sys/fs/cgroup"
V1 = ("memory", "cpu,cpuacct", "pids")


def spec(path: str = f"/kubepods/pod1/{ID}", *, namespace: bool = False) -> Spec:
    kinds = ["mount", "cgroup"] if namespace else ["mount"]
    return Spec({
        "mounts": [
            {"destination": "/proc", "type": "proc"},
            {"destination": PLACE, "type": "cgroup", "options": ["ro"]},
        ],
        "linux": {"cgroupsPath": path, "namespaces": [{"type": kind} for kind in kinds]},
    })  # fmt: skip


def process(
    place: Path, own: dict[str, str], mounts: dict[str, tuple[str, str]], unified: str = ""
) -> str:
    """Make a directory like a process's in /proc. own: path of its cgroup by hierarchy. mounts: the
    root of each mount, and its target. unified: the root of version 2.
    """
    lines = [f"{at}:{names}:{path}" for at, (names, path) in enumerate(own.items(), 1)]
    (place / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    rows = ["20 1 0:1 / / rw - overlay overlay rw,lowerdir=/a - cgroup"]
    rows += [
        f"{30 + at} 20 0:{at} {root} {target} rw,nosuid - cgroup cgroup rw,{names}"
        for at, (names, (root, target)) in enumerate(mounts.items())
    ]
    if unified:
        rows.append(f"60 20 0:9 {unified} {PLACE} ro - cgroup2 cgroup rw")
    (place / "mountinfo").write_text("".join(f"{row}\n" for row in rows))
    return str(place)


def node(place: Path, own: str = "/system.slice/containerd.service", root: str = "/") -> str:
    """Make a process of the runtime, on a node with cgroups of version 1."""
    return process(
        place, dict.fromkeys(V1, own), {names: (root, f"{PLACE}/{names}") for names in V1}
    )


def sources(found: Spec, proc: str, *, is_systemd: bool = False) -> dict[str, str]:
    return cgroups.sources(found, ID, is_systemd=is_systemd, proc=proc)


def test_each_mount_gets_the_containers_cgroup(tmp_path: Path) -> None:
    assert sources(spec(), node(tmp_path)) == {
        f"{PLACE}/{names}": f"{PLACE}/{names}/kubepods/pod1/{ID}" for names in V1
    }


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (f"kubepods-pod1.slice:cri-containerd:{ID}",
         f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope"),
        (f"system.slice:runc:{ID}", f"/system.slice/runc-{ID}.scope"),
        ("", f"/system.slice/runc-{ID}.scope"),
        (f"-.slice:a:{ID}", f"/a-{ID}.scope"),
        (":a:b.slice", "/system.slice/b.slice"),
    ],
)  # fmt: skip
def test_units_of_systemd_lie_in_their_slices(tmp_path: Path, told: str, found: str) -> None:
    got = sources(spec(told), node(tmp_path), is_systemd=True)
    assert got[f"{PLACE}/memory"] == f"{PLACE}/memory{found}"


@pytest.mark.parametrize("told", ["a.slice:b", "a:b:c", "a--b.slice:b:c", "a/b.slice:b:c"])
def test_malformed_unit_fails_without_blame(tmp_path: Path, told: str) -> None:
    with pytest.raises(SwapFailed, match="slice") as caught:
        sources(spec(told), node(tmp_path), is_systemd=True)
    assert caught.value.blame == Blame.OTHER


@pytest.mark.parametrize(
    ("told", "below"),
    [("own", "node/own"), ("../../up", "node/up"), ("", f"node/{ID}"), ("/../a", "a")],
)
def test_relative_path_lies_below_the_runtimes_own_cgroup(
    tmp_path: Path, told: str, below: str
) -> None:
    got = sources(spec(told), node(tmp_path, own="/outer/node", root="/outer"))
    assert got[f"{PLACE}/memory"] == f"{PLACE}/memory/{below}"


def test_hierarchy_that_the_runtime_does_not_manage_keeps_the_runtimes_choice(
    tmp_path: Path,
) -> None:
    own = {"memory": "/a", "name=mine": "/a"}
    at = {names: ("/", f"{PLACE}/{names.removeprefix('name=')}") for names in own}
    assert list(sources(spec(), process(tmp_path, own, at))) == [f"{PLACE}/memory"]


def test_second_mount_of_a_hierarchy_counts_as_little_as_for_the_runtime(tmp_path: Path) -> None:
    proc = process(tmp_path, {"memory": "/a"}, {"memory": ("/", f"{PLACE}/memory")})
    with open(f"{proc}/mountinfo", "a") as file:
        file.write("70 20 0:0 / /elsewhere/other rw - cgroup cgroup rw,memory\n")
    assert list(sources(spec(), proc)) == [f"{PLACE}/memory"]


def test_container_with_a_namespace_or_without_the_mount_gets_nothing(tmp_path: Path) -> None:
    proc = node(tmp_path)
    assert sources(spec(namespace=True), proc) == {}
    assert sources(Spec({**spec().json, "mounts": []}), proc) == {}


def test_version_2_gets_nothing(tmp_path: Path) -> None:
    assert sources(spec(), process(tmp_path, {"": "/a"}, {}, unified="/")) == {}


@pytest.mark.parametrize("odd", ["a b", "a#b", 'a"b', "a\\b", "a\nb"])
def test_path_that_no_option_can_have_fails_without_blame(tmp_path: Path, odd: str) -> None:
    with pytest.raises(SwapFailed, match="characters") as caught:
        sources(spec(f"/{odd}/{ID}"), node(tmp_path))
    assert caught.value.blame == Blame.OTHER


def test_options_of_criu_name_the_sources(tmp_path: Path) -> None:
    options.write(str(tmp_path / "criu.conf"), sources={"/sys/fs/cgroup/a": "/sys/fs/cgroup/a/b"})
    lines = (tmp_path / "criu.conf").read_text().splitlines()
    assert lines[-1] == "external mnt[/sys/fs/cgroup/a]:/sys/fs/cgroup/a/b"


# The look at the result


OWN = f"/kubepods/pod1/{ID}"


def seen(place: Path, root: str, own: str = OWN) -> str:
    return process(
        place, dict.fromkeys(V1, own), {names: (root, f"{PLACE}/{names}") for names in V1}
    )


def test_container_in_its_own_cgroups_passes(tmp_path: Path) -> None:
    assert cgroups.difference(spec(), ID, seen(tmp_path, OWN)) == ""
    assert cgroups.difference(spec(), ID, seen(tmp_path, OWN, own=f"{OWN}/nested")) == ""


@pytest.mark.parametrize("root", ["/", "/kubepods", "/kubepods/pod1", "/kubepods/pod2/other"])
def test_mount_of_another_cgroup_is_found(tmp_path: Path, root: str) -> None:
    found = cgroups.difference(spec(), ID, seen(tmp_path, root))
    assert found == f"{PLACE}/memory shows the cgroup {root}"


def test_process_in_other_cgroups_is_found(tmp_path: Path) -> None:
    other = "/kubepods/pod2/" + "e" * 64
    found = cgroups.difference(spec(), ID, seen(tmp_path, other, own=other))
    assert found == f"the process is in {other}"


def test_version_2_is_seen_from_the_root_of_the_namespace(tmp_path: Path) -> None:
    def found(root: str, own: str = OWN, *, namespace: bool = True) -> str:
        proc = process(tmp_path, {"": own}, {}, unified=root)
        return cgroups.difference(spec(namespace=namespace), ID, proc)

    assert found(OWN) == ""
    assert found("/") == f"{PLACE} shows the cgroup /"
    assert found("/", namespace=False) == "", "there every container sees all"
    assert found("/kubepods/pod2/other", "/kubepods/pod2/other").startswith("the process is in")


def test_process_that_has_ended_is_no_failure() -> None:
    cgroups.check(spec(), ID, (1 << 22) - 1)
