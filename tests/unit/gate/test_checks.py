"""Every check of the gate: it alone refuses a dangerous pair, which the gate accepts without it.

Each case runs twice: with the whole table, where exactly the named check must refuse, and with the
table without that check (the mutation), where the gate must accept the dangerous pair. So a case
that another check happens to catch is no test of the named check, and fails.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract.jsontext import canonical
from shim.gate import gpu, host
from shim.gate.checks import BOTH, CHECKS, DECISION, SWAP, findings
from shim.gate.explain import explained, nearest
from shim.gate.facts import POWER_FACTS, WORKLOAD_FACTS
from shim.gate.request import AtSwap, Node, Request, request_of
from shim.oci.spec import Spec
from tests.unit.manifests import SOFTWARE, SOURCE
from tests.unit.specs import (
    AUXILIARY,
    HOST,
    NODE,
    OF_CAPTURE,
    Json,
    captured,
    changed,
    facts,
    key_of,
    pod_of,
    refused,
    spec,
    wanted,
)

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
UNCONFINED = {"type": "RLIMIT_NOFILE", "hard": 1 << 20, "soft": 1 << 20}
DISK = {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0, "fileMode": 0o660, "uid": 0}
ALL_CAPABILITIES = {
    name: ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_KILL", "CAP_CHOWN"]
    for name in ("bounding", "effective", "permitted")
}
HOST_ROOT = {
    "destination": "/models",
    "type": "bind",
    "source": "/srv/models",
    "options": ["rbind"],
}


def without(place: str, name: str) -> Json:
    """Returns pod 1's spec without a field."""
    found = spec("1")
    del found[place][name]
    return found


POWER: list[tuple[str, str, Json]] = [
    ("privileged: capabilities", "capabilities",
     changed("process/capabilities", ALL_CAPABILITIES, "1")),
    ("ambient capabilities", "capabilities",
     changed("process/capabilities/ambient", ["CAP_NET_RAW"], "1")),
    ("inheritable capabilities of files", "capabilities",
     changed("process/capabilities/inheritable", ["CAP_SETUID"], "1")),
    ("supplementary groups (setgroups)", "user",
     changed("process/user/additionalGids", [3, 2, 0], "1")),
    ("another umask", "user", changed("process/user/umask", 0, "1")),
    ("set-user-ID programs", "no_new_privs", changed("process/noNewPrivileges", False, "1")),
    ("no system call filter", "seccomp", without("linux", "seccomp")),
    ("a wider system call filter", "seccomp",
     changed("linux/seccomp", {"defaultAction": "SCMP_ACT_ALLOW"}, "1")),
    ("AppArmor unconfined", "apparmor", changed("process/apparmorProfile", "unconfined", "1")),
    ("another SELinux label", "selinux", changed("process/selinuxLabel", "u:r:spc_t:s0", "1")),
    ("another label of mounts", "selinux", changed("linux/mountLabel", "u:r:spc_t:s0", "1")),
    ("higher limits", "rlimits", changed("process/rlimits", [UNCONFINED], "1")),
    ("the host's PID namespace", "namespaces",
     changed("linux/namespaces/0", {"type": "mount"}, "1")),
    ("a shared PID namespace, for ptrace", "namespaces",
     changed("linux/namespaces/0/path", "/proc/7/ns/pid", "1")),
    ("the host's network", "namespaces", changed("linux/namespaces/2", {"type": "uts"}, "1")),
    ("no user namespace mapping", "id_mappings",
     changed("linux/uidMappings", [{"containerID": 0, "hostID": 0, "size": 1 << 32}], "1")),
    ("another group mapping", "id_mappings",
     changed("linux/gidMappings", [{"containerID": 0, "hostID": 0, "size": 1 << 32}], "1")),
    ("device rules", "device_rules",
     changed("linux/resources/devices", [{"allow": True, "access": "rwm"}], "1")),
    ("/proc not masked", "masked_paths", changed("linux/maskedPaths", [], "1")),
    ("/proc/sys writable", "readonly_paths", changed("linux/readonlyPaths", [], "1")),
    ("sysctls", "sysctls", changed("linux/sysctl", {"kernel.shm_rmid_forced": "0"}, "1")),
    ("a writable root", "root_readonly", changed("root/readonly", False, "1")),
    ("mounts that reach the host", "root_propagation",
     changed("linux/rootfsPropagation", "rshared", "1")),
    ("a terminal", "terminal", changed("process/terminal", True, "1")),
    ("no address randomisation", "personality",
     changed("linux/personality", {"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]}, "1")),
    ("real-time scheduling", "scheduler",
     changed("process/scheduler", {"policy": "SCHED_FIFO", "priority": 99}, "1")),
    ("a field of a later OCI version", "other",
     changed("linux/grantsEverything", True, "1")),
]  # fmt: skip
"""Power of a captured container that pod 2 does not ask for: title, check, the captured spec."""


@pytest.mark.parametrize(("code", "given_spec"), [case[1:] for case in POWER],
                         ids=[case[0] for case in POWER])  # fmt: skip
@pytest.mark.parametrize("when", [DECISION, SWAP])
def test_power_does_not_come_with_a_snapshot(code: str, given_spec: Json, when: str) -> None:
    snapshot, request = captured(given_spec), wanted()
    assert refused(snapshot, request, when=when) == [code]
    assert refused(snapshot, request, when=when, without=code) == [], "the mutation lets it in"


@pytest.mark.parametrize(("code", "given_spec"), [case[1:] for case in POWER],
                         ids=[case[0] for case in POWER])  # fmt: skip
def test_weaker_process_does_not_come_into_a_stronger_pod(code: str, given_spec: Json) -> None:
    request = wanted({**given_spec, "annotations": {}}, "1")
    assert refused(captured(spec("1")), request) == [code]


PAIRED: list[tuple[str, set[str], Json]] = [
    ("another user", {"user", "process_user"}, changed("process/user/uid", 0, "1")),
    ("another group", {"user", "process_user"}, changed("process/user/gid", 0, "1")),
    ("a disk of the host", {"devices", "process_devices"}, changed("linux/devices", [DISK], "1")),
    ("a writable host mount", {"mounts", "mounted"}, changed("mounts/3", HOST_ROOT, "1")),
    ("one more host mount", {"mounts", "mounted"},
     {**spec("1"), "mounts": [*spec("1")["mounts"], {**HOST_ROOT, "destination": "/host"}]}),
    ("a mount without nosuid", {"mounts", "mounted"}, changed("mounts/0/options", [], "1")),
]  # fmt: skip
"""Facts that two checks compare: as power (2), and as another workload (1)."""


@pytest.mark.parametrize(("codes", "given_spec"), [case[1:] for case in PAIRED],
                         ids=[case[0] for case in PAIRED])  # fmt: skip
def test_fact_of_two_checks_is_accepted_only_without_both(
    codes: set[str], given_spec: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, request = captured(given_spec), wanted()
    assert set(refused(snapshot, request)) == codes
    for code in codes:
        assert refused(snapshot, request, without=code) == sorted(codes - {code})
    monkeypatch.setattr("tests.unit.specs.CHECKS", [row for row in CHECKS if row.code not in codes])
    assert refused(snapshot, request) == []


def test_single_check_compares_mounts_right_before_the_swap() -> None:
    snapshot = captured(changed("mounts/3", HOST_ROOT, "1"))
    assert refused(snapshot, wanted(), when=SWAP) == ["mounts"]
    assert refused(snapshot, wanted(), when=SWAP, without="mounts") == []


def on(**changes: Any) -> Node:
    """Returns a node that differs from the usual node."""
    parts = {name: getattr(NODE, name) for name in NODE.__slots__}
    return Node(**parts | changes)


def with_host(
    features: list[str], auxiliary: dict[int, int] | None = None, cgroup: int = 2
) -> Node:
    return on(host=host.facts_of(features, AUXILIARY | (auxiliary or {}), cgroup))


FEATURES = ["fpu", "sse2", "avx", "avx2", "xsave"]
NODES: list[tuple[str, str, Node, Node]] = [
    ("another machine", "arch", NODE, on(arch="aarch64")),
    ("an older kernel", "kernel", NODE, on(kernel="6.9.20-amd64")),
    ("a kernel without a version", "kernel", NODE, on(kernel="odd")),
    ("an older CRIU", "criu", NODE, on(criu="Version: 4.1.1")),
    ("no CRIU", "criu", NODE, on(criu="")),
    ("an instruction set less", "cpu_features", NODE,
     with_host([name for name in FEATURES if name != "avx2"])),
    ("a larger CPU state", "cpu_state", NODE, with_host(FEATURES, {51: 11952})),
    ("more parts of the CPU state", "cpu_state", NODE, with_host([*FEATURES, "avx512f"])),
    ("a hardware capability less", "cpu_hwcap", NODE, with_host(FEATURES, {26: 0})),
    ("larger pages", "page_bytes", NODE, with_host(FEATURES, {6: 65536})),
    ("another cgroup version", "cgroup", NODE, with_host(FEATURES, cgroup=1)),
    ("a signature of nobody", "signature", NODE, on(trust=lambda _: ("unknown key", False))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "there", "here"), [case[1:] for case in NODES],
                         ids=[case[0] for case in NODES])  # fmt: skip
def test_node_that_cannot_run_the_process_is_refused(code: str, there: Node, here: Node) -> None:
    snapshot, request = captured(node=there), wanted(node=here)
    assert refused(snapshot, request) == [code]
    assert refused(snapshot, request, without=code) == []


@pytest.mark.parametrize(
    "here",
    [
        with_host([*FEATURES, "sha_ni", "vme", "ssbd"]),
        with_host(FEATURES, {26: 0b11}),
        on(kernel="7.0"), on(kernel="6.18"), on(criu="Version: 4.3"), on(criu="Version: 5.0.1"),
    ],
)  # fmt: skip
def test_node_with_more_features_is_accepted(here: Node) -> None:
    assert refused(captured(), wanted(node=here)) == []


OURS = "/run/quickthaw/containers/c2/criu.conf"


def nothing_changed(_fact: object) -> list[str]:
    return []


def at_swap(named: str = OURS, changed: Any = nothing_changed) -> AtSwap:
    return AtSwap(ours=OURS, named=named, changed=changed, open_to_all=lambda: (1024, False))


def using(network: str) -> dict[str, Any]:
    return {"facts": {**facts(spec("1")), **OF_CAPTURE, "descriptors": network}}


OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("namespace", {"source": {**SOURCE, "namespace": "tenant-b"}}, {}),
    ("key", {"key": "f" * 64}, {}),
    ("memory", {"requires": {"memory_bytes": (1 << 30) + 1}}, {}),
    ("processes", {"facts": {**facts(spec("1")), **OF_CAPTURE, "processes": '"?"'}}, {}),
    ("volume_content", {"facts": {**facts(spec("1")), **OF_CAPTURE, "volume_content": "{}"}}, {}),
    ("criu_options", {}, {"at_swap": at_swap("/tmp/mine")}),
    ("criu_options", {}, {"at_swap": at_swap("None")}),
    ("descriptors", using('{"lowest_port":80,"pings":false}'), {}),
    ("descriptors", using('{"lowest_port":0,"pings":true}'), {}),
    ("volume_files", {}, {"at_swap": at_swap(changed=lambda _: ["/data/f is of another type"])}),
]


@pytest.mark.parametrize(("code", "of_snapshot", "of_request"), OTHERS)
def test_each_remaining_check_refuses_alone(
    code: str, of_snapshot: dict[str, Any], of_request: dict[str, Any]
) -> None:
    snapshot, request = captured(**of_snapshot), wanted(**of_request)
    assert refused(snapshot, request) == [code]
    assert refused(snapshot, request, without=code) == []


@pytest.mark.parametrize(
    ("code", "path", "value"),
    [
        ("args", "process/args", ["serve", "--admin"]),
        ("cwd", "process/cwd", "/srv"),
        ("env", "process/env/8", "KEY=another tenant's"),
        ("hugepages", "linux/resources/hugepageLimits", [{"pageSize": "2MB", "limit": 1}]),
        ("mounted", "mounts/3/source", "/srv/secret-models"),
    ],
)
def test_another_workload_is_refused_by_name(code: str, path: str, value: object) -> None:
    snapshot, request = captured(changed(path, value, "1")), wanted()
    assert refused(snapshot, request) == [code]
    assert refused(snapshot, request, without=code) == []


def test_unread_volume_content_fits_only_a_pod_that_ignores_it() -> None:
    unread = {**facts(spec("1")), "volume_content": '{"secret volume tls":"not read: why"}'}
    snapshot = captured(facts={**unread, **OF_CAPTURE})
    assert refused(snapshot, wanted(facts=unread)) == ["volume_content"], "equal is not enough"
    for request in (wanted(), wanted(facts=unread)):
        request.any_volume_content = True
        assert refused(snapshot, request) == []


def test_another_image_is_refused_by_name() -> None:
    found = {**facts(spec("1")), "image_digest": canonical("sha256:2"), **OF_CAPTURE}
    snapshot = captured(facts=found, key=key_of(found))
    assert refused(snapshot, wanted()) == ["image_digest"]
    assert refused(snapshot, wanted(), without="image_digest") == []


def test_an_equal_pod_fits() -> None:
    assert refused(captured(), wanted()) == []


@pytest.mark.parametrize("name", [row.code for row in CHECKS if row.code in facts(spec("1"))])
def test_missing_fact_is_a_refusal(name: str) -> None:
    whole = {**facts(spec("1")), **OF_CAPTURE}
    less = {other: value for other, value in whole.items() if other != name}
    key = key_of(whole)
    assert name in refused(captured(facts=less, key=key), wanted())
    assert name in refused(captured(), wanted(facts=less, key=key))
    both = refused(captured(facts=less, key=key), wanted(facts=less, key=key))
    assert name in both, "missing on both sides is not the same as equal"


def test_gate_without_any_facts_refuses() -> None:
    nobody = Request(facts={}, memory_limit_bytes=0)
    codes = set(refused(captured(), nobody))
    assert codes == {row.code for row in CHECKS} - {"memory", "processes", "key", "descriptors"}


# The table itself


def test_table_of_checks_is_whole_and_codes_are_unique() -> None:
    codes = [row.code for row in CHECKS]
    assert len(set(codes)) == len(codes)
    by_rule = {row.code: row.rule for row in CHECKS}
    assert {code for code, rule in by_rule.items() if rule == 2} == {
        *POWER_FACTS,
        "processes",
        "descriptors",
        "volume_files",
    }
    assert set(WORKLOAD_FACTS) <= set(codes)
    assert {code for code in codes if code in HOST} == set(host.host_facts())
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", code) for code in codes), "they are labels"
    assert {row.when for row in CHECKS} == {DECISION, SWAP, BOTH}


def test_facts_that_grant_power_are_compared_twice() -> None:
    once = {row.code for row in CHECKS if row.rule == 2 and row.when != BOTH}
    assert once == {"volume_files"}, "what lies in volumes counts right before the swap alone"


def test_every_case_above_names_a_check_and_every_check_has_a_case() -> None:
    tested = {case[1] for case in POWER} | {case[1] for case in NODES}
    tested |= {code for case in PAIRED for code in case[1]} | {case[0] for case in OTHERS}
    tested |= {"args", "cwd", "env", "hugepages", "image_digest", "gpu", *gpu.HOST_FACTS}
    assert tested == {row.code for row in CHECKS}


def test_the_operations_guide_lists_every_check() -> None:
    section = OPERATIONS.read_text().partition("## Why did my pod start cold?")[2]
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| ([^|]+) \|", section.partition("\n## ")[0], re.M)
    listed = [(code, int(rule), compares.strip()) for code, rule, compares in rows]
    assert listed == [(row.code, row.rule, row.compares) for row in CHECKS]


# GPUs: pure, with an inventory as NVML would give it

H100 = {"minor": 0, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_520_809_984, "mig": False}
GPUS = {"driver": "570.124.06", "gpus": [H100, {**H100, "minor": 1}]}


def gpu_spec(*minors: int, number: str = "1") -> Json:
    devices = [{"path": f"/dev/nvidia{minor}", "type": "c"} for minor in minors]
    return changed("linux/devices", [*devices, {"path": "/dev/nvidiactl", "type": "c"}], number)


def gpu_refused(there: dict[str, Any] | None, here: dict[str, Any] | None) -> list[str]:
    node_there, node_here = on(gpus=there), on(gpus=here)
    snapshot = captured(gpu_spec(0), node=node_there)
    request = wanted(gpu_spec(0, number="2"), node=node_here)
    without = refused(snapshot, request, without="gpu")
    assert without == [], "only the check of the GPUs may tell these nodes apart"
    return refused(snapshot, request)


@pytest.mark.parametrize(
    ("here", "code"),
    [
        (GPUS, []),
        ({**GPUS, "driver": "570.133.20"}, ["gpu"]),
        ({**GPUS, "gpus": [{**H100, "name": "NVIDIA H200"}]}, ["gpu"]),
        ({**GPUS, "gpus": [{**H100, "memory_bytes": 1}]}, ["gpu"]),
        ({**GPUS, "gpus": [{**H100, "mig": True}]}, ["gpu"]),
        ({**GPUS, "gpus": []}, ["gpu"]),
        (None, ["gpu"]),
    ],
)
def test_gpus_must_be_of_the_same_kind(here: dict[str, Any] | None, code: list[str]) -> None:
    assert gpu_refused(GPUS, here) == code
    assert gpu_refused(here, GPUS) == code


@pytest.mark.parametrize(
    ("code", "node_here", "given_spec"),
    [
        ("gpu_exclusive", {**GPUS, "gpus": [{**H100, "exclusive": True}]}, gpu_spec(0, number="2")),
        ("gpu_mps", GPUS, {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps"}),
    ],
)
def test_gpu_setup_that_forbids_a_restore_is_refused_alone(
    code: str, node_here: dict[str, Any], given_spec: dict[str, Any]
) -> None:
    node = on(gpus=node_here)
    request = gpu_spec(0, number="2")
    if code == "gpu_mps":
        request["process"]["env"] += [f"{name}={value}" for name, value in given_spec.items()]
    snapshot = captured(gpu_spec(0), node=on(gpus=GPUS))
    assert code in refused(snapshot, wanted(request, node=node))
    assert code not in refused(snapshot, wanted(request, node=node), without=code)


def test_gpu_process_in_the_network_of_the_node_cannot_be_restored() -> None:
    given = Spec(gpu_spec(0))
    found = gpu.chosen(given, GPUS)
    assert gpu.host_facts(given, found, '{"network":"new"}')["gpu_host_network"] == gpu.NONE
    assert gpu.host_facts(given, found, '{"network":"host"}')["gpu_host_network"] != gpu.NONE


def device(minor: int, path: str = "") -> dict[str, Any]:
    return {"path": path or f"/dev/nvidia{minor}", "type": "c", "major": 195, "minor": minor}


def rule(minor: int) -> dict[str, Any]:
    return {"allow": True, "type": "c", "major": 195, "minor": minor, "access": "rw"}


def pod_with(minors: list[int], *others: dict[str, Any], env: str = "") -> Json:
    made = changed("linux/devices", [*map(device, minors), *others], "2")
    made["linux"]["resources"]["devices"] = [*map(rule, minors), rule(255)]
    made["process"]["env"] += [f"NVIDIA_VISIBLE_DEVICES={env}"] if env else []
    return made


@pytest.mark.parametrize(
    ("one", "other"), [([0], [3]), ([0, 1], [7, 2]), ([1, 0], [0, 1])]
)  # fmt: skip
def test_identity_of_gpus_is_neither_power_nor_workload(one: list[int], other: list[int]) -> None:
    here = pod_with(one, env=",".join(f"GPU-{minor}" for minor in one))
    there = pod_with(other, env=",".join(map(str, other)))
    assert facts(here, "2") == facts(there, "2")


@pytest.mark.parametrize(
    "other",
    [
        pod_with([0, 1]),
        pod_with([0], device(8, "/dev/sda")),
        pod_with([0], {**device(1), "major": 8}),
        pod_with([0], {**device(1), "type": "b"}),
        pod_with([0], device(4, "/dev/nvidia5")),
        pod_with([0], env="all"),
    ],
)
def test_number_of_gpus_and_other_devices_change_the_facts(other: Json) -> None:
    assert facts(pod_with([0]), "2") != facts(other, "2")


def test_gpus_are_paired_with_their_like() -> None:
    a, b, c = ({**H100, "minor": minor, "uuid": f"GPU-{minor}"} for minor in range(3))
    big = {**c, "name": "NVIDIA H200"}
    assert gpu.pairs([a, b], [a, b]) == [["GPU-0", "GPU-0"], ["GPU-1", "GPU-1"]]
    assert gpu.pairs([a, big], [big, b]) == [["GPU-0", "GPU-1"], ["GPU-2", "GPU-2"]]
    assert gpu.pairs([a], [big]) is None
    assert gpu.pairs([a], [a, b]) is None
    assert gpu.pairs([{**a, "uuid": ""}], [b]) is None


def test_gpu_with_mig_fits_nowhere() -> None:
    split = {**GPUS, "gpus": [{**H100, "mig": True}]}
    assert gpu_refused(split, split) == ["gpu"]


def test_number_of_gpus_counts_and_not_their_identity() -> None:
    one, other = gpu.fact(Spec(gpu_spec(0)), GPUS), gpu.fact(Spec(gpu_spec(1)), GPUS)
    both = gpu.fact(Spec(gpu_spec(0, 1)), GPUS)
    assert one is not None
    assert both is not None
    assert gpu.fits(one, str(other))
    assert not gpu.fits(one, both)
    assert gpu.fits(both, both)


@pytest.mark.parametrize("inventory", [{"driver": "", "gpus": []}, GPUS, None])
def test_container_without_nvidia_devices_has_no_gpu_fact(inventory: dict[str, Any] | None) -> None:
    assert gpu.fact(Spec(spec("1")), inventory) == gpu.NONE


@pytest.mark.parametrize(
    ("inventory", "expected"),
    [
        ({"driver": "", "gpus": []}, gpu.NONE),
        (None, None),
        (GPUS, gpu.fact(Spec(gpu_spec(0, 1)), GPUS)),
    ],
)
def test_gpus_requested_by_environment_alone_are_found(
    inventory: dict[str, Any] | None, expected: str | None
) -> None:
    asks = changed("process/env/0", "NVIDIA_VISIBLE_DEVICES=all", "1")
    assert gpu.fact(Spec(asks), inventory) == expected


@given(st.text(max_size=30) | st.sampled_from(['{"gpus":[[1,2]]}', "[]", "null", '{"gpus":3}']))
def test_malformed_gpu_fact_fits_nothing(odd: str) -> None:
    assert gpu.fits(odd, odd) is (odd == gpu.NONE)


# Facts read from the node


def test_instructions_of_the_kernel_alone_are_no_feature() -> None:
    found = host.facts_of(["fpu", "vme", "ssbd", "ibpb", "some_new_one"], AUXILIARY, 2)
    assert json.loads(found["cpu_features"]) == ["fpu", "some_new_one"]


def test_an_arm_machine_has_its_features_and_capabilities() -> None:
    cpuinfo = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n"
    assert host.features_of(cpuinfo) == ["fp", "asimd", "sve"]
    found = host.facts_of(["fp", "sve"], AUXILIARY, 2)
    assert json.loads(found["cpu_hwcap"]) == [0xFF, 0b10, 0, 0]
    assert json.loads(found["cpu_state"]) == {"frame_bytes": 3632, "parts": ["sve"]}


def test_unreadable_file_gives_no_fact() -> None:
    assert set(host.facts_of([], {}, 2)) == {"cgroup"}
    assert host.features_of("processor: 0\n") == []


def test_facts_of_this_node_are_read() -> None:
    found = host.host_facts()
    assert set(found) == {"cpu_features", "cpu_state", "cpu_hwcap", "page_bytes", "cgroup"}
    assert json.loads(found["page_bytes"]) in (4096, 16384, 65536)
    assert host.has_all(found["cpu_features"], found["cpu_features"])


@given(st.binary(max_size=100))
def test_no_auxiliary_vector_raises_an_error(data: bytes) -> None:
    assert isinstance(host.auxiliary_of(data), dict)


@given(st.text(max_size=20), st.text(max_size=20))
def test_malformed_cpu_facts_do_not_fit(have: str, want: str) -> None:
    assert not host.has_bits(have, want) or isinstance(json.loads(have), list)
    assert not host.has_all(have, want) or isinstance(json.loads(have), list)


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("6.18.2-amd64", "6.18.9", True), ("6.9", "6.18", False), ("7.0-rc1", "6.18", True),
        ("Version: 4.2.1", "Version: 4.2", True), ("4.1.1", "4.2", False), ("", "4.2", False),
        ("4.2", "", False), ("odd", "odd", False), ("6.12+deb13-amd64", "6.12.1", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_release(version: str, than: str, expected: bool) -> None:
    assert host.is_not_older(version, than) is expected


# The way from a spec, and the explanation


def a_request(given_spec: Json, digest: str = "sha256:1") -> Request:
    return request_of(Spec(given_spec), pod_of("2"), NODE, image_digest=digest)


def test_unknown_image_digest_is_reported_as_unknown() -> None:
    request = a_request(spec("2"), digest="")
    assert "image_digest" not in request.facts
    found = {each.code: each for each in findings(captured(), request, DECISION)}
    assert found["image_digest"].wanted is None
    assert "the pod asks for unknown" in str(found["image_digest"])


def test_explanation_has_equal_and_unequal_facts() -> None:
    told = explained(captured(changed("process/noNewPrivileges", False, "1")), wanted())
    assert told["fits"] is False
    assert told["refused"] == ["no_new_privs"]
    by_code = {check["code"]: check for check in told["checks"]}
    assert set(by_code) == {row.code for row in CHECKS if row.when != SWAP}
    assert by_code["no_new_privs"]["differences"] == ["false", "true"]
    assert by_code["user"]["fits"]
    assert by_code["user"]["captured"] == by_code["user"]["wanted"]
    json.dumps(told)
    assert explained(captured(), wanted())["fits"]


def test_nearest_snapshot_has_the_fewest_differences() -> None:
    far = captured(changed("process/args", ["other"], "1"), source={**SOURCE, "namespace": "b"})
    near: Manifest = captured(changed("process/args", ["other"], "1"))
    assert nearest(wanted(), [far, near]) == near
    assert nearest(wanted(), []) is None


def test_manifest_of_a_test_belongs_to_the_node_of_the_test() -> None:
    assert captured().software.kernel == NODE.kernel != SOFTWARE["kernel"]
