from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import manifest
from shim.contract.errors import BadManifest
from tests.unit.manifests import fields, made

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def as_object(found: manifest.Manifest) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(found.encode())
    return told


def test_manifest_survives_writing_and_reading() -> None:
    found = made()
    assert manifest.decode(found.encode()) == found
    assert found.created == "2023-11-14T22:13:20Z"
    assert found.source.command == ("python3", "serve.py")
    assert found.sizes.total == 4106


def test_the_id_is_the_digest_of_all_of_the_content() -> None:
    assert made().id == made().id
    assert made().id != made(facts={"user": "{1}"}).id
    assert made().id != made(created_at=1.0).id


@pytest.mark.parametrize("field", sorted(fields().keys() | {"id", "created"}))
def test_no_field_can_be_changed_or_missing(field: str) -> None:
    told = as_object(made())
    changed = {**told, field: made(name="other", key="f" * 64, created_at=5, facts={}).id}
    for bad in (changed, {key: value for key, value in told.items() if key != field}):
        with pytest.raises(BadManifest):
            manifest.decode(json.dumps(bad).encode())


def test_an_unknown_key_is_an_error_at_every_level() -> None:
    told = as_object(made())
    for place in (told, told["source"], told["software"], told["files"][0], told["sizes"]):
        place["surprise"] = 1
        with pytest.raises(BadManifest, match="surprise"):
            manifest.decode(json.dumps(told).encode())
        del place["surprise"]


def test_error_of_a_newer_schema_has_the_remedy() -> None:
    told = as_object(made()) | {"schema": 6}
    with pytest.raises(BadManifest) as caught:
        manifest.decode(json.dumps(told).encode())
    assert "schema 6, this quickthaw reads 5; upgrade quickthaw on this node" in str(caught.value)


@pytest.mark.parametrize("schema", [None, 0, True, "5", 5.5])
def test_any_other_schema_is_refused(schema: object) -> None:
    with pytest.raises(BadManifest, match="no schema"):
        manifest.decode(json.dumps(as_object(made()) | {"schema": schema}).encode())


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_manifest_of_an_earlier_schema_is_reported_as_old(schema: int) -> None:
    told = rf"schema {schema}, of an older quickthaw.*next pod makes a new"
    with pytest.raises(BadManifest, match=told):
        manifest.decode(json.dumps(as_object(made()) | {"schema": schema}).encode())


@pytest.mark.parametrize("count", [0, 3, 5])
@pytest.mark.parametrize("path", ["../x", "criu.tree"])
def test_manifest_lists_no_files_but_the_listings(path: str, count: int) -> None:
    files = made().as_json()["files"]
    assert isinstance(files, list)
    with pytest.raises(ValueError, match=r"criu.tree, rootfs.tree, shm.tree, memory.tree"):
        made(files=[*files, {"path": path, "size": 1, "sha256": "b" * 64}][:count])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}',
        b'{"schema": NaN}', b" " * (manifest.MAX_BYTES + 1),
    ],
)  # fmt: skip
def test_garbage_is_a_bad_manifest(data: bytes) -> None:
    with pytest.raises(BadManifest):
        manifest.decode(data)


@given(st.binary(max_size=200))
def test_decode_raises_only_its_documented_error(data: bytes) -> None:
    with pytest.raises(BadManifest):
        manifest.decode(data)


@given(st.sampled_from(sorted(as_object(made()))), JSON)
def test_no_value_of_a_field_breaks_decode(field: str, value: object) -> None:
    told = as_object(made())
    if value == told[field]:
        return
    with pytest.raises(BadManifest):
        manifest.decode(json.dumps(told | {field: value}).encode())


def test_a_manifest_is_frozen() -> None:
    with pytest.raises(AttributeError):
        made().name = "other"


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_manifest_in_the_wrong_directory_is_refused(snapshot: int, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(made().encode())
    assert manifest.read(snapshot, snapshot=made().id) == made()
    with pytest.raises(BadManifest, match="its id is"):
        manifest.read(snapshot, snapshot="e" * 64)


@pytest.mark.parametrize("kind", ["missing", "link", "fifo", "directory"])
def test_manifest_that_is_no_regular_file_is_refused(
    snapshot: int, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "manifest.json"
    if kind == "link":
        path.symlink_to("/etc/passwd")
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "directory":
        path.mkdir()
    with pytest.raises(BadManifest):
        manifest.read(snapshot, snapshot=made().id)


@pytest.mark.parametrize("module", ["shim.contract.manifest", "shim.gate.decide", "shim.gate.key"])
def test_manifest_and_gate_stay_lean(module: str) -> None:
    code = f"import sys; sys.path.insert(0, '.'); import {module}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-ISE", "-c", code], text=True).split()
    heavy = {"typing", "dataclasses", "logging", "subprocess", "pathlib", "asyncio", "shutil"}
    assert heavy.isdisjoint(loaded), "every one of these is paid by the pod that waits"
