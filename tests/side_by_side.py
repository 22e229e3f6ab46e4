"""Runs pytest several times side by side: python3 -m tests.side_by_side 'ARGUMENTS' 'ARGUMENTS' …

The nodes of the two suites wait most of the time, each for its own containerd. A run that begins
with `nice` gives way to the others. The output of a run appears when the run ends; the exit status
is the worst of all. The line at the end has the sums.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Final

SLOWEST: Final = "--durations=15"
_COUNTED: Final = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


def main(runs: list[str]) -> int:
    """Run all to their ends. Returns 0 when each did."""
    with contextlib.ExitStack() as stack:
        started = [_start(stack, run) for run in runs]
        worst, counted = 0, dict.fromkeys(("passed", "failed", "skipped"), 0)
        for run, (process, output) in zip(runs, started, strict=True):
            worst = max(worst, abs(process.wait()))
            output.seek(0)
            text = output.read()
            print(f"==== pytest {run}\n{text}", flush=True)
            for number, word in _COUNTED.findall(text.rstrip().rpartition("\n")[2]):
                counted["failed" if word.startswith("error") else word] += int(number)
    print(f"{counted['passed']} passed, {counted['failed']} failed, {counted['skipped']} skipped")
    return worst


def _start(stack: contextlib.ExitStack, run: str) -> tuple[subprocess.Popen[str], IO[str]]:
    output = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115 - the stack closes it
    words = shlex.split(run)
    first = ["nice"] if words[0] == "nice" else []
    argv = [*first, sys.executable, "-m", "pytest", SLOWEST, *words[len(first) :]]
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True
    )
    stack.callback(_end, process)
    return process, output


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a run that is given up, as by Ctrl-C: the run takes its nodes away itself."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


if __name__ == "__main__":
    began = time.monotonic()
    status = main(sys.argv[1:])
    print(f"{' and '.join(sys.argv[1:])}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    os._exit(status) if status else sys.exit(0)
