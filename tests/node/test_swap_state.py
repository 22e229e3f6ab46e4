"""Memory and shared objects of processes are there after a restore, with the same permissions."""

import dataclasses
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.node import criu_user
from tests.node.conftest import SHELL_IMAGE
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec, EmptyDir, VolumeMount
from tests.node.swapping import (
    PROBE,
    RUN,
    SnapshotRef,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    is_restored,
    lines_about,
    nothing_left,
    probe,
    published,
    restored,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

WHEN_TOLD = wishes(capture_when="signal")


def worker(name: str, **fields: Any) -> ContainerSpec:
    """Returns a container with another worker of the probe's image."""
    return ContainerSpec(PROBE, command=["python3", "-m", f"workers.{name}"], **fields)


def tell_ready(pod: Pod) -> None:
    """Write `ready` in the control directory, as the workload would."""
    pod.node.path(f"{RUN}/control/{pod.container().id}/ready").touch()


# Processes, and the objects that they share


def test_restored_family_of_processes_is_whole(swap_node: Node) -> None:
    snapshot = captured(swap_node, worker("fork"))
    source = snapshot.source
    pod = restored(swap_node, worker("fork"))
    for each in (source, pod):
        checked = ask(each, "/check")
        assert checked["ok"], checked["items"]
    there, here = ask(source, "/state"), ask(pod, "/state")
    assert (here["nonce"], here["children"]) == (there["nonce"], there["children"])
    assert ask(pod, "/check")["ok"], "a second time"


SPAWNED = """
    import multiprocessing, threading
    from workers.serving import Identity, LineLog, Server

    def count(turn, done, total):
        while turn.acquire():
            with total.get_lock():
                total.value += 1
            done.release()

    def check(_):
        turn.release()
        return {"answered": done.acquire(timeout=30), "total": total.value}

    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        turn, done, total = context.Semaphore(0), context.Semaphore(0), context.Value("i", 0)
        context.Process(target=count, args=(turn, done, total), daemon=True).start()
        me = Identity("spawned")
        routes = {"/state": lambda _: me.describe(), "/check": check}
        Server("0.0.0.0", 8000, routes, LineLog(), me).start()
        threading.Event().wait()
"""
"""Named semaphores, whose mapped name glibc has unlinked, and a mapped file without a name."""


def test_semaphores_and_shared_memory_of_spawned_processes_are_restored(swap_node: Node) -> None:
    program = 'printf %s "$PROGRAM" > /srv/spawned.py; exec python3 /srv/spawned.py'
    spec = ContainerSpec(
        PROBE, command=["sh", "-c", program], env={"PROGRAM": textwrap.dedent(SPAWNED)}
    )

    def count_once(pod: Pod) -> None:
        assert ask(pod, "/check") == {"answered": True, "total": 1}
        tell_ready(pod)

    source = captured(swap_node, spec, annotations=WHEN_TOLD, before=count_once).source
    pod = restored(swap_node, spec, annotations=WHEN_TOLD)
    assert ask(pod, "/check") == {"answered": True, "total": 2}
    assert ask(source, "/check") == {"answered": True, "total": 2}
    assert ask(pod, "/check") == {"answered": True, "total": 3}
    names = [set(each.container().output(["ls", "/dev/shm"]).split()) for each in (source, pod)]
    assert names[0] == names[1]


def fill(pod: Pod) -> None:
    """Have the probe do everything that only memory and /dev/shm know of."""
    ask(pod, "/spin?count=4")
    for _ in range(3):
        ask(pod, "/count")
    ask(pod, "/write?path=/dev/shm/named&size=100000&seed=3")
    ask(pod, "/mkdir?path=/dev/shm/below")
    ask(pod, "/hold?name=open&path=/dev/shm/below/open&size=8192&seed=4")
    ask(pod, "/hold?name=mapped&path=/dev/shm/mapped&size=8192&seed=5&map=1")
    ask(pod, "/hold?name=unlinked&path=/dev/shm/unlinked&size=8192&seed=6&delete=1")
    ask(pod, "/hold?name=only-mapped&path=/dev/shm/gone&size=8192&seed=7&map=1&delete=1")
    ask(pod, "/ready")


def test_source_and_replica_both_continue_with_threads_and_shared_memory(swap_node: Node) -> None:
    spec = probe(env={"CASE": "busy"})
    source = captured(swap_node, spec, annotations=WHEN_TOLD, before=fill).source
    pod = restored(swap_node, spec, annotations=WHEN_TOLD)
    for each in (source, pod):
        assert ask(each, "/count")["counter"] == 4
        threads_go_on(each)
        held = ask(each, "/held")
        assert {name: file["ok"] for name, file in held.items()} == dict.fromkeys(held, True)
        deleted = {name: file["deleted"] for name, file in held.items()}
        assert deleted == {"open": False, "mapped": False, "unlinked": True, "only-mapped": True}
        assert ask(each, "/append?name=unlinked&text=more")["ok"], "it can still be written"
    named = [ask(each, "/tree?path=/dev/shm") for each in (source, pod)]
    assert kept(named[0]) == kept(named[1])
    ask(pod, "/write?path=/dev/shm/named&size=10&seed=9")
    assert kept(ask(source, "/tree?path=/dev/shm")) == kept(named[0]), "it is the pod's own"


def threads_go_on(pod: Pod) -> None:
    """Assert that each of the probe's threads counts on."""
    before = ask(pod, "/threads")["threads"]

    def advanced() -> bool:
        now = ask(pod, "/threads")["threads"]
        return all(one > then for one, then in zip(now, before, strict=True))

    wait_until(advanced, "a thread stands still", pod.node)


def kept(tree: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the attributes of files that a copy keeps: not the device and inode numbers."""
    return {
        name: {fact: value for fact, value in facts.items() if fact not in ("device", "inode")}
        for name, facts in tree.items()
    }


def test_quarter_gib_of_memory_is_right_to_the_last_byte(swap_node: Node) -> None:
    spec = worker("memory", env={"SIZE_MIB": "256"})
    source = swap_node.kubelet.run_pod("source", [spec], annotations=wishes())
    published(source)
    pod = restored(swap_node, spec)
    nonces = {first_answer(each)["nonce"] for each in (source, pod)}
    assert len(nonces) == 1
    captured_sum = ask(pod, "/checksum")
    assert (captured_sum["ok"], captured_sum["pages"]) == (True, 65536), captured_sum
    ask(pod, "/touch?n=5000&seed=7")
    touched_sum = ask(pod, "/checksum")
    assert touched_sum["ok"], touched_sum
    source_sum = ask(source, "/checksum")
    assert (source_sum["ok"], source_sum["checksum"]) == (True, captured_sum["checksum"])
    assert touched_sum["checksum"] != source_sum["checksum"]


# Pods of more shapes


def test_both_containers_of_a_pod_are_restored(swap_node: Node) -> None:
    specs = [
        probe(name="first", env={"CASE": "first"}),
        probe(name="second", env={"CASE": "second", "PORT": "8001"}),
    ]
    annotations = wishes(**{"capture_when.second": "http://:8001/health"})
    source = swap_node.kubelet.run_pod("source", specs, annotations=annotations)
    for name in ("first", "second"):
        published(source, name)
    pod = swap_node.kubelet.run_pod("replica", specs, annotations=annotations)
    for port, container in zip((8000, 8001), pod.containers.values(), strict=True):
        assert_restored(container)
        nonces = {ask(each, "/state", port=port)["nonce"] for each in (source, pod)}
        assert len(nonces) == 1


def test_pod_with_shared_pid_namespace_starts_cold_and_learns_the_reason(swap_node: Node) -> None:
    spec = probe(env={"CASE": "shared processes"})
    pod = swap_node.kubelet.run_pod("pod", [spec], annotations=wishes(), share_processes=True)
    first_answer(pod)
    why = said(swap_node, pod.container().id[:12], "no snapshot was made")
    assert "it has no PID namespace of its own" in why
    assert_cold(pod.container())
    assert ask(pod, "/count")["counter"] == 1


def test_container_with_a_terminal_learns_why_it_is_not_captured(swap_node: Node) -> None:
    spec = probe(env={"CASE": "terminal"}, tty=True)
    pod = swap_node.kubelet.run_pod("pod", [spec], annotations=wishes())
    first_answer(pod)
    assert "it has a terminal" in said(swap_node, pod.container().id[:12], "no snapshot was made")
    assert ask(pod, "/count")["counter"] == 1


# Credentials

POWERS: dict[str, dict[str, Any]] = {
    "unprivileged": {
        "user": 1000,
        "group": 1001,
        "supplemental_groups": (2000, 2001),
        "drop_capabilities": ("ALL",),
        "no_new_privs": True,
        "read_only_root": True,
    },
    "root with some": {"add_capabilities": ("NET_ADMIN",), "drop_capabilities": ("MKNOD",)},
    "unconfined": {"seccomp": "Unconfined"},
}


HIDDEN = ("/proc/acpi", "/proc/scsi", "/sys/firmware")
"""Directories over which the runtime puts an empty tmpfs, as far as this kernel has them."""


def hidden(pod: Pod) -> list[tuple[str, str, str, str]]:
    """Returns the mounts over a path, and their options."""
    found = sorted(
        (each["destination"], each["type"], each["options"], each["super_options"])
        for each in ask(pod, "/mounts")
        if each["destination"] in HIDDEN
    )
    assert found
    assert {kind for _, kind, _, _ in found} == {"tmpfs"}
    return found


@pytest.mark.parametrize("power", POWERS)
def test_restored_process_has_the_permissions_of_a_cold_start(swap_node: Node, power: str) -> None:
    spec = probe(env={"CASE": power}, **POWERS[power])
    with criu_user.dumping(swap_node, spec.user or 0, spec.group or 0):
        source = captured(swap_node, spec).source
    pod = restored(swap_node, spec)
    cold, warm = ask(source, "/who"), ask(pod, "/who")
    for name in cold["status"].keys() - {"Threads", "NSpid"}:
        assert warm["status"][name] == cold["status"][name], name
    for fact in ("uid", "gid", "groups", "cwd", "umask", "limits", "oom_score_adj", "apparmor"):
        assert warm[fact] == cold[fact], fact
    assert hidden(pod) == hidden(source)
    assert warm["status"]["Seccomp"] == ("0" if power == "unconfined" else "2")
    if power == "unprivileged":
        assert warm["status"]["Uid"] == "1000 1000 1000 1000"
        assert (warm["status"]["CapBnd"], warm["status"]["NoNewPrivs"]) == ("0" * 16, "1")
        inside = pod.container().output(["sh", "-c", "id -u; touch /x 2>&1 || true"])
        assert "1000" in inside
        assert "Read-only file system" in inside
        assert ask(pod, "/restored")["pod"] == "replica", "it can read what it is told"


# Pods that do not match


def grow(pod: Pod) -> None:
    """Use more memory than a limit that the runtime itself can still start within."""
    ask(pod, "/allocate?mib=64")
    ask(pod, "/ready")


@pytest.fixture(scope="module")
def plain(swap_node: Node, shell_archive: Path) -> Iterator[SnapshotRef]:
    """Yields the named snapshot of the container from which each following spec differs in a
    single property.
    """
    if SHELL_IMAGE not in swap_node.cri.image_names():
        swap_node.import_image(shell_archive)
    with nothing_left(swap_node):
        taken = captured(
            swap_node, PLAIN, annotations=wishes("plain", capture_when="signal"), before=grow
        )
    yield taken
    wipe_snapshots(swap_node)


RESTORE_PLAIN = {"quickthaw.io/restore": "plain"}
PLAIN = probe(env={"CASE": "plain"}, command=["python3"], args=["-m", "workers.probe"])
SCRATCH = VolumeMount("/scratch", EmptyDir("scratch"))
OTHERS: dict[str, tuple[Mapping[str, Any], str]] = {
    "image": ({"image": SHELL_IMAGE, "command": ["sleep"], "args": ["1000"]}, "image_digest"),
    "environment": ({"env": {"CASE": "other"}}, "env"),
    "arguments": ({"args": ["-B", "-m", "workers.probe"]}, "args"),
    "user": ({"user": 1000}, "user"),
    "capabilities": ({"add_capabilities": ["NET_ADMIN"]}, "capabilities"),
    "fewer-capabilities": ({"drop_capabilities": ["NET_RAW"]}, "capabilities"),
    "seccomp": ({"seccomp": "Unconfined"}, "seccomp"),
    "mounts": ({"mounts": [SCRATCH]}, "mounts"),
    "root": ({"read_only_root": True}, "root_readonly"),
    "memory": ({"memory_limit_bytes": 48 << 20}, "memory"),
}
"""The spec of another container, and the fact that the journal names."""


def test_container_that_differs_starts_cold_and_journal_names_the_fact(
    swap_node: Node, plain: SnapshotRef
) -> None:
    specs = [
        dataclasses.replace(PLAIN, name=name, **change) for name, (change, _) in OTHERS.items()
    ]
    pod = swap_node.kubelet.run_pod("others", specs, annotations=RESTORE_PLAIN)
    for name, (_, fact) in OTHERS.items():
        container = pod.container(name)
        assert not is_restored(container), name
        why = said(swap_node, container.id[:12], f"{plain.id[:12]} does not fit")
        assert "starts cold" in why
        assert f" {fact}: " in why, name
        assert len(why) < 1000, "of what differs, only that"
    same = dataclasses.replace(PLAIN, name="same")
    pod = swap_node.kubelet.run_pod("same", [same], annotations=RESTORE_PLAIN)
    assert_restored(pod.container("same"))


def test_pod_of_another_namespace_starts_cold(swap_node: Node, plain: SnapshotRef) -> None:
    pod = swap_node.kubelet.run_pod(
        "other", [PLAIN], annotations=wishes("plain"), namespace="elsewhere"
    )
    assert_cold(pod.container())
    assert "there is no snapshot 'plain'" in said(swap_node, pod.container().id[:12], "cold")
    assert first_answer(pod)["nonce"] != plain.nonce


def test_pod_with_shared_pid_namespace_does_not_fit_a_snapshot_without(
    swap_node: Node, plain: SnapshotRef
) -> None:
    pod = swap_node.kubelet.run_pod(
        "other", [PLAIN], annotations=RESTORE_PLAIN, share_processes=True
    )
    assert_cold(pod.container())
    why = said(swap_node, pod.container().id[:12], f"{plain.id[:12]} does not fit")
    assert "namespaces: " in why


def per_pod(pod: Pod, service_ip: str) -> ContainerSpec:
    """Returns a probe with kubelet's environment variables for each pod: of the pod, of
    services.
    """
    own = {"POD_NAME": pod.spec.name, "POD_UID": pod.uid, "POD_IP": pod.ip}
    links = {"SHOP_SERVICE_HOST": service_ip, "SHOP_SERVICE_PORT": "80"}
    links |= {"SHOP_PORT": f"tcp://{service_ip}:80", "SHOP_PORT_80_TCP_ADDR": service_ip}
    return probe(env={"CASE": "per pod", **own, **links})


def test_variables_that_differ_from_pod_to_pod_do_not_matter(swap_node: Node) -> None:
    for name, service_ip in (("source", "10.96.1.1"), ("replica", "10.96.2.2")):
        pod = swap_node.kubelet.make_pod(name, [probe()], annotations=wishes())
        pod.run_sandbox()  # kubelet, too, knows the address only then
        pod.container().spec = per_pod(pod, service_ip)
        pod.container().create()
        pod.container().start()
        if name == "source":
            published(pod)
        else:
            assert_restored(pod.container())
            told = ask(pod, "/restored")["environment"]
            assert (told["POD_NAME"], told["HOSTNAME"]) == ("replica", "replica")
            assert (told["POD_IP"], told["POD_UID"]) == (pod.ip, pod.uid)
            assert told["SHOP_SERVICE_HOST"] == "10.96.2.2"


def test_missing_snapshot_is_reported_once(swap_node: Node) -> None:
    annotations = {"quickthaw.io/restore": "auto"}
    spec = probe(env={"CASE": "never captured"})
    pod = swap_node.kubelet.run_pod("alone", [spec], annotations=annotations)
    first_answer(pod)
    said(swap_node, pod.container().id[:12], "starts cold")
    time.sleep(0.3)
    about = lines_about(swap_node, pod.container())
    assert len(about) == 1
    assert "starts cold: there is no snapshot 'auto' for it (yet)" in about[0]
