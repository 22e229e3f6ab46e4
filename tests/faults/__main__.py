"""`make faults`: makes every part fail on a real node; writes build/faults.json.

    FAULTS=EXPR   only cases whose PHASE/FAULT begins like one word of EXPR, which may have a `*`
                  (`restore.shm,*CRIU,*/kill`)
    SUITE=forky   forky, trixie, or both with a comma between them

Exit status 1 when a pod was stuck, something stayed behind, or a container was wrong.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.faults import capturing, outside, restoring
from tests.faults.cases import Case, matrix
from tests.faults.direct import DirectGround
from tests.faults.driver import GpuGround
from tests.faults.ground import Ground, Missed, WentWrong
from tests.node.base import BUILD
from tests.node.daemonfigures import Figures
from tests.node.gpus import gpus
from tests.node.node import Node
from tests.workers import images

RESULT: Final = BUILD.parent / "faults.json"
STRIKES: Final = 4
"""How often a fault whose moment was missed is retried: CRIU may live for 50 ms."""
_LINES: Final = 20
"""Lines of a failure in the printed output: the file has the rest."""
LEVELS: Final = ("INFO ", "WARNING ", "ERROR ", "CRITICAL ")
GROUNDS: Final = {"plain": Ground, "driver": GpuGround, "direct": DirectGround}
PACKAGES: Final = BUILD.parent / "packages"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make faults")
    parser.add_argument("--only", default="")
    parser.add_argument("--suite", default="forky")
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]
    cases = [each for each in matrix() if not words or _is_meant(each, words)]
    out = Console(highlight=False, soft_wrap=True)
    suites = options.suite.split(",")
    began = time.monotonic()
    figures = Figures()
    found = [result for suite in suites for result in _on_suite(suite, cases, out, figures)]
    document = {
        "machine": _machine(suites), "seconds": round(time.monotonic() - began, 1),
        "daemon": figures.as_json(),
    }  # fmt: skip
    RESULT.write_text(json.dumps({**document, "cases": found}, indent=1) + "\n")
    out.print(_table(found))
    out.print(str(figures))
    failed = [each for each in found if each["wrong"] or each["left_overs"]]
    out.print(
        f"{len(found)} cases, {len(failed)} wrong, {document['seconds']} s; "
        f"written to {RESULT.relative_to(BUILD.parents[1])}"
    )
    return 1 if failed or not found else 0


def _is_meant(case: Case, words: list[str]) -> bool:
    return any(fnmatchcase(case.name, f"{word}*") for word in words)


def _on_suite(
    suite: str, cases: list[Case], out: Console, figures: Figures
) -> list[dict[str, Any]]:
    """figures: taken after each case; they lack the cost of a daemon that a case has ended."""
    (deb,) = PACKAGES.glob("*.deb")
    archive = images.build("probe")
    with Node(suite) as node:
        node.start_product(deb)
        node.import_image(archive)
        found = []
        for name, kind in GROUNDS.items():
            if meant := [case for case in cases if case.ground == name]:
                with gpus(node) if name != "plain" else contextlib.nullcontext():
                    found += _on_ground(kind(node), meant, out, figures)
    return found


def _on_ground(
    ground: Ground, cases: list[Case], out: Console, figures: Figures
) -> list[dict[str, Any]]:
    suite, found = ground.node.suite, list[dict[str, Any]]()
    for number, case in enumerate(cases, 1):
        result = one(ground, case)
        figures.take(ground.node)
        found.append({"suite": suite, **result})
        wrong = [*result["wrong"], *(f"left: {name}" for name in result["left_overs"])]
        out.print(
            f"{suite} {number}/{len(cases)} {case.name}: {result['outcome']} "
            f"in {result['seconds']} s {'[red]WRONG[/red]' if wrong else 'ok'}"
        )
        for line in wrong[:_LINES]:
            out.print(f"  {line}", markup=False)
    if left := ground.close():
        out.print(f"[red]Left after all of them:[/red] {left}")
        found[-1]["left_overs"] = [*found[-1]["left_overs"], *left]
    return found


def one(ground: Ground, case: Case) -> dict[str, Any]:
    """Run a case, and check everything that the case must leave as before."""
    began = time.monotonic()
    with ground.daemon_log() as said:
        try:
            seen = _seen(ground, case)
        except Exception as error:  # noqa: BLE001 - a case that fails must not end the others
            seen = restoring.Seen(outcome="stuck", wrong=[f"{type(error).__name__}: {error}"])
            if not isinstance(error, AssertionError):
                seen.wrong.append(traceback.format_exc(limit=-3))
    seconds = round(time.monotonic() - began, 2)
    wrong = list(seen.wrong)
    if seen.outcome != "stuck" and seen.outcome not in case.expected:
        wrong.append(f"the outcome is {seen.outcome}, not {' or '.join(case.expected)}")
    if seen.source_state != "serves":
        wrong.append(f"the source {seen.source_state}")
    wrong += _reset(ground) if seen.outcome == "stuck" else []
    wrong += [f"not whole: {each}" for each in ground.not_whole()]
    wrong += _tracebacks(said)
    return {
        "phase": case.phase, "fault": case.fault, "outcome": seen.outcome,
        "expected": list(case.expected), "seconds": seconds, "left_overs": ground.left_overs(),
        "source_state": seen.source_state, "reason": seen.reason or _reason(said),
        "attempts": seen.tries, "wrong": wrong,
    }  # fmt: skip


def _seen(ground: Ground, case: Case) -> restoring.Seen:
    """Run the case until the fault has struck. Raises what the case raises; Missed after the last
    try.
    """
    for _ in range(STRIKES - 1):
        try:
            return _runner(case)(ground, case)
        except Missed:
            if wrong := _reset(ground):
                raise WentWrong(f"after a fault that missed: {wrong}") from None
    return _runner(case)(ground, case)


def _runner(case: Case) -> Callable[[Ground, Case], restoring.Seen]:
    if case.kind == "outside":
        return outside.run
    if case.kind in ("capture", "store"):
        return capturing.run
    return restoring.run


def _tracebacks(said: list[str]) -> list[str]:
    """Returns each traceback of the journal from its first line to the next message."""
    found: list[list[str]] = []
    for line in said:
        if line.startswith("Traceback"):
            found.append([])
        if found and not line.startswith(LEVELS):
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def _reason(said: list[str]) -> str:
    told = [line for line in said if line.startswith(("WARNING", "ERROR")) and "armed" not in line]
    return told[0] if told else ""


def _reset(ground: Ground) -> list[str]:
    """Clean up after a case that is stuck: the next case must begin on clean ground."""
    try:
        ground.disarm()
        ground.restart_daemon()
        for pod in list(ground.node.kubelet.pods):
            if pod is not ground.source:
                pod.remove(grace_s=0)
        ground.mend_snapshot()
        capturing.forget(ground, capturing.published(ground) - {ground.snapshot.id})
    except Exception as error:  # noqa: BLE001 - it is told with the case
        return [f"and afterwards: {type(error).__name__}: {error}"]
    return []


def _machine(suites: list[str]) -> dict[str, Any]:
    return {
        "kernel": platform.release(), "arch": platform.machine(), "cores": os.cpu_count(),
        "suites": suites, "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _table(found: list[dict[str, Any]]) -> Table:
    """Returns the outcomes of the cases of each phase."""
    table = Table(title="Faults")
    for heading in ("phase", "cases", "restored", "cold", "killed", "wrong", "slowest s"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    phases: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        phases.setdefault(each["phase"], []).append(each)
    for phase, cases in phases.items():
        counts = [
            sum(each["outcome"] == outcome for each in cases)
            for outcome in ("restored", "cold", "killed")
        ]
        wrong = sum(bool(each["wrong"] or each["left_overs"]) for each in cases)
        slowest = max(each["seconds"] for each in cases)
        table.add_row(phase, *map(str, [len(cases), *counts, wrong]), f"{slowest:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
