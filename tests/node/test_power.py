"""Power never comes with a snapshot: attacks on the installed product, on a real node.

Each attack captures a container that has a power which the victim's pod does not ask for, and names
that snapshot in a pod without the power. The gate must refuse the snapshot, by the names of its
checks. With these checks taken out of the installed product the attack must succeed, measured on
the restored process: so these checks, and nothing else, keep the power away.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.node.attacking import (
    INSTALLED,
    SHARED,
    SYS_ADMIN,
    own_snapshot,
    product_without,
    shared_directory,
    start_victim,
    status_of,
)
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import HostPath, VolumeMount
from tests.node.swapping import (
    answer,
    assert_cold,
    assert_restored,
    first_answer,
    said,
    wipe_snapshots,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


COMMAND: Final = f"{INSTALLED}/bin/quickthaw"


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


def volume(path: str = SHARED, *, read_only: bool = False) -> VolumeMount:
    return VolumeMount("/data", HostPath(path), read_only=read_only)


@dataclass(frozen=True, slots=True)
class Attack:
    """strong: the power of the captured container. weak: the wish of the victim's pod instead.

    codes: the checks that refuse the snapshot. gained: whether a restored container has the power.
    """

    name: str
    codes: tuple[str, ...]
    strong: dict[str, Any]
    weak: dict[str, Any]
    gained: Callable[[Pod], bool]


def has(name: str, value: str) -> Callable[[Pod], bool]:
    return lambda pod: status_of(pod.container())[name].split()[0] == value


def writes(pod: Pod) -> bool:
    return answer(pod, "/write?path=/data/gained&size=1").status == 200


ATTACKS: Final = [
    Attack(
        "capabilities", ("capabilities", "seccomp"),
        {"add_capabilities": ["SYS_ADMIN"]}, {},
        lambda pod: bool(int(status_of(pod.container())["CapEff"], 16) & SYS_ADMIN),
    ),
    Attack("user", ("user", "process_user"), {}, {"user": 1000}, has("Uid", "0")),
    Attack("seccomp", ("seccomp",), {"seccomp": "Unconfined"}, {}, has("Seccomp", "0")),
    Attack(
        "no_new_privs", ("no_new_privs",), {}, {"no_new_privs": True}, has("NoNewPrivs", "0")
    ),
    Attack(
        "mount", ("mounts", "mounted"),
        {"mounts": [volume()]}, {"mounts": [volume(read_only=True)]}, writes,
    ),
]  # fmt: skip
"""Another tenant's snapshot comes to no check: it does not exist for a pod (test_namespaces.py)."""


def explained(node: Node, pod: Pod, snapshot: str) -> tuple[int, dict[str, Any]]:
    """Returns exit status and answer of `quickthaw explain`."""
    argv = [COMMAND, "explain", f"default/{pod.spec.name}", "--snapshot", snapshot, "--json"]
    done = node.call(argv)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.attack("A pod with less power asks for the snapshot of a pod with more")
def test_attack_is_refused_by_its_checks_and_by_no_other_check(
    swap_node: Node, attack: Attack
) -> None:
    taken = own_snapshot(swap_node, attack.name, attack.strong)
    victim = start_victim(swap_node, attack.name, attack.weak, taken.id)
    assert_cold(victim.container())
    assert first_answer(victim)["nonce"] != taken.nonce
    for code in attack.codes:
        said(swap_node, victim.container().id[:12], f"{code}: the snapshot has")
    status, told = explained(swap_node, victim, taken.id)
    assert (status, sorted(told["refused"])) == (1, sorted(attack.codes))
    victim.remove(grace_s=0)
    with product_without(swap_node, *attack.codes):
        attacked = start_victim(swap_node, attack.name, attack.weak, taken.id)
        assert_restored(attacked.container())
        assert first_answer(attacked)["nonce"] == taken.nonce
        assert attack.gained(attacked), "the attack is none: this test shows nothing"
        attacked.remove(grace_s=0)


def test_equal_pod_is_restored_with_exactly_the_captured_power(swap_node: Node) -> None:
    fields = {"no_new_privs": True, "drop_capabilities": ["ALL"]}
    taken = own_snapshot(swap_node, "equal", fields)
    pod = start_victim(swap_node, "equal", fields, taken.id)
    assert_restored(pod.container())
    found = status_of(pod.container())
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    status, told = explained(swap_node, pod, taken.id)
    assert (status, told["refused"]) == (0, [])
