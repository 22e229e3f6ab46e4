"""Volumes as they were when a container was created: remembered, in time, and compared."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from shim.contract.errors import NotCapturable
from shim.contract.names import ContainerId
from shim.daemon import content
from shim.daemon.tracked import Pod, Tracked
from shim.gate import volumecontent
from shim.oci.spec import Spec
from shim.workload.annotations import Wish
from tests.unit.gate.test_volumecontent import spec, volume

if TYPE_CHECKING:
    from pathlib import Path


def tracked(**wish: Any) -> Tracked:
    pod = Pod("models", "pod-1", "uid-1", "sandbox", ("10.0.0.1",))
    return Tracked(ContainerId("abc"), "main", pod, Wish(snapshot="auto", **wish))


class Identified:
    """The parts of an identity that `check` reads."""

    def __init__(self, held: str | None) -> None:
        self.facts = {} if held is None else {volumecontent.CODE: held}


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(content, "CONTAINERS", str(tmp_path / "containers"))
    (tmp_path / "containers" / "abc").mkdir(parents=True)
    return tmp_path / "containers" / "abc"


def test_next_daemon_knows_the_volume_content_at_creation(tmp_path: Path, private: Path) -> None:
    place = volume(tmp_path, 1, "secret", "s", {"a": "old"})
    given = spec(place)

    async def run() -> None:
        held = await content.at_creation(tracked(), given)
        identity: Any = Identified(held)
        await content.check(tracked(), identity, given)
        (place / "..data/a").write_text("new")
        assert await content.at_creation(tracked(), given) == held
        with pytest.raises(NotCapturable, match="has changed since it was created"):
            await content.check(tracked(), identity, given)
        await content.check(tracked(volume_content="ignore"), identity, given)
        (private / "volume-content.json").unlink()
        assert await content.at_creation(tracked(), given) != held
        assert await content.at_creation(tracked(), Spec({"mounts": []})) is None

    asyncio.run(run())


def test_slow_volume_is_not_awaited_and_fits_nothing(
    tmp_path: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del private
    given = spec(volume(tmp_path, 1, "secret", "s", {"a": "old"}))

    def slow(_spec: object, _pod: object) -> str:
        time.sleep(0.5)
        return "{}"

    monkeypatch.setattr(volumecontent, "fact", slow)
    monkeypatch.setattr(content, "_WITHIN_S", 0.05)

    async def run() -> None:
        held = await content.at_creation(tracked(), given)
        assert held
        assert volumecontent.NOT_READ in held
        identity: Any = Identified(held)
        with pytest.raises(NotCapturable, match="cannot be read"):
            await content.check(tracked(), identity, given)
        monkeypatch.setattr(content, "_WITHIN_S", 10.0)
        monkeypatch.setattr(content, "_AT_ONCE", 0)
        assert await content.at_creation(tracked(), given) == held, "too many hang already"

    asyncio.run(run())
    readers = [each for each in threading.enumerate() if each.name.startswith("volume-content")]
    for each in readers:
        each.join(5)
    assert not any(each.is_alive() for each in readers), "a thread ends with its work"
