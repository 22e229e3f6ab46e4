"""Program: makes driver calls on request, one JSON line each way.

A process of its own, as a driver call can hang and must then be killed without ending the probe.
The first line that it writes has what starting cost.
"""

import json
import sys
import time
from typing import Any

from tests.gpu import driver


def main() -> None:
    """Serve until standard input ends."""
    started = time.monotonic()
    lib = driver.load("--fake" in sys.argv)
    say({"load_ms": since(started), "version": lib.version()})
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        answer = serve(lib, request)
        answer["ms"] = since(started)
        if "code" in answer:
            answer["name"] = lib.name(answer["code"])
        say(answer)


def since(started: float) -> float:
    """Milliseconds."""
    return round((time.monotonic() - started) * 1000, 2)


def say(answer: dict[str, Any]) -> None:
    """One line, at once."""
    print(json.dumps(answer), flush=True)


def serve(lib: driver.Driver, request: dict[str, Any]) -> dict[str, Any]:
    """Returns what the driver said; `code` is its CUresult."""
    pid = request.get("pid", 0)
    match request["do"]:
        case "init":
            return {"code": lib.init()}
        case "uuids":
            return {"uuids": [uuid.hex() for uuid in lib.uuids()]}
        case "thread":
            code, tid = lib.restore_thread(pid)
            return {"code": code, "tid": tid}
        case "state":
            code, state = lib.state(pid)
            return {"code": code, "state": None if code else driver.STATES[state]}
        case "symbol":
            code, found = lib.symbol(request["symbol"], request["version"])
            return {"code": code, "found": found}
        case _:
            return {"code": change(lib, request, pid)}


def change(lib: driver.Driver, request: dict[str, Any], pid: int) -> int:
    """The four calls that change a process's state."""
    match request["do"]:
        case "lock":
            return lib.lock(pid, request.get("timeout_ms", 0))
        case "checkpoint":
            return lib.checkpoint(pid)
        case "restore":
            pairs = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in request.get("pairs", [])]
            return lib.restore(pid, pairs)
        case "unlock":
            return lib.unlock(pid)
        case unknown:
            raise ValueError(f"the helper knows no {unknown!r}")


if __name__ == "__main__":
    main()
