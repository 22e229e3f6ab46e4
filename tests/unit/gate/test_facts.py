"""Facts of power differ wherever a spec grants other power, and nowhere else."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.gate import decide as gate
from shim.gate.checks import WITHIN_SPEC
from shim.gate.facts import POWER_FACTS, WORKLOAD_FACTS, is_host_namespace
from shim.gate.request import Request
from shim.oci.spec import Spec
from tests.unit.manifests import made
from tests.unit.specs import changed, key_of, power, spec, workload

if TYPE_CHECKING:
    from shim.gate.refusal import Finding

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


def differ(have: dict[str, str], want: dict[str, str]) -> list[Finding]:
    """Returns the refusals of the checks that compare power."""
    snapshot = made(
        facts={**have, "processes": WITHIN_SPEC, "descriptors": '{"lowest_port":0,"pings":false}'}
    )
    request = Request(facts=want, memory_limit_bytes=0)
    return [found for found in gate.refusals_of(snapshot, request) if found.code in POWER_FACTS]


def test_two_pods_of_one_kind_have_equal_facts() -> None:
    have, want = (
        power(spec("1")),
        power(spec("2")),
    )
    assert differ(have, want) == []
    assert set(have) == set(POWER_FACTS)
    assert workload("1") == workload("2")
    assert key_of(workload("1")) == key_of(workload("2"))


@pytest.mark.parametrize(
    ("fact", "path", "value"),
    [
        ("user", "process/user/uid", 0),
        ("user", "process/user/additionalGids", [2, 3, 0]),
        ("user", "process/user/umask", 0),
        ("capabilities", "process/capabilities/ambient", ["CAP_SYS_ADMIN"]),
        ("capabilities", "process/capabilities", None),
        ("no_new_privs", "process/noNewPrivileges", False),
        ("seccomp", "linux/seccomp", None),
        ("seccomp", "linux/seccomp/defaultAction", "SCMP_ACT_ALLOW"),
        ("apparmor", "process/apparmorProfile", "unconfined"),
        ("selinux", "process/selinuxLabel", "system_u:system_r:spc_t:s0"),
        ("selinux", "linux/mountLabel", "s0"),
        ("rlimits", "process/rlimits", []),
        ("namespaces", "linux/namespaces/0/type", "time"),
        ("namespaces", "linux/namespaces/0/path", "/proc/7/ns/pid"),
        ("namespaces", "linux/namespaces", []),
        ("id_mappings", "linux/uidMappings", [{"containerID": 0, "hostID": 0, "size": 1}]),
        ("devices", "linux/devices", [{"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}]),
        ("device_rules", "linux/resources/devices", [{"allow": True, "access": "rwm"}]),
        ("mounts", "mounts/1/options", ["rbind", "rw"]),
        ("mounts", "mounts/1/options", ["rbind", "ro", "rw"]),
        ("mounts", "mounts/1/destination", "/host"),
        ("mounts", "mounts/0/type", "tmpfs"),
        ("mounts", "mounts/0/source", "other"),
        ("masked_paths", "linux/maskedPaths", []),
        ("readonly_paths", "linux/readonlyPaths", None),
        ("sysctls", "linux/sysctl", {"net.ipv4.ip_forward": "1"}),
        ("root_readonly", "root/readonly", False),
        ("root_propagation", "linux/rootfsPropagation", "shared"),
        ("terminal", "process/terminal", True),
        ("personality", "linux/personality", {"domain": "LINUX32"}),
        ("scheduler", "process/scheduler", {"policy": "SCHED_FIFO"}),
        ("other", "linux/somethingNew", {"grants": "everything"}),
        ("other", "process/execAs", "root"),
        ("other", "vm", {}),
    ],
)
def test_difference_in_power_is_refused_by_name(fact: str, path: str, value: object) -> None:
    have = power(spec("1"))
    want = power(changed(path, value))
    assert [no.code for no in differ(have, want)] == [fact]
    assert [no.code for no in differ(want, have)] == [fact]


def test_all_differences_are_reported() -> None:
    other = changed("process/user/uid", 0)
    other["process"]["noNewPrivileges"] = False
    refusals = differ(power(spec("1")), power(other))
    assert [no.code for no in refusals] == ["user", "no_new_privs"]
    assert str(refusals[1]) == "no_new_privs: the snapshot has true, the pod asks for false"


@pytest.mark.parametrize("missing", POWER_FACTS)
def test_a_missing_fact_is_a_refusal(missing: str) -> None:
    whole = power(spec())
    less = {name: value for name, value in whole.items() if name != missing}
    assert [no.code for no in differ(less, whole)] == [missing]
    assert [no.code for no in differ(whole, less)] == [missing]
    assert [no.code for no in differ(less, less)] == [missing]


def test_meaningless_order_is_no_difference() -> None:
    other = spec("1")
    other["process"]["user"]["additionalGids"] = [2, 3, 3]
    other["process"]["capabilities"]["bounding"] = ["CAP_CHOWN", "CAP_KILL"]
    other["linux"]["maskedPaths"].reverse()
    other["mounts"].reverse()
    other["mounts"][0]["options"] = ["rw", "ro", "rbind"]
    assert power(spec("1")) == power(other)


def test_sandbox_with_host_network_differs_from_a_sandbox_with_its_own() -> None:
    # containerd names the namespace by path either way
    own = power(spec())
    hosts = power(spec(), is_host=lambda _path, kind: kind == "net")
    assert [no.code for no in differ(own, hosts)] == ["namespaces"]
    assert json.loads(hosts["namespaces"])["network"] == "host"


def test_missing_namespace_equals_no_other_namespace() -> None:
    def gone(path: str, _kind: str) -> bool:
        raise FileNotFoundError(2, "gone", path)

    assert differ(power(spec("1"), is_host=gone), power(spec("2"), is_host=gone))


def test_own_namespace_counts_as_the_host_namespace() -> None:
    assert is_host_namespace("/proc/thread-self/ns/net", "net")
    assert not is_host_namespace("/proc/self/ns/uts", "net")


@given(JSON)
def test_no_spec_raises_an_error(odd: object) -> None:
    for name in ("process", "linux", "root", "mounts"):
        strange = {**spec(), name: odd}
        assert set(power(strange)) == set(POWER_FACTS)
        assert set(workload("1", strange)) == set(WORKLOAD_FACTS)
        assert Spec(strange).memory_limit_bytes >= 0


@given(
    st.sampled_from([f"process/{name}" for name in spec()["process"]]
                    + [f"linux/{name}" for name in spec()["linux"]]), JSON
)  # fmt: skip
def test_no_field_of_a_spec_raises_an_error(path: str, odd: object) -> None:
    strange = changed(path, odd)
    assert set(power(strange)) == set(POWER_FACTS)
    assert set(workload("1", strange)) == set(WORKLOAD_FACTS)


def test_facts_leave_the_spec_as_it_was() -> None:
    given_spec = spec()
    before = copy.deepcopy(given_spec)
    power(given_spec)
    workload("1", given_spec)
    assert given_spec == before
