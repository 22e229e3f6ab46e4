"""Takes a process that is asked without pause through CRIU, again and again: see `loop`.

Each round: its device memory away, driver's checkpoint, dump, dead; memory loaded beside CRIU's
restore and the driver's, mapped, on. The next round captures what the last one restored.
"""

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.gpu.children import Helper
from tests.gpu.direct.host import Held, Host, Timer
from tests.gpu.direct.program import Program, Rows
from tests.gpu.images import Criu


class Loader(threading.Thread):
    """Fills new memory beside everything else."""

    def __init__(self, host: Host, held: Held) -> None:
        super().__init__(daemon=True)
        self.timer = Timer()
        self._host, self._about = host, (held.uuid, held.numbers, held.sizes)
        self.held: Held | None = None
        self.start()

    def run(self) -> None:
        self.held = self._host.made(*self._about, self.timer)


def capture(host: Host, program: Program, criu: Criu, images: Path, timer: Timer) -> Held:
    """The process is dead afterwards, the payload in the files; device memory is free."""
    held = host.take(program.pid, timer)
    program.found |= {"octets": sum(held.sizes), "pieces": len(held.numbers), "seen": host.seen}
    saving = threading.Thread(target=host.save, args=(held,), daemon=True)
    saving.start()
    for do in ("lock", "checkpoint"):
        with timer.step(f"driver {do}"):
            host.call(program.pid, do, **({"timeout_ms": 5000} if do == "lock" else {}))
    shutil.rmtree(images, ignore_errors=True)
    with timer.step("dump"):
        done = criu.dump(program.pid, images, "--ext-unix-sk")
    if not done["ok"]:
        raise RuntimeError(f"dump: {done}")
    program.found["images"] = done["images"]["bytes"]
    with timer.step("saved"):
        saving.join()
    timer.took["source stopped"] = round(time.perf_counter() - timer.began, 4)
    program.gone()
    about = Held(held.uuid, held.numbers, [], held.memory)
    held.let_go()
    return about


def restore(host: Host, program: Program, criu: Criu, images: Path, about: Held) -> Timer:
    """The process goes on. Times are from the moment when a container would be asked for."""
    before = program.status()
    timer = Timer()
    loader = Loader(host, about)
    with timer.step("criu"):
        done = criu.restore(images, "--ext-unix-sk")
    if not done["ok"]:
        raise RuntimeError(f"restore: {done}")
    program.pid = done["pid"]
    for do in ("restore", "unlock"):
        with timer.step(f"driver {do}"):
            host.call(program.pid, do)
    with timer.step("loaded"):
        loader.join()
    if loader.held is None:
        raise RuntimeError("the loader failed")
    host.give(program.pid, loader.held, timer)
    with timer.step("answer"):
        program.right(program.more(before, 20))
    timer.at["loader make"], timer.at["loader load"] = (
        loader.timer.at["make"],
        loader.timer.at["load"],
    )
    loader.held.let_go()
    return timer


def run(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Runs the trip; returns the record, also of a failure."""
    rows, images, criu = Rows(), Path(options.images), Criu(Path(options.bundle))
    with Program(argv, options.library) as program, Helper(fake=False) as helper:
        timer = Timer()
        try:
            program.right(program.ready(120))
            host = Host(Path(options.control), Path(options.files), helper)
            for number in range(options.rounds):
                if time.monotonic() > program.began + options.seconds:
                    break
                timer = Timer()
                about = capture(host, program, criu, images, timer)
                rows.add("capture", timer.took)
                timer = restore(host, program, criu, images, about)
                rows.add("restore", timer.took)
                rows.add("restore, ended at", timer.at)
                program.found["rounds"] = number + 1
                time.sleep(options.pause)
            time.sleep(0.5)
            program.right(program.more(program.status(), 20))
        except Exception as error:  # noqa: BLE001 - told
            program.failed(error, timer.now)
    return program.found | {"steps": rows.summary()}


def main() -> None:
    """One JSON line."""
    mine, program = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--pause", type=float, default=0.2)
    parser.add_argument("--control", default="/run/quickthaw")
    parser.add_argument("--files", default="/dev/shm")
    parser.add_argument("--images", default="/dev/shm/images")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--library", default="")
    print(json.dumps(run(parser.parse_args(mine), program)), flush=True)


if __name__ == "__main__":
    main()
