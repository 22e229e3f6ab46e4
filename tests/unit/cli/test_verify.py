"""`quickthaw verify`, and the daemon's verification after a boot."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from shim.cli import main, offline, verify
from shim.contract import manifest as manifests
from shim.daemon import reverify
from shim.integrity.check import SnapshotCheck
from shim.store.store import Store
from shim.trust.verdict import Trust
from tests.unit.manifests import fields
from tests.unit.snapshots import make_parts
from tests.unit.trusting import TrustsAll, keys_in

if TYPE_CHECKING:
    from pathlib import Path

    from shim.contract.manifest import File, Manifest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="device nodes and owners need root")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store(str(tmp_path / "store"), marks_directory=str(tmp_path / "marks"))
    found.open()
    monkeypatch.setattr("shim.store.store.Store", lambda: Store(str(tmp_path / "store")))
    monkeypatch.setattr(offline, "trust", lambda _: TrustsAll())

    def with_own_marks(*arguments: Any, **more: Any) -> SnapshotCheck:
        return SnapshotCheck(*arguments, **more, marks_directory=str(tmp_path / "marks"))

    monkeypatch.setattr(verify, "SnapshotCheck", with_own_marks)
    monkeypatch.setattr(reverify, "VERIFIED", str(tmp_path / "marks"))
    return found


def publish(store: Store) -> Manifest:
    def describe(files: tuple[File, ...]) -> Manifest:
        return manifests.build(**fields(files=files))

    with store.staged() as staged:
        make_parts(staged)
        return store.publish(staged, describe)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = main.main(["verify", "--json", *arguments])
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["snapshots"]
    return status, rows


def test_whole_snapshots_are_reported_as_whole(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    found = publish(store)
    for arguments in ((), (found.id[:12],), ("warm",)):
        status, (row,) = run(capsys, *arguments)
        assert (status, row["result"], row["reason"]) == (0, "whole", "")
        assert row["hashed_bytes"] > 10 << 20
    assert main.main(["verify"]) == 0
    assert found.id[:12] in capsys.readouterr().out


def test_worst_finding_gives_the_exit_status(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    found = publish(store)
    with (store.snapshots / found.id / "rootfs/etc/motd").open("ab") as file:
        file.write(b"!")
    status, (row,) = run(capsys)
    assert (status, row["result"]) == (24, "changed")
    assert "rootfs/etc/motd: expected size" in row["reason"]
    (store.snapshots / ("e" * 64)).mkdir()
    status, rows = run(capsys)
    assert (status, [each["result"] for each in rows]) == (51, ["changed", "damaged"])
    assert main.main(["verify"]) == 51
    assert "motd" in capsys.readouterr().err


def test_untrusted_snapshot_is_reported(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store)
    keys = keys_in(store.root / "keys")
    monkeypatch.setattr(offline, "trust", lambda found: Trust(keys, found.signature_of))
    status, (row,) = run(capsys)
    assert (status, row["result"], row["signature"]["state"]) == (1, "whole", "none")


def test_marks_of_removed_snapshots_are_removed(store: Store, tmp_path: Path) -> None:
    found = publish(store)
    assert sorted(path.name for path in (tmp_path / "marks" / found.id).iterdir()) == [
        "criu", "memory", "rootfs", "shm"
    ]  # fmt: skip
    store.remove(found.id, users=[])
    assert list((tmp_path / "marks").iterdir()) == []


def test_snapshots_without_marks_are_verified_after_a_boot(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = publish(store)
    called: list[list[str]] = []

    async def run_async(argv: list[str], *, within_s: float) -> None:
        del within_s
        called.append(argv)
        raise OSError("not here")

    monkeypatch.setattr("shim.node.tool.run_async", run_async)
    asyncio.run(reverify.reverify(store))
    assert called == []
    (tmp_path / "marks" / found.id / "rootfs").unlink()
    asyncio.run(reverify.reverify(store))
    assert [argv[1:] for argv in called] == [["verify", "--background"]]
