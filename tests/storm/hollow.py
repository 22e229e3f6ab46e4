"""The processes of a storm without a container: `python3 -m tests.storm.hollow DIRECTORY WISHES`.

The processes make their memory, write it into payload files, unmap it again, and each hands a
userfaultfd to the page server, as CRIU does for the processes that it restores. Then they storm.

A line on stdin tells that the server is there; a line on stdout tells that the payload is.
"""

import json
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shim.kernel.priority import killed_with_parent
from shim.memory.layout import encode_ranges
from tests.storm import uffd
from tests.workers import areas
from tests.workers.areas import PAGE, Area
from tests.workers.storm import Process, Report, filled

SOCKET: Final = "lazy-pages.socket"
REPORT: Final = "report"


@dataclass(frozen=True, slots=True)
class Wishes:
    """The parameters of a round. threads: of each process. size_mib: of each process."""

    seed: int
    seconds: float = 2.0
    processes: int = 2
    threads: int = 3
    size_mib: int = 32


class Scene:
    """The parent of all processes: takes them through the steps together."""

    def __init__(self, directory: Path, wishes: Wishes) -> None:
        self._directory, self._wishes = directory, wishes
        self._report = Report(str(directory / REPORT))
        self._criu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._criu.connect(str(directory / SOCKET))
        self._steps: list[tuple[int, int]] = []
        self._pids: list[int] = []

    def run(self) -> int:
        """Run the round. Returns the exit status of the worst process."""
        for number in range(self._wishes.processes):
            self._start(number)
        for number in range(self._wishes.processes):
            self._step(number)  # the payload is written
        print("prepared", flush=True)
        sys.stdin.readline()
        for number in range(self._wishes.processes):
            self._step(number)  # the memory is hollow, and the server has the userfaultfd
        self._criu.sendall(uffd.FINISHED)
        self._criu.close()
        for _, go in self._steps:
            os.write(go, b".")
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self._pids]
        return max(map(abs, statuses))

    def _step(self, number: int) -> None:
        done, go = self._steps[number]
        os.write(go, b".")
        if not os.read(done, 1):
            raise RuntimeError(f"process {number} ended before the storm")

    def _start(self, number: int) -> None:
        (done, its_done), (its_go, go) = os.pipe(), os.pipe()
        parent = os.getpid()
        if pid := os.fork():
            os.close(its_done)
            self._pids.append(pid)
            self._steps.append((done, go))
            return
        code = 3
        try:
            killed_with_parent(parent)
            code = self._process(number, its_go, its_done)
        except BaseException:  # noqa: BLE001 - the child must never run the parent's code
            self._report.say("wrong", process=f"p{number}", error=traceback.format_exc())
        os._exit(code)

    def _process(self, number: int, go: int, done: int) -> int:
        wishes = self._wishes
        owned, regions = filled(number, wishes.size_mib, wishes.seed)
        os.read(go, 1)
        write_payload(self._directory, os.getpid(), owned, regions)
        os.write(done, b".")
        os.read(go, 1)
        fd = hollow(regions)
        self._criu.sendall(uffd.handed_over(os.getpid()))
        socket.send_fds(self._criu, [b"."], [fd])
        os.close(fd)
        self._criu.close()
        os.write(done, b".")
        os.read(go, 1)
        process = Process(self._report, f"p{number}", owned)
        return process.storm(wishes.seed, wishes.seconds, wishes.threads)


def write_payload(
    directory: Path, pid: int, owned: list[Area], regions: list[tuple[int, int]]
) -> None:
    """Write the content of all pages that are not zeros, and their addresses."""
    extents: list[tuple[int, int, int]] = []
    with (directory / f"space-{pid}.data").open("wb") as file:
        offset = 0
        for area in sorted(owned, key=lambda each: each.address):
            for page, label in enumerate(area.rests):
                if not label:
                    continue
                file.write(areas.page_of(label, label))
                start = area.at(page)
                if extents and extents[-1][1] == start:
                    extents[-1] = extents[-1][0], start + PAGE, extents[-1][2]
                else:
                    extents.append((start, start + PAGE, offset))
                offset += PAGE
    (directory / f"space-{pid}.ranges").write_bytes(encode_ranges(extents))
    (directory / f"space-{pid}.areas").write_text(json.dumps(sorted(regions)))


def hollow(regions: list[tuple[int, int]]) -> int:
    """Put registered, empty mappings in the place of the regions. Returns the userfaultfd."""
    fd = uffd.opened()
    for start, end in regions:
        areas.mapped((end - start) // PAGE, at=start)
        uffd.register(fd, start, end)
    return fd


if __name__ == "__main__":
    killed_with_parent(os.getppid())
    sys.exit(Scene(Path(sys.argv[1]), Wishes(**json.loads(sys.argv[2]))).run())
