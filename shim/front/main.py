"""Runs `quickthaw-runc` for a ticket or a swapped container: the shell front hands over here."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from shim.contract import faults, jsontext, outcome, ticket
from shim.contract.errors import Effect, QuickthawError, SwapFailed, blame_of
from shim.contract.paths import SWAPPED
from shim.front import cold
from shim.kernel import alarm
from shim.oci import call as argv

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.contract.ticket import Ticket
    from shim.oci.call import Call

_QUICK_S = 5.0
"""For steps that read or write a small file in memory, outside of the deadline of the swap."""


def main() -> int:
    """Answer a call of containerd's shim. Every unclear call goes to the real runtime."""
    arguments = sys.argv[1:]
    call = argv.parse(arguments)
    if call and call.command == "start" and os.path.exists(f"{SWAPPED}/{call.container}"):
        return 0  # running since `create`
    if call and call.command == "create" and _swapped(call):
        return 0
    if call and call.command == "create":
        alarm.kill_us_after(_QUICK_S)
        faults.point("restore.cold", call.container)
        alarm.cancel()
    cold.become_runtime(arguments)


def _swapped(call: Call) -> bool:
    """Try the swap. Returns False when the container must start cold; exits when it must not."""
    began = time.monotonic()
    steps: dict[str, float] = {}
    warnings = faults.arm_from_file() + faults.armed()
    wanted, error = _ticket(call, began)
    result = outcome.RESTORED
    with contextlib.ExitStack() as guarded:
        if wanted:
            error = _tried(call, wanted, began, steps, guarded)
        if error and wanted and wanted.fallback == "fail":
            result, error.effect = outcome.REFUSED, Effect.REFUSED_START
        elif error:
            result = outcome.COLD
        seconds = round(time.monotonic() - began, 4)
        _report(call, wanted, error, result=result, seconds=seconds, steps=steps, warnings=warnings)
    if result == outcome.REFUSED:
        _refuse(str(error))
    return error is None


def _ticket(call: Call, began: float) -> tuple[Ticket | None, QuickthawError | None]:
    """Returns the ticket, or the error that made it unreadable."""
    try:
        with alarm.raising(began + _QUICK_S):
            faults.point("restore.ticket", call.container)
            return ticket.read(call.container), None
    except QuickthawError as failure:
        return None, failure
    except Exception as failure:  # noqa: BLE001 - the border: the pod must start on any error
        return None, _defect(call, failure)


def _tried(
    call: Call,
    wanted: Ticket,
    began: float,
    steps: dict[str, float],
    guarded: contextlib.ExitStack,
) -> QuickthawError | None:
    """Try the swap. Returns the error of a failed swap.

    guarded: gets the guard, which watches until the outcome is written.
    """
    try:
        # Imported late: a broken installation is a failed swap, not a failed create.
        from shim.restore import sequence
        from shim.restore.guard import watching
        from shim.restore.steps import UNDO_S, Swap

        runtime = [cold.runtime(), *call.root_flags]
        until = began + wanted.deadline_s
        guarded.enter_context(watching(wanted, runtime, until + UNDO_S + _QUICK_S))
        swap = Swap(call, wanted, runtime, until)
        try:
            sequence.run(swap)
        finally:
            steps.update(swap.seconds)
    except QuickthawError as failure:
        return failure
    except Exception as failure:  # noqa: BLE001 - the border: the pod must start on any error
        return _defect(call, failure)
    return None


def _defect(call: Call, failure: Exception) -> SwapFailed:
    error = SwapFailed(
        "the swap failed", about=call.container, why=f"{type(failure).__name__}: {failure}",
        do="This is a defect in quickthaw: please report it.",
    )  # fmt: skip
    error.__cause__ = failure
    before = failure.__context__
    while before and not isinstance(before, QuickthawError):
        before = before.__context__
    if isinstance(before, QuickthawError):
        # It failed while that was undone, and blames the snapshot for no more than that does.
        error.why, error.blame = f"{error.why}, after: {before}", blame_of(before)
    return error


def _report(
    call: Call, wanted: Ticket | None, error: QuickthawError | None, **fields: object
) -> None:
    """Write the outcome for the daemon, and remove the ticket. Neither may fail the container."""
    until = time.monotonic() + _QUICK_S
    with contextlib.suppress(OSError, ValueError, alarm.TooLate), alarm.raising(until):
        # Where /run is full or gone, the daemon learns only that the swap has ended.
        faults.point("restore.outcome", call.container)
        ended = outcome.Outcome(
            snapshot=wanted.snapshot if wanted else "",
            error=str(error or ""),
            error_class=type(error).__name__ if error else "",
            exit_code=error.exit_code if error else 0,
            refusals=list(getattr(error, "codes", ())),
            blame=blame_of(error) if error else "",
            deadline_s=wanted.deadline_s if wanted else 0,
            pod=ticket.pod_of(wanted) if wanted else {},
            at=time.time(),
            **fields,
        )
        outcome.write(call.container, ended)
        faults.point("restore.outcome.written", call.container)
    with contextlib.suppress(OSError):
        ticket.remove(call.container)


def _refuse(message: str) -> None:
    """Exit with an error that containerd shows in the pod's status: its shim reads runc's log."""
    log = sys.argv[sys.argv.index("--log") + 1] if "--log" in sys.argv[:-1] else ""
    if log:
        with open(log, "a") as file:
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = jsontext.compose({"level": "error", "msg": message, "time": at})
            file.write(f"{line}\n")
    sys.exit(1)
