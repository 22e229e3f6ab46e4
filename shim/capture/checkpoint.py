"""Runs `runc checkpoint` on a frozen container; CRIU does not write the content of memory.

See `shim.criu.devnull`; `shim.memory.copy.memorycopy` writes that content. Blocking.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shim.capture import safepoint
from shim.contract import journal
from shim.contract.errors import CriuDumpFailed
from shim.contract.paths import CONTAINER_DUMP_CONF, CONTAINER_WORK
from shim.criu import devnull, options, sharedmem
from shim.criu.log import Cut, first_error, was_cut
from shim.node import tool

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from shim.source.source import Source

_AT_LEAST_S = 1.0


def checkpoint(
    source: Source,
    image_dir: Path,
    pids: Collection[int],
    shared: Collection[int],
    *,
    unanswered: str,
    until: float,
    thaw: Callable[[], None],
) -> None:
    """Fill `image_dir` with CRIU's images, but for the content of memory.

    pids: the container's processes. shared: the objects of shared memory that we copy.
    unanswered: a likely cause of a failure, or empty. until: the deadline on `time.monotonic`.
    thaw: lets the container run again: without that, CRIU may wait where no signal ends the wait.
    Raises CriuDumpFailed, caused by Cut if CRIU did not end by itself; DamagedImage, OSError.
    """
    devnull.make(image_dir, range(1, 1 + len(pids) + len(shared)))
    _run(source, image_dir, pids, unanswered, until, thaw)
    only_crius = _only_criu_has(image_dir, shared)
    if any(devnull.is_lost(image_dir, number) for number in only_crius):
        # A memfd comes before the process that has it open, other shared memory after all
        # processes. Nothing changes while all is frozen: the next dump has the same numbers.
        had = devnull.of_processes(image_dir).union(devnull.of_objects(image_dir).values())
        for path in image_dir.iterdir():
            path.unlink()
        devnull.make(image_dir, had - only_crius)
        _run(source, image_dir, pids, unanswered, until, thaw)
    devnull.remove(image_dir)


def _only_criu_has(image_dir: Path, shared: Collection[int]) -> set[int]:
    """Returns the images of objects that we do not copy, or that CRIU handles otherwise."""
    images = devnull.of_objects(image_dir)
    known = sharedmem.objects(image_dir) if images else {}
    copied = {number for number in shared if number in known and not known[number].is_huge}
    return {image for number, image in images.items() if number not in copied}


def _run(
    source: Source,
    image_dir: Path,
    pids: Collection[int],
    unanswered: str,
    until: float,
    thaw: Callable[[], None],
) -> None:
    work = source.private / CONTAINER_WORK
    work.mkdir(mode=0o700, exist_ok=True)
    argv = [
        *source.runtime, f"--log={work}/runc.log", "--log-format=json", "checkpoint",
        "--leave-running", f"--image-path={image_dir}", f"--work-path={work}", source.container,
    ]  # fmt: skip
    why = ""
    try:
        environment = options.write_for_dump(str(source.private / CONTAINER_DUMP_CONF))
        with journal.lock(str(source.private), journal.CHECKPOINT) as lock_fd:
            within_s = max(_AT_LEAST_S, until - time.monotonic())
            ended = tool.run(
                argv, within_s=within_s, environment=environment, held_fd=lock_fd, release=thaw,
                before_kill=lambda pid: safepoint.stop(pid, pids),
            )  # fmt: skip
        if ended.status:
            why = "; ".join(filter(None, [first_error(str(work), "dump.log"), unanswered]))
    except TimeoutError as error:
        why = f"{error}, which its frozen window had left, and the source was thawed"
    except OSError as error:
        why = str(error)
    if why:
        failure = CriuDumpFailed(
            "cannot dump the process tree", about=source.container, why=why,
            do=f"The whole log is {work}/dump.log while the container exists.",
        )  # fmt: skip
        raise failure from (Cut(why) if was_cut(str(work)) else None)
