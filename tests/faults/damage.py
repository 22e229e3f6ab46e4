"""Faults from outside: damage to a snapshot, before or during its restore."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults import restoring
from tests.faults.cases import Case
from tests.faults.ground import Ground
from tests.faults.processes import HAPPENS_WITHIN_S, Scene, comm, pids_of, when_there
from tests.faults.restoring import Plan, Seen
from tests.node.flipping import flip_bit
from tests.node.kubelet import Container


def damaged(damage: Callable[[Path], None]) -> Scene:
    """Damages the snapshot before the pod is created."""

    def scene(ground: Ground, case: Case) -> Seen:
        damage(ground.snapshot.directory)
        return restoring.run(ground, case)

    return scene


def _truncate(directory: Path) -> None:
    image = directory / "criu" / "pages-1.img"
    os.truncate(image, image.stat().st_size // 2)


def _flip(directory: Path) -> None:
    """Flips a bit, and keeps size and times."""
    flip_bit(directory / "criu" / "pages-1.img")


def _flip_memory(directory: Path) -> None:
    flip_bit(directory / "memory" / "space-1.data")


def memory_damaged(ground: Ground, case: Case) -> Seen:
    """Damages memory. The check may find the damage after the first answer.

    The pod answers before the page server has checked all memory.
    """

    def when_started(container: Container) -> None:
        ground.wait(
            lambda: not [pid for pid in pids_of(ground, container.id) if "pages" in comm(pid)],
            "the page server goes on", HAPPENS_WITHIN_S,
        )  # fmt: skip

    _flip_memory(ground.snapshot.directory)
    return restoring.run(ground, case, Plan(when_started=when_started, had_run=True))


def _remove_image(directory: Path) -> None:
    next((directory / "criu").glob("core-*.img")).unlink()


def _truncate_manifest(directory: Path) -> None:
    os.truncate(directory / "manifest.json", 100)


def _remove_diff(directory: Path) -> None:
    shutil.rmtree(directory / "rootfs")


def removed_while_read(ground: Ground, case: Case) -> Seen:
    """Removes the images when CRIU has begun."""

    def during(_: Container) -> None:
        when_there(ground, "criu", "swrk")
        for image in (ground.snapshot.directory / "criu").iterdir():
            image.unlink()

    return restoring.run(ground, case, Plan(during=during))
