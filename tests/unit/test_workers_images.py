"""An importer can read the image archives, and equal content gives equal archives."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.workers import images, inputs, ocitar

if TYPE_CHECKING:
    from pathlib import Path


def small_tree(at: Path) -> Path:
    """Makes a directory, a file, its hard link and a symlink."""
    (at / "etc").mkdir(parents=True)
    (at / "etc" / "file").write_text("content")
    os.link(at / "etc" / "file", at / "etc" / "hard")
    (at / "link").symlink_to("etc/file")
    (at / "skipped").mkdir()
    return at


def test_every_blob_has_the_digest_that_its_descriptor_says(tmp_path: Path) -> None:
    layer = ocitar.make_layer(small_tree(tmp_path / "tree"), tmp_path / "layer.tar", prefix="opt/x")
    archive = tmp_path / "image.tar"
    ocitar.write_image(archive, "quickthaw.test/small:latest", [layer], {"Cmd": ["/bin/true"]})
    with tarfile.open(archive) as tar:
        blobs = {name: _content(tar, name) for name in tar.getnames()}
    index = json.loads(blobs["index.json"])["manifests"][0]
    assert index["annotations"]["io.containerd.image.name"] == "quickthaw.test/small:latest"
    manifest = json.loads(blobs[_path(index["digest"])])
    config = json.loads(blobs[_path(manifest["config"]["digest"])])
    assert config["rootfs"]["diff_ids"] == [layer.digest]
    for descriptor in (index, manifest["config"], *manifest["layers"]):
        blob = blobs[_path(descriptor["digest"])]
        assert f"sha256:{hashlib.sha256(blob).hexdigest()}" == descriptor["digest"]
        assert len(blob) == descriptor["size"]


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    return file.read() if file else b""


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def test_layer_keeps_links_and_leaves_out_excluded_files(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    layer = ocitar.make_layer(tree, tmp_path / "l.tar", prefix="opt", keep=lambda p: p != "skipped")
    with tarfile.open(layer.path) as tar:
        kinds = {info.name: info.type for info in tar}
    assert kinds == {
        "opt": tarfile.DIRTYPE,
        "opt/etc": tarfile.DIRTYPE,
        "opt/etc/file": tarfile.REGTYPE,
        "opt/etc/hard": tarfile.LNKTYPE,
        "opt/link": tarfile.SYMTYPE,
    }


def test_layer_of_the_same_tree_has_the_same_digest(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    layers = [ocitar.make_layer(tree, tmp_path / f"{number}.tar") for number in range(2)]
    assert layers[0].digest == layers[1].digest


@pytest.mark.parametrize("name", images.SITES)
def test_every_wheel_that_is_imported_is_pinned_by_digest(name: str) -> None:
    site = images.SITES[name]
    lines = (images.HERE / site.lock).read_text().splitlines()[1:]
    locked = dict(line.split(" --hash=") for line in lines)
    assert set(site.wheels) <= {pinned.partition("+")[0] for pinned in locked}
    assert all(digest.startswith("sha256:") for digest in locked.values())


def test_an_answer_is_right_only_with_label_and_every_letter() -> None:
    wanted = inputs.Input("sign", b"", "png", ("NO PARKING", "8-18"))
    assert wanted.is_answered_by({"label": "png", "text": ["NOPARKING", "8-18"]})
    assert not wanted.is_answered_by({"label": "png", "text": ["NO BARKING", "8-18"]})
    assert not wanted.is_answered_by({"label": "jpeg", "text": ["NO PARKING", "8-18"]})
