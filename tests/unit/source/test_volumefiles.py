"""The fact of files in volumes has each open file, by what CRIU does with its name."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from shim.contract.errors import NotCapturable
from shim.criu import images, openfiles
from shim.gate import volumes
from shim.oci.spec import Spec
from shim.source.opened import Opened
from shim.source.volumefiles import volume_files

if TYPE_CHECKING:
    from shim.source.source import Source

SOURCE = cast("Source", SimpleNamespace(container="c1", spec=Spec({
    "process": {"user": {"uid": os.getuid()}},
    "mounts": [{"destination": "/d", "type": "bind", "source": "/v"}],
})))  # fmt: skip
NAMED = openfiles.NamedFile("/d/f", os.O_RDWR, 0o100600)


def fact(
    monkeypatch: pytest.MonkeyPatch, names: list[str], *, entries: int, ghosts: int
) -> dict[str, Any]:
    """names: as /proc tells them. entries: how often files.img has the file."""
    status = os.stat(__file__)
    opened = [Opened(9, 1, f"/proc/9/fd/{at}", name, status) for at, name in enumerate(names)]
    monkeypatch.setattr(images, "ghosts", lambda _: [images.Ghost("/d/f", 0o100600)] * ghosts)
    monkeypatch.setattr(images, "link_remaps", lambda _: [])
    monkeypatch.setattr(images, "socket_directories", lambda _: [])
    monkeypatch.setattr(openfiles, "named_files", lambda _: [NAMED] * entries)
    found = volume_files(SOURCE, Path(), opened, 0)
    volumes.parse(found)
    return found


def test_file_with_a_name_and_one_that_had_it_are_both_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = fact(monkeypatch, ["/d/f", "/d/f (deleted)"], entries=2, ghosts=1)
    assert [(each["gone"], each["at"]) for each in found["files"]] == [
        (False, [(1, "fd/0")]), (True, [(1, "fd/1")])
    ]  # fmt: skip
    assert found["made"] == ["/d/f"]
    found = fact(monkeypatch, ["/d/f"], entries=1, ghosts=0)
    assert ([each["gone"] for each in found["files"]], found["made"]) == ([False], [])


def test_file_of_a_queue_is_not_taken_for_one_that_had_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NotCapturable, match="queue of a socket"):
        fact(monkeypatch, ["/d/f (deleted)"], entries=2, ghosts=1)
    with pytest.raises(NotCapturable, match="queue of a socket"):
        fact(monkeypatch, [], entries=1, ghosts=0)
