"""Digests of Secret and ConfigMap volumes: of their data, and of nothing that is a pod's own."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.gate import volumecontent
from shim.gate.key import PodValues
from shim.gate.volumecontent import NOT_READ, fact, named
from shim.oci.spec import Spec

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ%s.c2lnbmF0dXJl"  # noqa: S105 - of nobody


def pod(number: int) -> PodValues:
    return PodValues(
        namespace="models", name=f"pod-{number}", uid=f"uid-{number}", ips=[f"10.0.0.{number}"]
    )


def volume(top: Path, number: int, kind: str, name: str, files: dict[str, str]) -> Path:
    """Makes a volume as kubelet lays it out: the names are links over `..data`."""
    place = top / "pods" / f"uid-{number}" / "volumes" / f"kubernetes.io~{kind}" / name
    version = place / "..2026_01_01"
    for path, text in files.items():
        (version / path).parent.mkdir(parents=True, exist_ok=True)
        (version / path).write_text(text)
        first = path.partition("/")[0]
        if not os.path.lexists(place / first):
            (place / first).symlink_to(f"..data/{first}")
    (place / "..data").symlink_to(version.name)
    return place


def spec(*sources: object) -> Spec:
    return Spec({"mounts": [
        {"destination": f"/{number}", "type": "bind", "source": str(source), "options": ["rbind"]}
        for number, source in enumerate(sources)
    ]})  # fmt: skip


def found(number: int, *sources: object) -> dict[str, str]:
    values: dict[str, str] = json.loads(fact(spec(*sources), pod(number)))
    return values


def test_only_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    files = {"password": "a", "tls/key": "b"}
    one, two = (volume(tmp_path, number, "secret", "db", files) for number in (1, 2))
    assert found(1, one) == found(2, two)
    assert list(found(1, one)) == ["secret volume db"]
    assert "password" not in fact(spec(one), pod(1))
    before = found(2, two)
    for change in ("..data/password", "..data/tls/key"):
        (two / change).write_text("changed")
        assert found(2, two) != before
        before = found(2, two)
    os.rename(two / "..data/password", two / "..data/other")
    assert found(2, two) != before


def test_tokens_and_a_pods_own_values_are_left_out_of_projected_volumes(tmp_path: Path) -> None:
    def api_access(number: int, authority: str = "ca") -> Path:
        files = {
            "token": TOKEN % number, "ca.crt": authority, "namespace": "models",
            "uid": f"uid-{number}", "name": f"pod-{number}\n",
        }  # fmt: skip
        name = f"kube-api-access-abcd{number}"
        return volume(tmp_path, number, "projected", name, files)

    one, two, three = api_access(1), api_access(2), api_access(3, "another")
    assert found(1, one) == found(2, two)
    assert found(3, three) != found(1, one)
    a_secret = volume(tmp_path, 4, "secret", "s", {"token": TOKEN % 1})
    another = volume(tmp_path, 5, "secret", "s", {"token": TOKEN % 2})
    assert found(4, a_secret) != found(5, another), "in a Secret it is data like other data"


def test_a_subpath_counts_as_its_whole_volume(tmp_path: Path) -> None:
    whole = volume(tmp_path, 1, "configmap", "settings", {"a": "1"})
    part = tmp_path / "pods/uid-1/volume-subpaths/settings/main/0"
    assert found(1, part) == found(1, whole) == found(1, whole, part)
    assert named(spec(part))
    elsewhere = tmp_path / "pods/uid-1/volume-subpaths/data/main/0"
    assert found(1, elsewhere) == {}, "a subpath of another kind of volume"


def test_other_mounts_are_not_read(tmp_path: Path) -> None:
    others = [
        tmp_path, "/etc/hosts", "relative/pods/u/volumes/kubernetes.io~secret/x",
        tmp_path / "pods/uid-1/volumes/kubernetes.io~empty-dir/data",
        tmp_path / "pods/uid-1/volumes/kubernetes.io~downward-api/labels",
    ]  # fmt: skip
    assert not named(spec(*others))
    assert fact(spec(*others), pod(1)) == "{}"


@pytest.mark.parametrize("planted", ["link", "fifo", "deep", "many", "big", "gone"])
def test_volume_beyond_its_bounds_is_reported_as_not_read(
    tmp_path: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = volume(tmp_path, 1, "secret", "s", {"a": "1"})
    data = place / "..2026_01_01"
    if planted == "link":
        (data / "b").symlink_to("/etc/shadow")
    if planted == "fifo":
        os.mkfifo(data / "b")
    if planted == "deep":
        data.joinpath(*["x"] * 9).mkdir(parents=True)
    if planted == "many":
        monkeypatch.setattr(volumecontent, "_MAX_FILES", 0)
    if planted == "big":
        monkeypatch.setattr(volumecontent, "_MAX_BYTES", 0)
    if planted == "gone":
        place = tmp_path / "pods/uid-1/volumes/kubernetes.io~secret/gone"
    (value,) = found(1, place).values()
    assert value.startswith(NOT_READ)


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    place = volume(tmp_path, 1, "secret", "s", {"a/b/c": "1"})
    (place / "..data/link").symlink_to("/")
    before = os.listdir("/proc/self/fd")
    fact(spec(place), pod(1))
    assert os.listdir("/proc/self/fd") == before


@given(st.recursive(
    st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["mounts", "source", "type", "options", "destination"]), inner
    ),
))  # fmt: skip
def test_odd_specs_have_no_volumes(odd: Any) -> None:
    given_spec = Spec({"mounts": odd})
    assert named(given_spec) is False
    assert fact(given_spec, pod(1)) == "{}"
