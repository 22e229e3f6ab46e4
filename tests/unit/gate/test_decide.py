from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.gate import decide as gate
from shim.gate import key
from shim.gate.checks import WITHIN_SPEC
from shim.gate.facts import POWER_FACTS, WORKLOAD_FACTS, is_host_namespace
from shim.gate.refusal import UNKNOWN, Finding
from shim.gate.request import Request
from shim.oci.spec import Spec
from tests.unit.manifests import made
from tests.unit.specs import (
    captured,
    changed,
    key_of,
    pod_of,
    power,
    spec,
    wanted,
    workload,
)

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


def refusal_of(code: str, have: str | None, want: str | None) -> Finding:
    return Finding(code, 2, have, want, False)


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


@pytest.mark.parametrize(
    ("fact", "path", "value"),
    [
        ("args", "process/args", ["serve", "--model", "b"]),
        ("cwd", "process/cwd", "/srv"),
        ("env", "process/env/8", "KEY=other"),
        ("env", "process/env/8", "OTHER=secret"),
        ("env", "process/env/2", "POD=pod-1"),
        ("env", "process/env/8", "SERVER_PORT=8080"),
        ("process_user", "process/user/uid", 0),
        ("mounted", "mounts/3/source", "/srv/other-models"),
        ("mounted", "mounts/3/options", ["rbind"]),
        ("process_devices", "linux/devices", [{"path": "/dev/nvidia0", "type": "c"}]),
        ("hugepages", "linux/resources/hugepageLimits", [{"pageSize": "2MB", "limit": 1}]),
    ],
)
def test_another_workload_has_another_key(fact: str, path: str, value: object) -> None:
    other = workload("2", changed(path, value))
    assert [name for name in other if other[name] != workload("1")[name]] == [fact]
    assert key_of(other) != key_of(workload("1"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("linux/resources/memory", {"limit": 5}),
        ("linux/resources/cpu", {"shares": 9}),
        ("process/env/7", "WEB_PORT=tcp://10.96.0.9:80"),
        ("process/env/1", "HOSTNAME=else"),
    ],
)
def test_facts_that_may_differ_keep_the_key(path: str, value: object) -> None:
    other = spec("2")
    del other["process"]["env"][7]
    one = spec("1")
    del one["process"]["env"][7]
    if path == "process/env/7":
        other["process"]["env"].append(value)
    else:
        other = changed(path, value)
        del other["process"]["env"][7]
    assert key_of(workload("1", one)) == key_of(workload("2", other))


def test_image_and_namespace_are_in_the_key() -> None:
    other = key.workload_facts(Spec(spec()), pod_of("1"), image_digest="sha256:2")
    assert key_of(other) != key_of(workload())
    assert key.match_key(workload(), namespace="other", power=None) != key_of(workload())
    granted = power(spec())
    assert key.match_key(workload(), namespace="models", power=granted) != key_of(workload())


def test_ignored_variable_may_differ_and_values_stay_secret() -> None:
    other = changed("process/env/8", "KEY=other")
    facts = [
        key.workload_facts(Spec(each), pod_of(number), image_digest="sha256:1", ignore_env=["KEY"])
        for each, number in ((spec("1"), "1"), (other, "2"))
    ]
    assert facts[0] == facts[1]
    assert "secret" not in workload()["env"]


def test_our_control_mount_is_not_part_of_the_workload() -> None:
    with_mount = spec("1")
    with_mount["mounts"].append(
        {"destination": "/run/quickthaw", "type": "bind", "source": "/x", "options": []}
    )
    assert workload("1", with_mount) == workload("1")


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


def test_first_fitting_candidate_is_chosen() -> None:
    unfit, fit, older = captured(key="f" * 64), captured(), captured(created_at=1.0)
    decided = gate.decide(wanted(), [unfit, fit, older])
    assert isinstance(decided, gate.Match)
    assert decided.manifest == fit


def test_no_candidate_is_no_snapshot() -> None:
    assert isinstance(gate.decide(wanted(), []), gate.NoSnapshot)


def test_refusal_has_all_reasons_of_the_newest_candidate() -> None:
    process = {**spec("2")["process"], "noNewPrivileges": False, "args": ["other"]}
    request = wanted({**spec("2"), "process": process}, namespace="else")
    decided = gate.decide(request, [captured(), captured(created_at=1.0)])
    assert isinstance(decided, gate.Refused)
    assert decided.snapshot == captured().id
    assert decided.codes == ["no_new_privs", "args", "namespace"]
    assert all(code in str(decided) for code in decided.codes)


def test_refusal_shows_only_the_differing_entries_of_lists_and_objects() -> None:
    refusal = refusal_of("mounts", '["a","b"]', '["b","c"]')
    assert str(refusal) == 'mounts: the snapshot has ["a"], the pod asks for ["c"]'
    refusal = refusal_of("env", '{"A":"1","B":"2"}', '{"A":"1","B":"3","C":"4"}')
    assert str(refusal) == 'env: the snapshot has {"B":"2"}, the pod asks for {"B":"3","C":"4"}'
    refusal = refusal_of("capabilities", '{"bounding":["A","B"]}', '{"bounding":["A"]}')
    assert '{"bounding":["B"]}, the pod asks for {"bounding":[]}' in str(refusal)
    in_order = refusal_of("args", '["a","b"]', '["b","a"]')
    assert str(in_order) == 'args: the snapshot has ["a","b"], the pod asks for ["b","a"]'
    assert "has true, the pod asks for false" in str(refusal_of("terminal", "true", "false"))
    assert f"has {UNKNOWN}, the pod" in str(refusal_of("user", None, "{}"))
