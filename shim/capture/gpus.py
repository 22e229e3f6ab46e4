"""A capture of a container with GPUs: what is refused, and the dump while its GPUs stand still.

A container without GPUs takes none of this way, and one whose processes use none only the look.
Blocking.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shim.capture.dump import dump
from shim.contract import jsontext
from shim.contract.errors import GpuNotCapturable, GpuNotCheckpointed
from shim.contract.paths import CONTAINER_GPU_LOCK, SNAPSHOT_MEMORY
from shim.gate import gpu
from shim.gate.facts import power_facts
from shim.gpu import payload, processes, support, ways
from shim.gpu.engine import GUARD_S, Engine
from shim.gpu.helper import Team
from shim.gpu.look import look
from shim.kernel import nvml
from shim.kernel.steps import Steps
from shim.node import tool
from shim.source.source import own_freezer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shim.capture.dump import Dumped
    from shim.gpu.payload import GpuPayload
    from shim.gpu.support import Look
    from shim.kernel.stopping import Stop
    from shim.source.source import Source

_GPUS_S = 20.0
_LOOK_S = 10.0
_BESIDE = "gpu"
"""In staging while the capture lasts."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The look before a capture. cuda: whether a process uses a GPU at all. bytes: on its GPUs."""

    cuda: bool
    bytes: int
    rows: list[dict[str, object]]


class _Program:
    """A helper of the driver calls, in a session of its own: it may outlive the daemon."""

    def __init__(self, argv: Sequence[str], fd: int) -> None:
        self._process = subprocess.Popen(
            list(argv), env=tool.ENVIRONMENT, stdin=subprocess.DEVNULL, pass_fds=(fd,), cwd="/",
            start_new_session=True,
        )  # fmt: skip

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def spawn(argv: Sequence[str], fd: int) -> _Program:
    """How the daemon starts a helper; see `shim.gpu.helper`."""
    return _Program(argv, fd)


def check(source: Source) -> int:
    """Returns the bytes on its GPUs. Raises GpuNotCapturable with all reasons."""
    seen = examine(source)
    if refused := [row for row in seen.rows if not row["fits"]]:
        error = GpuNotCapturable(
            "the GPUs speak against a capture", about=source.container,
            why="; ".join(f"{row['code']}: {row['why']}" for row in refused),
            do=" ".join(dict.fromkeys(str(row["do"]) for row in refused)),
        )  # fmt: skip
        error.codes = [str(row["code"]) for row in refused]
        raise error
    return seen.bytes


def examine(source: Source) -> Seen:
    """Look at the container, and change nothing. Raises GpuNotCapturable when it cannot be seen."""
    try:
        listed = _listed(source)
        pids = listed()
        if not processes.candidates(pids) and not any(map(processes.open_devices, pids)):
            return Seen(False, 0, [])
        with Team(spawn) as team:
            engine = Engine(source.container, listed, team, Steps(), time.monotonic() + _LOOK_S)
            engine.find()
            seen = _look(source, engine.pids)
        rows = support.findings(seen) if engine.pids or seen.others else []
        return Seen(bool(engine.pids), seen.bytes, rows)
    except (OSError, ValueError, GpuNotCheckpointed) as error:
        raise GpuNotCapturable(
            "the container's GPUs cannot be looked at", about=source.container, why=str(error),
            do="Does nvidia-smi answer on the node?",
        ) from error  # fmt: skip


def dump_stopped(
    source: Source, staging: Path, steps: Steps, stop: Stop, frozen_limit_s: float
) -> tuple[Dumped, GpuPayload | None]:
    """`shim.capture.dump.dump`, in which the GPUs stand still from the end of the pre-copy until
    the thaw, their content in memory or taken away.
    """
    lock = str(source.private / CONTAINER_GPU_LOCK)
    with Team(spawn, guard_until=stop.until + GUARD_S, lock=lock) as team:
        engine = Engine(source.container, _listed(source), team, steps, stop.until)
        if not processes.candidates(_listed(source)()) or not engine.find():
            return dump(source, staging, steps, stop, frozen_limit_s), None
        team.prepare(len(engine.pids))  # each takes a moment to start: not while all stands still
        way = ways.named(ways.of(engine.pids), spawn, source.container)
        with _payload(staging) as dirfd, way.evacuation(source.container, dirfd, lock) as away:
            away.begin([payload.octets(str(gpu["uuid"])) for gpu in source.gpus or ()], stop.until)
            parked = [lambda: engine.stopped(away)]
            copied = dump(source, staging, steps, stop, frozen_limit_s, parked)
            with steps.timed("gpu_saved"):
                about = away.finish(stop.until)
            away.tell(steps)
    return copied, payload.GpuPayload(
        way=way.name, about=about, gpus=source.gpus or (),
        processes=processes.numbers_within(source.pid, engine.pids),
    )  # fmt: skip


@contextlib.contextmanager
def _payload(staging: Path) -> Iterator[int]:
    """A directory for files of device memory, which are among those of memory afterwards: so they
    are listed, verified and read ahead like these.
    """
    beside = staging / _BESIDE
    beside.mkdir(mode=0o700)
    dirfd = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield dirfd
    finally:
        os.close(dirfd)
    for path in beside.iterdir():
        path.rename(staging / SNAPSHOT_MEMORY / path.name)
    beside.rmdir()


def _listed(source: Source) -> Callable[[], list[int]]:
    return own_freezer(source).pids


def _look(source: Source, cuda: Sequence[int]) -> Look:
    inventory = _inventory()
    return look(
        init=source.pid, listed=_listed(source)(), cuda=cuda, driver=str(inventory["driver"]),
        gpus=gpu.chosen(source.spec, inventory),
        way=ways.named(ways.of(cuda), spawn, source.container),
        host_network=jsontext.parse(power_facts(source.spec)["namespaces"])["network"] == "host",
    )  # fmt: skip


def _inventory() -> dict[str, Any]:
    """Raises ValueError, OSError, TimeoutError."""
    argv = [sys.executable, "-ISE", os.path.abspath(nvml.__file__), "processes"]
    ended = tool.run(argv, within_s=_GPUS_S)
    if ended.status:
        raise ValueError(ended.tail)
    found: dict[str, Any] = jsontext.parse(ended.output)
    return found
