"""Verifies snapshots after a boot: until then no mark says that a snapshot is whole.

The marks of hashed files end with the boot (see `shim.integrity.marks`). A process of the lowest
priority hashes the files beforehand, so that the first restore need not. A process, not a thread: a
thread that waits for the processor could hold the interpreter of the daemon.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING

from shim.contract import jsontext
from shim.contract.parts import PARTS
from shim.contract.paths import COMMAND, VERIFIED
from shim.integrity import marks
from shim.node import tool

if TYPE_CHECKING:
    from shim.store.store import Store

log = logging.getLogger("quickthawd")

_WITHIN_S = 24 * 3600.0


def forget_gone(store: Store) -> None:
    """Remove the marks of deleted snapshots. Raises OSError."""
    exist = {found.id for found in store.all()}
    for name in os.listdir(VERIFIED):
        if name not in exist:
            marks.forget(name)


async def reverify(store: Store) -> None:
    """Verify snapshots without marks, in the background; a finding is a line of the journal."""
    if not await asyncio.to_thread(_unmarked, store):
        return
    began = time.monotonic()
    argv = [COMMAND, "verify", "--background"]
    try:
        ended = await tool.run_async(argv, within_s=_WITHIN_S)
        rows = jsontext.parse(ended.output.splitlines()[-1])["snapshots"]
    except (OSError, TimeoutError, ValueError, LookupError) as error:
        log.warning(
            "cannot verify snapshots in the background; their first use verifies them: %r", error
        )
        return
    for row in rows:
        if row["reason"]:
            log.warning("snapshot %s is not whole: %s", row["id"][:12], row["reason"])
    log.info("verified %d snapshots in %.1f s", len(rows), time.monotonic() - began)


def _unmarked(store: Store) -> bool:
    return any(
        not os.path.exists(f"{VERIFIED}/{found.id}/{part.name}")
        for found in store.all()
        for part in PARTS
        if part.is_always_marked
    )
