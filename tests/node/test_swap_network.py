"""Sockets and addresses: a restored process answers on the addresses of its new pod."""

import json
from collections.abc import Iterator

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    SnapshotRef,
    ask,
    assert_restored,
    captured,
    first_answer,
    nothing_left,
    probe,
    restored,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

WISHES = wishes(capture_when="signal")
ON_IPV4, ON_IPV6 = 8001, 8002
"""Ports on which only the pod's own address listens; 8000 is open on 0.0.0.0 and on ::."""


def listener() -> ContainerSpec:
    """Returns a probe on 0.0.0.0, on :: and on its pod's IPv4 address."""
    return probe(env={"LISTEN": f"0.0.0.0,::,pod@{ON_IPV4}"})


def listen_on_ipv6(pod: Pod) -> None:
    """Listen on the pod's IPv6 address, too, and be ready."""
    ask(pod, f"/listen?host={pod.ips[1]}&port={ON_IPV6}")
    ask(pod, "/ready")


@pytest.fixture(scope="module")
def snapshot(swap_node: Node) -> Iterator[SnapshotRef]:
    """Yields a snapshot of a probe that listens on every kind of address; its source is gone."""
    with nothing_left(swap_node):
        taken = captured(swap_node, listener(), annotations=WISHES, before=listen_on_ipv6)
    yield taken
    wipe_snapshots(swap_node)


def test_listening_sockets_answer_on_the_new_pods_addresses(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    pod = restored(swap_node, listener(), annotations=WISHES)
    assert first_answer(pod)["nonce"] == snapshot.nonce
    assert set(pod.ips).isdisjoint(snapshot.source.ips)
    for ip, port in zip((*pod.ips, *pod.ips), (8000, 8000, ON_IPV4, ON_IPV6), strict=True):
        answered = swap_node.http_get(ip, port, "/peer").json()
        assert answered["local"] == [ip, port]
    bound = {f"{pod.ips[0]}@{ON_IPV4}", f"{pod.ips[1]}@{ON_IPV6}"}
    assert set(ask(pod, "/net")["listeners"]) == {"0.0.0.0@8000", "::@8000", *bound}


def test_outgoing_connections_come_from_the_address_of_the_new_pod(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    server = swap_node.kubelet.run_pod("server", [listener()])
    pod = restored(swap_node, listener(), annotations=WISHES)
    first_answer(server)
    for there, own in zip(server.ips, pod.ips, strict=True):
        fetched = json.loads(ask(pod, f"/fetch?host={there}&port=8000")["body"])
        assert fetched["peer"][0] == own


def test_the_manifest_has_the_network_of_the_capture(snapshot: SnapshotRef) -> None:
    network, (ipv4, ipv6) = snapshot.manifest()["network"], snapshot.source.ips
    addresses = {each["address"]: each for each in network["addresses"]}
    assert addresses[ipv4] | {"link": "eth0", "prefix": 16} == addresses[ipv4]
    assert addresses[ipv6] | {"link": "eth0", "prefix": 64} == addresses[ipv6]
    assert {"name": "eth0", "mtu": 1500, "state": "up"} in network["links"]
    ways = {(each["to"], each["via"], each["link"]) for each in network["routes"]}
    assert {("default/0", "10.88.0.1", "eth0"), ("default/0", "fd00:88::1", "eth0")} <= ways
    assert network["sysctls"]["net.core.somaxconn"].isdecimal()
    assert network["bound_addresses"] == sorted(snapshot.source.ips)


def test_address_of_a_family_that_the_new_pod_lacks_is_bindable(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    pod = swap_node.kubelet.make_pod("ipv4-only", [listener()], annotations=WISHES)
    pod.run_sandbox()
    pod.container().create()
    inside = ["nsenter", f"--net={network_namespace(pod)}", "ip"]
    swap_node.run([*inside, "-6", "address", "flush", "dev", "eth0", "scope", "global"])
    pod.container().start()
    assert_restored(pod.container())
    captured_ipv6 = snapshot.source.ips[1]
    assert first_answer(pod)["nonce"] == snapshot.nonce
    assert f"{captured_ipv6}@{ON_IPV6}" in ask(pod, "/net")["listeners"]
    assert f"inet6 {captured_ipv6}/128" in swap_node.run([*inside, "address", "show", "lo"])
    assert json.loads(ask(pod, f"/fetch?host={captured_ipv6}&port={ON_IPV6}")["body"])

    pod.container().stop(grace_s=0)

    def is_gone() -> bool:
        return captured_ipv6 not in swap_node.run([*inside, "address", "show"])

    wait_until(is_gone, f"{captured_ipv6} stays in the sandbox", swap_node)


def network_namespace(pod: Pod) -> str:
    """Returns the path of the sandbox's network namespace, once a container was created."""
    namespaces = pod.container().info()["runtimeSpec"]["linux"]["namespaces"]
    (path,) = [str(each["path"]) for each in namespaces if each["type"] == "network"]
    return path


def test_restored_server_answers_on_loopback(swap_node: Node, snapshot: SnapshotRef) -> None:
    pod = restored(swap_node, listener(), annotations=WISHES)
    fetched = json.loads(ask(pod, "/fetch?host=127.0.0.1&port=8000")["body"])
    assert fetched["local"] == ["127.0.0.1", 8000]
    fetched = json.loads(ask(pod, "/fetch?host=::1&port=8000")["body"])
    assert fetched["local"] == ["::1", 8000]
