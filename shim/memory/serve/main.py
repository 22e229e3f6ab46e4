"""Runs a page server's process: payloads, server and guard, and the work after their end. Lean.

Runs in a fork of `quickthaw-runc` (see `shim.restore.memory`), and outlives it.
"""

from __future__ import annotations

import contextlib
import mmap
import time

from shim.contract import faults
from shim.contract.errors import Blame
from shim.contract.paths import SNAPSHOT_MEMORY
from shim.integrity import marks
from shim.integrity.tree import Mismatch
from shim.kernel import priority, survivors
from shim.memory.serve import huge, messages, shared, workingset
from shim.memory.serve.guard import Guard, end, forget, remember
from shim.memory.serve.payload import Damaged, Payload
from shim.memory.serve.server import Abandoned, Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from shim.contract.ticket import Ticket
    from shim.integrity.check import Unchecked
    from shim.memory.layout import Layout
    from shim.memory.serve.fifos import Asked

_DIES_WITHIN_S = 5.0


def serve(
    ticket: Ticket,
    snapshot_dirfd: int,
    data: Mapping[str, Unchecked],
    memory: Layout,
    asked: Asked,
    listener: socket.socket,
    swap: socket.socket,
) -> None:
    """Serve until all memory is there, and have the container killed when that fails.

    data: the files of memory by name. asked: CRIU's requests for shared memory. swap: see
    `shim.memory.serve.server`. Never raises.
    """
    priority.protect("quickthaw-pages")
    # Only the server has the socket to the swap: so the swap learns at once of the server's end.
    guard = Guard(ticket, mmap.mmap(-1, mmap.PAGESIZE), asked.filenos(), [swap.fileno()])
    is_filled = False
    try:
        with contextlib.ExitStack() as opened:
            remember(ticket.container)
            files = {name: opened.enter_context(each.open(snapshot_dirfd))
                     for name, each in data.items()}  # fmt: skip
            payloads = {name: Payload(name, files[name].fileno(), each.size, each.digests)
                        for name, each in data.items()}  # fmt: skip
            known = workingset.read(ticket.snapshot)
            server = Server(
                ticket.container, listener, swap, guard, memory.spaces, payloads, known
            )  # fmt: skip
            if memory.shared:
                filler = shared.start(ticket.container, asked, memory.shared, payloads)
                opened.callback(filler.end)
                server.watch(filler)
            server.run()
            for name, each in data.items():
                each.unchanged(files[name].fileno())
            guard.filled()
            is_filled = True
            faults.point("memory.filled", ticket.container)
            guard.dismiss()  # first: areas become ordinary when the last descriptor is closed
            _let_be(server, swap)
            forget(ticket.container)
            huge.collapse(ticket.container, memory.spaces)
            _remember(ticket, server, payloads, data, known)
    except Abandoned:
        survivors.kill(ticket.container, until=time.monotonic() + _DIES_WITHIN_S)
        guard.dismiss()
    except Exception as error:  # noqa: BLE001 - the border: on any error the container must end
        is_damaged = isinstance(error, Damaged | Mismatch)
        if is_filled:
            forget(ticket.container)
        else:
            why = _told(error)
            with contextlib.suppress(OSError):  # the swap is over
                kind = messages.DAMAGED if is_damaged else messages.FAILED
                swap.sendall(kind + why.encode()[: messages.MOST_BYTES - 1])
            end(ticket, why, blame=Blame.CONTENT if is_damaged else Blame.OTHER)
        guard.dismiss()


def _let_be(server: Server, swap: socket.socket) -> None:
    """The areas are ordinary from now on."""
    server.close()
    with contextlib.suppress(OSError):  # the swap is over, unless there are GPUs to bring back
        swap.sendall(messages.ORDINARY)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _remember(
    ticket: Ticket,
    server: Server,
    payloads: Mapping[str, Payload],
    data: Mapping[str, Unchecked],
    known: Sequence[tuple[int, int]],
) -> None:
    """Store facts that make the next restore faster. Nothing depends on them."""
    with contextlib.suppress(OSError, Damaged):
        windows = server.recorder.after(known)
        if len(windows) > len(known):
            workingset.write(ticket.snapshot, windows)
        if not all(payload.is_checked for payload in payloads.values()):
            for payload in payloads.values():
                payload.check_rest()
        fresh = {each.path: each.mark for each in data.values()}
        if fresh and marks.read(ticket.snapshot, SNAPSHOT_MEMORY) != fresh:
            marks.write(ticket.snapshot, SNAPSHOT_MEMORY, fresh)
