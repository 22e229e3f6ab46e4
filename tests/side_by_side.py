"""Runs pytest several times side by side: python3 -m tests.side_by_side 'ARGUMENTS' 'ARGUMENTS' …

The nodes of the two suites wait most of the time, each for its own containerd. A run that begins
with `nice` gives way to the others. The output of a run appears when the run ends; the exit status
is the worst of all. At the end come the sums and, last of all, the failed tests with their reasons:
whoever keeps only the end of the output has them.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final
from xml.etree import ElementTree

SLOWEST: Final = "--durations=15"
MOST_FAILED: Final = 30
MOST_CHARACTERS: Final = 400
_COUNTED: Final = re.compile(r"(\d+) (passed|failed|error|errors|skipped)\b")


@dataclass(frozen=True, slots=True)
class Run:
    """A pytest under way. report: the file that has the results of its tests when it ends."""

    arguments: str
    process: subprocess.Popen[str]
    output: IO[str]
    report: Path


def main(runs: list[str]) -> int:
    """Run all to their ends. Returns 0 when each did."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = [_start(stack, run, directory / f"{at}.xml") for at, run in enumerate(runs)]
        worst, counted = 0, dict.fromkeys(("passed", "failed", "skipped"), 0)
        wrong: list[str] = []
        for run in started:
            status = abs(run.process.wait())
            worst = max(worst, status)
            run.output.seek(0)
            text = run.output.read()
            print(f"==== pytest {run.arguments}\n{text}", flush=True)
            for number, word in _COUNTED.findall(text.rstrip().rpartition("\n")[2]):
                counted["failed" if word.startswith("error") else word] += int(number)
            found = failed(run.report)
            if status and not found:
                found = [f"pytest {run.arguments}: exit status {status}: {text.strip()[-300:]}"]
            wrong += found
    print(f"{counted['passed']} passed, {counted['failed']} failed, {counted['skipped']} skipped")
    print(f"{' and '.join(runs)}: {time.monotonic() - began:.0f} s")
    print("\n".join(shortened(wrong)), flush=True)
    return worst


def failed(report: Path) -> list[str]:
    """Returns the failed tests of a JUnit report, each with the first line of its error."""
    try:
        cases = ElementTree.parse(report).iter("testcase")  # noqa: S314 - our own pytest wrote it
    except (OSError, ElementTree.ParseError):
        return []
    found = []
    for case in cases:
        for kind in ("failure", "error"):
            for result in case.iter(kind):
                name = f"{case.get('file')}::{case.get('name')}"
                found.append(f"{kind.upper()} {name}: {_reason(result)}")
    return found


def shortened(lines: list[str]) -> list[str]:
    """Returns at most MOST_FAILED lines, and how many are left out."""
    more = len(lines) - MOST_FAILED
    kept = [" ".join(line.split())[:MOST_CHARACTERS] for line in lines[:MOST_FAILED]]
    return [*kept, f"and {more} more"] if more > 0 else kept


def _reason(result: ElementTree.Element) -> str:
    lines = (result.text or "").splitlines()
    told = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return next(filter(None, told), result.get("message") or "no reason is told")


def _start(stack: contextlib.ExitStack, arguments: str, report: Path) -> Run:
    output = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115 - the stack closes it
    words = shlex.split(arguments)
    first = ["nice"] if words[0] == "nice" else []
    argv = [
        *first, sys.executable, "-m", "pytest", SLOWEST, f"--junitxml={report}", "-o",
        "junit_family=xunit1", *words[len(first) :],
    ]  # fmt: skip
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True
    )
    stack.callback(_end, process)
    return Run(arguments, process, output, report)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a run that is given up, as by Ctrl-C: the run takes its nodes away itself."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status) if status else sys.exit(0)
