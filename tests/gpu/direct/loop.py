"""Takes the device memory of a process that is asked without pause away, and gives it back.

`python3 -m tests.gpu.direct.loop --library LIBRARY --rounds 50 --mode files,keep -- PROGRAM…`
starts PROGRAM with the library preloaded, and `STATUS` in its arguments replaced by a directory in
which it writes `status`: a JSON object with `answers`, `wrong`, `errors`, `interrupted`. Mode
`keep` gives the same memory back; `files` saves it, lets it go, and fills new memory from them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.children import Helper
from tests.gpu.direct.host import Host, Timer
from tests.gpu.direct.program import Program, Rows


def one_round(host: Host, program: Program, mode: str, timer: Timer, *, checkpoint: bool) -> None:
    """Away and back. The program answers again afterwards, or this raises."""
    before, pid = program.status(), program.pid
    held = host.take(pid, timer)
    program.found |= {"octets": sum(held.sizes), "pieces": len(held.numbers), "seen": host.seen}
    numbers, sizes = held.numbers, held.sizes
    if mode == "files":
        with timer.step("save"):
            host.save(held)
        held.let_go()
    for do in ("lock", "checkpoint", "restore", "unlock") if checkpoint else ():
        with timer.step(f"driver {do}"):
            host.call(pid, do, **({"timeout_ms": 5000} if do == "lock" else {}))
    if mode == "files":
        held = host.made(held.uuid, numbers, sizes, timer)
    host.give(pid, held, timer)
    timer.took["stopped"] = round(time.perf_counter() - timer.began, 4)
    held.let_go()
    program.right(program.more(before, 20))


def run(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Runs the loop; returns the record, also of a failure."""
    rows = Rows()
    with Program(argv, options.library) as program, Helper(fake=False) as helper:
        timer = Timer()
        try:
            program.right(program.ready(120))
            host = Host(Path(options.control), Path(options.files), helper)
            modes = options.mode.split(",")
            for number in range(options.rounds):
                if time.monotonic() > program.began + options.seconds:
                    break
                timer, mode = Timer(), modes[number % len(modes)]
                one_round(host, program, mode, timer, checkpoint=not options.no_checkpoint)
                rows.add(mode, timer.took)
                program.found |= {"rounds": number + 1, "busy": host.busy}
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
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--mode", default="keep")
    parser.add_argument("--control", default="/run/quickthaw")
    parser.add_argument("--files", default="/dev/shm")
    parser.add_argument("--library", default="")
    parser.add_argument("--no-checkpoint", action="store_true")
    print(json.dumps(run(parser.parse_args(mine), program)), flush=True)


if __name__ == "__main__":
    main()
