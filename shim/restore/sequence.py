"""Runs the steps of a swap in order, under a single deadline. All of them, or none.

Every step (`shim.restore.steps`) registers its undo before its change; leaving `run` with an
exception runs the undos in reverse. After that nothing of the swap is left and the plain `create`
may follow.
"""

from __future__ import annotations

import contextlib
import time

from shim.contract import faults, journal
from shim.contract.errors import QuickthawError, SwapFailed
from shim.kernel import alarm
from shim.kernel.alarm import TooLate
from shim.restore import steps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.contract.errors import SwapTooLate
    from shim.restore.steps import Swap


class Step:
    """name: in outcomes, messages and docs/architecture.md. for_gpus: only if GPUs were captured.

    take: takes the step; see `shim.restore.steps`. of_snapshot: the step depends on the snapshot
    alone; others depend on the node, on the pod's volumes, network or /dev/shm, or on its author.
    """

    __slots__ = ("for_gpus", "name", "of_snapshot", "take")

    def __init__(
        self,
        name: str,
        take: Callable[[Swap], None],
        *,
        for_gpus: bool = False,
        of_snapshot: bool = False,
    ) -> None:
        self.name, self.take = name, take
        self.for_gpus, self.of_snapshot = for_gpus, of_snapshot

    def __str__(self) -> str:
        return f"in step {self.name}"


TURN = Step("turn", steps.take_turn)
IN_TURN = (
    Step("rootfs", steps.mount_rootfs),
    Step("runtime", steps.start_runtime),
    Step("check", steps.check_snapshot),
    Step("shm", steps.fill_shm),
    Step("network", steps.prepare_network),
    Step("memory", steps.serve_memory),
    Step("gpu_start", steps.start_gpus, for_gpus=True),
    Step("hash", steps.finish_check, of_snapshot=True),
    Step("criu", steps.restore_processes, of_snapshot=True),
    Step("gpu_fill", steps.fill_memory, for_gpus=True, of_snapshot=True),
    Step("gpu", steps.restore_gpus, for_gpus=True, of_snapshot=True),
)
"""The steps that load the node: a swap takes them while it has its turn."""
RESUME = Step("resume", steps.call_workload)
STEPS = (TURN, *IN_TURN, RESUME)
_BETWEEN = "between two steps"


def run(swap: Swap) -> None:
    """Leave the container running, restored. Raises SwapFailed after undoing everything."""
    container = swap.ticket.container
    try:
        with swap.undo as undo:
            undo.enter_context(journal.lock(swap.private))
            undo.callback(faults.point, "restore.undone", container)
            try:
                with swap.held, _told(swap, None), alarm.raising(swap.until):
                    _take_steps(swap)
            except BaseException:
                alarm.kill_us_after(steps.UNDO_S)  # a sweep removes the rest, as after kill -9
                faults.point("restore.undo", container)
                raise
            undo.pop_all()
    finally:
        swap.network.close()
        alarm.cancel()


def _take_steps(swap: Swap) -> None:
    with swap.turn:
        _take(swap, TURN)
        with _at_most(swap, swap.ticket.turn_hold_s):
            for step in IN_TURN:
                if not step.for_gpus or swap.has_gpus:
                    _take(swap, step)
    # From here on the workload loads the node no more than any other start does.
    _take(swap, RESUME)
    steps.keep(swap)


def _take(swap: Swap, step: Step) -> None:
    """Take and time the step, and notice a deadline that passed silently in the step."""
    with swap.seconds.timed(step.name), _told(swap, step):
        step.take(swap)
    if time.monotonic() > swap.until:
        raise _late(swap, step, "it took too long")


@contextlib.contextmanager
def _at_most(swap: Swap, seconds: float) -> Iterator[None]:
    """Bound the time of a turn: others wait for it, so no deadline extends it."""
    last = swap.until
    swap.until = min(last, time.monotonic() + seconds)
    try:
        with alarm.sooner(swap.until, last):
            yield
    finally:
        swap.until = last


@contextlib.contextmanager
def _told(swap: Swap, step: Step | None) -> Iterator[None]:
    """Give every raised error the container's id and an effect. step: None between two."""
    try:
        yield
    except QuickthawError:
        raise
    except TooLate as error:
        raise _late(swap, step, str(error)) from error
    except Exception as error:
        raise SwapFailed(
            f"the swap failed {step or _BETWEEN}", about=swap.ticket.container,
            why=f"{type(error).__name__}: {error}",
            do=f"See `quickthaw show {swap.ticket.snapshot[:12]}`.",
        ) from error  # fmt: skip


def _late(swap: Swap, step: Step | None, why: str) -> SwapTooLate:
    from shim.restore import failure

    return failure.too_late(
        swap.ticket, swap.spec, str(step or _BETWEEN), why,
        of_snapshot=step is not None and step.of_snapshot,
    )  # fmt: skip
