"""Containers have the same key if they are the same workload, whatever their pods."""

from __future__ import annotations

import pytest

from shim.gate import key
from shim.oci.spec import Spec
from tests.unit.specs import changed, key_of, pod_of, power, spec, workload


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
