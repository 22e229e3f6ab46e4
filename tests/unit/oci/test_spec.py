"""A spec is read leniently: an odd part is empty, and no part raises an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.oci import spec as oci_spec
from shim.oci.bundle import Bundle
from shim.oci.spec import Spec
from tests.unit.specs import spec

if TYPE_CHECKING:
    from pathlib import Path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
PATHS = [
    *spec(),
    *(f"{name}/{field}" for name in ("process", "linux") for field in spec()[name]),
    "process/user/uid", "process/env/0", "process/capabilities/bounding", "mounts/0",
    "mounts/0/options", "mounts/0/source", "linux/namespaces/0", "linux/namespaces/2/path",
    "linux/resources/memory", "linux/resources/memory/limit", "linux/resources/cpu",
    "linux/uidMappings", "linux/devices",
]  # fmt: skip
MAPPED = [
    {"containerID": 0, "hostID": 100_000, "size": 1000},
    {"containerID": 1000, "hostID": 200_000, "size": 10},
]


def read_all(found: Spec) -> list[object]:
    """Reads every property of a spec and of its mounts."""
    names = [name for name, kind in vars(Spec).items() if isinstance(kind, property)]
    mounts = [(each.destination, each.source, each.is_bind) for each in found.mounts]
    named = [found.namespace("network"), found.bind_source("/dev/shm"), found.annotation("a")]
    return [*(getattr(found, name) for name in names), *mounts, *named]


@given(st.sampled_from(PATHS), JSON)
def test_odd_part_raises_no_error(path: str, odd: object) -> None:
    strange = spec()
    *parents, last = path.split("/")
    place = strange
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name] or place
    if isinstance(place, list):
        place[int(last)] = odd
    else:
        place[last] = odd
    read_all(Spec(strange))


def test_empty_spec_has_nothing() -> None:
    found = Spec({})
    assert not any(each for each in read_all(found) if each != (0, 0))
    assert found.owner == (0, 0)


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{", b"\xff", b'"process"'])
def test_other_bytes_than_a_json_object_are_no_spec(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        oci_spec.parse(data)


def test_last_value_of_a_variable_counts_and_all_are_listed() -> None:
    found = Spec({"process": {"env": ["A=1", "B", "A=2=3"]}})
    assert found.environment == {"A": "2=3", "B": ""}
    assert found.env == ["A=1", "B", "A=2=3"]


@pytest.mark.parametrize(
    ("user", "mappings", "owner"),
    [
        ({"uid": 1000, "gid": 7}, None, (1000, 7)),
        ({}, None, (0, 0)),
        (None, None, (0, 0)),
        ({"uid": 1000, "gid": 7}, MAPPED, (200_000, 100_007)),
        ({"uid": 5000, "gid": 1010}, MAPPED, (0, 0)),
        ({"uid": -1, "gid": "x"}, None, (0, 0)),
        ({"uid": 1, "gid": 1}, [{"containerID": "0", "hostID": 1, "size": 1}], (0, 0)),
    ],
)
def test_owner_is_the_process_user_as_the_host_counts(
    user: object, mappings: object, owner: tuple[int, int]
) -> None:
    linux = {"uidMappings": mappings, "gidMappings": mappings}
    assert Spec({"process": {"user": user}, "linux": linux}).owner == owner


@pytest.mark.parametrize(
    ("mount", "source"),
    [
        ({"destination": "/dev/shm", "type": "bind", "source": "/a"}, "/a"),
        ({"destination": "/dev/shm/", "type": "none", "source": "/a", "options": ["rbind"]}, "/a"),
        ({"destination": "/dev/shm", "type": "bind"}, ""),
        ({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}, ""),
        ({"destination": "/dev", "type": "bind", "source": "/a"}, ""),
    ],
)
def test_bind_source_is_the_directory_of_the_host(mount: object, source: str) -> None:
    assert Spec({"mounts": [{"destination": "/proc"}, mount]}).bind_source("/dev/shm") == source


@pytest.mark.parametrize(
    ("cpu", "cpus"),
    [
        ({"quota": 50_000, "period": 100_000}, 0.5),
        ({"quota": 50_000}, 0.5),
        ({"quota": 200_000, "period": 0}, 2.0),
        ({"quota": -1}, 0.0),
        ({"quota": 1, "period": -5}, 0.0),
        ({"quota": "1"}, 0.0),
    ],
)
def test_quota_gives_a_number_of_processors(cpu: object, cpus: float) -> None:
    assert Spec({"linux": {"resources": {"cpu": cpu}}}).cpus == cpus


@pytest.mark.parametrize("root", [None, {}, {"path": 7}, []])
def test_bundle_without_a_root_file_system_is_refused(tmp_path: Path, root: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"root": root}))
    with pytest.raises(ValueError, match="names no root file system"):
        Bundle(str(tmp_path))


def test_root_file_system_is_beside_config_json_or_absolute(tmp_path: Path) -> None:
    for path, place in (("rootfs", f"{tmp_path}/rootfs"), ("/elsewhere", "/elsewhere")):
        (tmp_path / "config.json").write_text(json.dumps({"root": {"path": path}}))
        assert Bundle(str(tmp_path)).rootfs == place
